"""The recurrent layer on a CUDA device: `lstm_fused::recurrent_forward` and `recurrent_backward`.

What does not recur is a single product each, through torch: x.W_ih of all steps before the kernels
run, and the gradients of x and of the weights after them. The recurrence is ours (csrc/cuda/).

Shapes: T steps, N rows, I inputs, H hidden units, R recurrent width (the projection's size, or H),
D directions, S rows of packed data, G gates, and as many sums as csrc/cells/cells.h says.
"""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch

from lstm_fused import _plan, cuda

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _check(fits, message):
    if not fits:
        raise RuntimeError(message)


def _capturing(x):
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


@dataclass
class _Layer:
    """A layer's tensors, checked. weights: for each direction, as ops.layer takes them."""

    x: torch.Tensor
    batch_sizes: torch.Tensor | None
    state0: list
    weights: list
    cell: int
    D: int

    def __post_init__(self):
        self.G, self.sums, self.memory, self.input_gates, self.hidden_gates = cuda.CELLS[self.cell]
        each = len(self.weights) // self.D
        _check(
            self.D in (1, 2) and each * self.D == len(self.weights) and 2 <= each <= 5,
            "weights must hold 2 to 5 tensors for each direction",
        )
        self.weights = [self.weights[d * each : (d + 1) * each] for d in range(self.D)]
        self.projection, self.bias = each % 2 == 1, each >= 4
        x, w_hh = self.x, self.weights[0][1]
        _check(x.dtype in _DTYPES, "x must be float32, float64, bfloat16 or float16")
        if self.batch_sizes is None:
            _check(x.dim() == 3, f"x has shape {tuple(x.shape)} but must be (T, N, I)")
            self.T, self.N = x.shape[:2]
            self.S = self.T * self.N
        else:
            _check(x.dim() == 2, f"packed x has shape {tuple(x.shape)} but must be (S, I)")
            sizes = self.batch_sizes
            _check(
                sizes.dim() == 1
                and sizes.device.type == "cpu"
                and sizes.dtype is torch.int64
                and len(sizes) > 0,
                "batch_sizes must be a 1-D int64 tensor on the CPU, with a step",
            )
            self.T, self.N, self.S = len(sizes), int(sizes[0]), len(x)
        _check(self.T > 0, "x must have at least one time step")
        self.I = x.shape[-1]
        _check(
            w_hh.dim() == 2 and w_hh.shape[0] % self.G == 0,
            f"w_hh has shape {tuple(w_hh.shape)} but must be ({self.G} * H, R)",
        )
        self.H, self.R = w_hh.shape[0] // self.G, w_hh.shape[1]
        self._check_tensors()

    def _check_tensors(self):
        rows = self.G * self.H
        shapes = [("w_ih", (rows, self.I)), ("w_hh", (rows, self.R))]
        shapes += [("b_ih", (rows,)), ("b_hh", (rows,))] if self.bias else []
        shapes += [("w_hr", (self.R, self.H))] if self.projection else []
        _check(
            self.projection or self.R == self.H,
            f"w_hh has shape {tuple(self.weights[0][1].shape)}: without a projection R must be H",
        )
        for weights in self.weights:
            for w, (name, shape) in zip(weights, shapes, strict=True):
                self.check_like(w, shape, name)
        states = [("h0", (self.D, self.N, self.R)), ("c0", (self.D, self.N, self.H))]
        count = 2 if self.memory == "cell" else 1
        _check(len(self.state0) in (0, count), f"state0 must hold {count} tensors or nothing")
        for state, (name, shape) in zip(self.state0, states, strict=False):
            self.check_like(state, shape, name)

    def check_like(self, t, shape, name):
        _check(t.device == self.x.device, f"{name} must be on {self.x.device}, as x is")
        _check(t.dtype is self.x.dtype, f"{name} must have the dtype of x")
        _check(
            t.shape == torch.Size(shape),
            f"{name} has shape {tuple(t.shape)} but must be {tuple(shape)}",
        )

    @property
    def compute(self):
        return torch.float64 if self.x.dtype is torch.float64 else torch.float32

    @property
    def dtype_name(self):
        return str(self.x.dtype).removeprefix("torch.")

    @cached_property
    def rows(self):
        """x as (S, I)."""
        return self.x.reshape(self.S, self.I)

    @property
    def sizes(self):
        return None if self.batch_sizes is None else self.batch_sizes.contiguous()

    @cached_property
    def tf32(self):
        return self.x.dtype is torch.float32 and cuda.tf32_allowed()

    def shaped(self, width):
        """The shape of y, dy: as x, of another width."""
        return (*self.x.shape[:-1], width)

    def empty(self, *shape, dtype=None):
        t = self.x.new_empty(shape, dtype=dtype)
        return t.fill_(float("nan")) if torch.ops.lstm_fused.poisoning() else t

    def columns(self, values):
        """Of a row of `values` operands of a product, padded as the kernels want it."""
        return _plan.cuda_row_bytes(self.dtype_name, values) // self.x.element_size()

    def exchange(self, made, halves, columns):
        """Zeros for what one step hands to the next, (halves, D, N and more, columns)."""
        rows = -(-self.N // made.tile_rows) * made.tile_rows
        return self.x.new_zeros(halves, self.D, rows, columns)

    def plan(self, backward):
        # In a CUDA graph packed data's sizes cannot be copied to the device for the other plans.
        step = self.batch_sizes is not None and _capturing(self.x)
        sizes = (self.dtype_name, self.T, self.N, self.H, self.R, self.D, self.G, self.projection)
        made = cuda.choose(self.x.device, *sizes, self.tf32, backward, step=step)
        cuda.note(
            **{"pass": "backward" if backward else "forward"},
            dtype=self.dtype_name,
            kernel=made.kind,
            tile_rows=made.tile_rows,
            unit_ctas=made.unit_ctas,
            row_groups=made.row_groups,
            tf32=int(made.tf32),
        )
        return made

    def meeting(self, made):
        """Counters for the CTAs of a grid to meet at, and packed data's sizes and offsets there."""
        barrier = steps = None
        if made.kind == "grid":
            barrier = self.x.new_zeros(self.D * made.row_groups, dtype=torch.int64)
        if made.kind != "step" and self.batch_sizes is not None:
            steps = torch.zeros(2, self.T + 1, dtype=torch.int64)
            steps[0, :-1] = self.batch_sizes
            steps[1, 1:] = self.batch_sizes.cumsum(0)
            steps = steps.to(self.x.device)
        return barrier, steps


@contextmanager
def _ieee_products():
    """No TF32 in torch's products, by whichever of torch's two kinds of switch is in use.

    Torch refuses to answer when both kinds contradict each other.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        older = matmul.allow_tf32
    except RuntimeError:
        older = False
    if older:
        matmul.allow_tf32 = False
    else:
        matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        if older:
            matmul.allow_tf32 = True
        else:
            matmul.fp32_precision = before


def _products(layer):
    """Torch's own switch rules its products, but no TF32 where recurrent layers may not have it."""
    narrow = torch.backends.cuda.matmul.fp32_precision not in ("none", "ieee")
    if layer.x.dtype is torch.float32 and not layer.tf32 and narrow:
        return _ieee_products()
    return nullcontext()


def _product(a, b):
    """a (n, k) b (k, m), accumulated and given in the compute dtype."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def _operand(w, columns):
    """w (rows, k) with its rows padded by zeros to `columns`, contiguous and aligned."""
    if w.shape[1] == columns and w.is_contiguous() and w.data_ptr() % 16 == 0:
        return w
    padded = w.new_zeros(w.shape[0], columns)
    padded[:, : w.shape[1]] = w
    return padded


def _contiguous(tensors):
    return [t.contiguous() for t in tensors]


@torch.no_grad()
def forward(x, batch_sizes, state0, weights, cell, directions, training):
    """lstm_fused::recurrent_forward; gates (S, D, sums, H) and cells (S, D, H) are saved."""
    with torch.autocast("cuda", enabled=False) if x.is_cuda else nullcontext():
        return _forward(
            _Layer(x, batch_sizes, list(state0), list(weights), cell, directions), training
        )


def _forward(layer, training):
    z = layer
    y = z.empty(z.S, z.D * z.R)
    h_n = z.empty(z.D, z.N, z.R)
    c_n = z.empty(z.D, z.N, z.H) if z.memory == "cell" else z.empty(0)
    nothing = z.empty(0, dtype=z.compute)
    if z.N == 0:
        gates = z.empty(0, z.D, z.sums, z.H, dtype=z.compute) if training else nothing
        cells = z.empty(0, z.D, z.H, dtype=z.compute) if training else nothing
        return y.view(z.shaped(z.D * z.R)), h_n, c_n, gates, cells
    made = z.plan(backward=False)
    with _products(z):
        w_ih = z.weights[0][0] if z.D == 1 else torch.cat([w[0] for w in z.weights])
        pre = _product(z.rows, w_ih.t()).view(z.S, z.D, z.G * z.H)
    gates = cells = None
    if training:
        # Each unit's sums are read before its gates are written.
        in_place = z.sums == z.G
        gates = (
            pre.view(z.S, z.D, z.G, z.H)
            if in_place
            else z.empty(z.S, z.D, z.sums, z.H, dtype=z.compute)
        )
        cells = z.empty(z.S, z.D, z.H, dtype=z.compute) if z.memory != "none" else None
    state0 = _contiguous(z.state0)
    exchange = [z.exchange(made, 2, z.columns(z.R))]
    if state0:
        exchange[0][:, :, : z.N, : z.R] = state0[0]
    if z.projection:
        exchange.append(z.exchange(made, 1, z.columns(z.H)))
    barrier, steps = z.meeting(made)
    cuda.kernels.forward(
        pre,
        [_operand(w[1], z.columns(z.R)) for w in z.weights],
        _contiguous(b for w in z.weights for b in w[2:4]) if z.bias else [],
        [_operand(w[-1], z.columns(z.H)) for w in z.weights] if z.projection else [],
        state0,
        z.sizes,
        steps,
        y,
        h_n,
        c_n if z.memory == "cell" else None,
        gates,
        cells,
        z.empty(z.D, z.N, z.H, dtype=z.compute),
        exchange,
        barrier,
        z.cell,
        z.sums,
        made.packed,
    )
    saved = [nothing if t is None else t for t in (gates, cells)]
    return y.view(z.shaped(z.D * z.R)), h_n, c_n, *saved


@torch.no_grad()
def backward(
    x, batch_sizes, state0, weights, y, gates, cells, dy, dh_n, dc_n, cell, directions, mask
):
    """lstm_fused::recurrent_backward; a gradient that mask does not ask for is empty."""
    with torch.autocast("cuda", enabled=False) if x.is_cuda else nullcontext():
        layer = _Layer(x, batch_sizes, list(state0), list(weights), cell, directions)
        _check(
            len(mask) == 3 + len(weights),
            "mask must have one entry each for x, h0, c0 and every weight",
        )
        layer.check_like(y, layer.shaped(layer.D * layer.R), "y")
        return _Backward(layer, y, gates, cells, mask).run(dy, dh_n, dc_n)


class _Backward:
    """One backward pass: the walk back through time, then the gradients of x and the weights."""

    def __init__(self, layer, y, gates, cells, mask):
        self.z, self.y, self.gates, self.cells, self.mask = layer, y, gates, cells, mask

    def run(self, dy, dh_n, dc_n):
        z = self.z
        if z.N == 0:
            return self._nothing()
        self._walk(dy, dh_n, dc_n)
        with _products(z):
            dweights = [self._weight_gradients(d) for d in range(z.D)]
            dx = self._input_gradient()
        return dx, self.dh0, self.dc0, [g for of_direction in dweights for g in of_direction]

    def _wanted(self, want, *shape):
        return self.z.empty(*shape) if want else self.z.empty(0)

    def _nothing(self):
        z = self.z
        given = [w for of_direction in z.weights for w in of_direction]
        return (
            self._wanted(self.mask[0], *z.x.shape),
            self._wanted(self.mask[1], z.D, z.N, z.R),
            self._wanted(self.mask[2], z.D, z.N, z.H),
            [
                torch.zeros_like(w) if want else z.empty(0)
                for w, want in zip(given, self.mask[3:], strict=True)
            ],
        )

    def _walk(self, dy, dh_n, dc_n):
        z = self.z
        made = z.plan(backward=True)
        self.d_gates = z.empty(z.S, z.D, z.sums, z.H)
        self.dh0 = self._wanted(self.mask[1], z.D, z.N, z.R)
        self.dc0 = self._wanted(self.mask[2], z.D, z.N, z.H)
        self.hidden = z.empty(z.S, z.D, z.H) if z.projection else None
        self.d_hidden = z.empty(z.S, z.D, z.R) if z.projection else None
        self.state0 = _contiguous(z.state0)
        barrier, steps = z.meeting(made)
        exchange = [z.exchange(made, 2, z.G * z.columns(z.H))]
        if z.projection:
            exchange.append(z.exchange(made, 1, z.columns(z.R)))
        given = []
        for name, t, shape in (
            ("dy", dy, z.shaped(z.D * z.R)),
            ("dh_n", dh_n, (z.D, z.N, z.R)),
            ("dc_n", dc_n, (z.D, z.N, z.H)),
        ):
            if t is not None:
                z.check_like(t, shape, name)
                t = t.contiguous()
            given.append(t)
        cuda.kernels.backward(
            [self._transposed(w[1]) for w in z.weights],
            [_operand(w[-1].t(), z.columns(z.R)) for w in z.weights] if z.projection else [],
            self.state0,
            z.sizes,
            steps,
            self.gates,
            self.cells if z.memory != "none" else None,
            None if given[0] is None else given[0].view(z.S, z.D * z.R),
            given[1],
            given[2] if z.memory == "cell" else None,
            self.d_gates,
            self.hidden,
            self.d_hidden,
            self.dh0 if self.mask[1] else None,
            self.dc0 if self.mask[2] else None,
            z.empty(z.D, z.N, z.H, dtype=z.compute),
            exchange,
            barrier,
            z.R,
            z.cell,
            made.packed,
        )

    def _transposed(self, w_hh):
        """w_hh (G * H, R) as (R, G * columns): what a unit's gradient is a product of."""
        z = self.z
        columns = z.columns(z.H)
        turned = w_hh.new_zeros(z.R, z.G, columns)
        turned[:, :, : z.H] = w_hh.view(z.G, z.H, z.R).permute(2, 0, 1)
        return turned.view(z.R, z.G * columns)

    def _input_part(self, d):
        """Gradients of the input's sums, (S, G * H), in the order of input_gates."""
        z = self.z
        return self.d_gates.view(z.S, z.D, z.sums * z.H)[:, d, : z.G * z.H]

    def _hidden_part(self, d):
        z = self.z
        return self.d_gates.view(z.S, z.D, z.sums * z.H)[:, d, (z.sums - z.G) * z.H :]

    def _input_gradient(self):
        z = self.z
        if not self.mask[0]:
            return z.empty(0)
        dx = None
        for d, w in enumerate(z.weights):
            part = _product(self._input_part(d), self._gates_in(w[0], z.input_gates))
            dx = part if dx is None else dx.add_(part)
        return dx.to(z.x.dtype).view(z.x.shape)

    def _gates_in(self, w, order):
        """w's gates, (G * H, ...), in another order."""
        if order == sorted(order):
            return w
        return w.unflatten(0, (self.z.G, self.z.H))[order].flatten(0, 1)

    def _weight_gradients(self, d):
        z = self.z
        each = len(z.weights[d])
        mask = self.mask[3 + d * each : 3 + (d + 1) * each]
        back_in = [
            sorted(range(z.G), key=order.__getitem__) for order in (z.input_gates, z.hidden_gates)
        ]
        sums = None
        grads = []
        for i, want in enumerate(mask):
            if not want:
                grads.append(z.empty(0))
                continue
            if z.projection and i == each - 1:
                grad = _product(self.d_hidden[:, d].t(), self.hidden[:, d])
            elif i == 0:
                grad = self._gates_in(_product(self._input_part(d).t(), z.rows), back_in[0])
            elif i == 1:
                grad = self._gates_in(self._recurrent_gradient(d), back_in[1])
            else:
                if sums is None:
                    sums = self.d_gates[:, d].sum(0, dtype=z.compute)  # (sums, H)
                part = sums[: z.G] if i == 2 else sums[z.sums - z.G :]
                grad = self._gates_in(part.flatten(), back_in[i - 2]).clone()
            grads.append(grad.to(z.x.dtype))
        return grads

    def _recurrent_gradient(self, d):
        """Gradient of w_hh (G * H, R): every step's, times what h was before it."""
        z = self.z
        grad, y = self._hidden_part(d), self.y.view(z.S, z.D, z.R)[:, d]
        h0 = self.state0[0][d] if z.state0 else None
        if z.batch_sizes is not None:
            start = y.new_zeros(z.N, z.R) if h0 is None else h0
            before = torch.cat((y, start))[self._rows_before(d)]
            return _product(grad.t(), before)
        if h0 is None:
            if z.T == 1:
                return grad.new_zeros(z.G * z.H, z.R)
            later, earlier = (grad[z.N :], y[: -z.N]) if d == 0 else (grad[: -z.N], y[z.N :])
            return _product(later.t(), earlier)
        before = torch.cat((h0, y[: -z.N]) if d == 0 else (y[z.N :], h0))
        return _product(grad.t(), before)

    def _rows_before(self, d):
        """Where each row of packed data had its h before: in y (S, R), or from S on in h0."""
        z = self.z
        sizes = z.batch_sizes
        offsets = torch.zeros(z.T + 1, dtype=torch.int64)
        offsets[1:] = sizes.cumsum(0)
        step = torch.arange(z.T).repeat_interleave(sizes)
        row = torch.arange(z.S) - offsets[step]
        other = step - 1 if d == 0 else step + 1
        inside = (other >= 0) & (other < z.T)
        other = other.clamp(0, z.T - 1)
        inside &= row < sizes[other]
        return torch.where(inside, offsets[other] + row, z.S + row).to(z.x.device)
