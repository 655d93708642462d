"""The recurrent layer on a CUDA device: `lstm_fused::recurrent_forward` and `recurrent_backward`.

What does not recur is a single product each, by torch's cuBLAS: x.W_ih of all steps before the
kernels run, and the gradients of x and of the weights after them. The recurrence is ours, forward
as a whole and the walk back through time (csrc/cuda/ops.cu).

Shapes: T steps, N rows, I inputs, H hidden units, R recurrent width (the projection's size, or H),
D directions, S rows of packed data, G gates, and as many sums as csrc/cells/cells.h says.
"""

from contextlib import nullcontext

import torch

from lstm_fused import _plan, cuda, models


def _check(fits, message):
    if not fits:
        raise RuntimeError(message)


def _undisturbed(x, run):
    """run(tf32) without autograd or autocast; tf32: whether products of float32 may be TF32."""
    tf32 = x.dtype is torch.float32 and cuda.tf32_allowed()
    autocast = torch.is_autocast_enabled(x.device.type)
    if not autocast and not torch.is_grad_enabled():
        return run(tf32)
    no_autocast = torch.autocast(x.device.type, enabled=False) if autocast else nullcontext()
    with torch.no_grad(), no_autocast:
        return run(tf32)


def _compute(x):
    """The dtype of sums, gates and products of a layer of x's dtype."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _without_padding(batch_sizes):
    """batch_sizes of the steps that have rows, and how many rows of x follow: csrc/layer.h."""
    if batch_sizes is None or batch_sizes.numel() == 0 or batch_sizes.flatten()[-1] >= 0:
        return batch_sizes, 0
    return batch_sizes[:-1][batch_sizes[:-1] > 0], -int(batch_sizes[-1])


def _padded(t, padding):
    """Packed t with zeros behind it; an empty tensor stands for none."""
    return torch.cat((t, t.new_zeros(padding, *t.shape[1:]))) if t.dim() > 1 else t


def forward(x, batch_sizes, state0, weights, cell, directions, training):
    """lstm_fused::recurrent_forward; gates (S, D, sums, H) and cells (S, D, H) are saved."""
    if models.several(weights):
        return models.each(forward, x, batch_sizes, state0, weights, cell, directions, training)
    sizes, padding = _without_padding(batch_sizes)
    if padding:
        found = forward(x[:-padding], sizes, state0, weights, cell, directions, training)
        y, h_n, c_n, gates, cells = found
        return _padded(y, padding), h_n, c_n, _padded(gates, padding), _padded(cells, padding)

    def run(tf32):
        return cuda.kernels.forward.default(
            x, batch_sizes, state0, weights, cell, directions, training, tf32, cuda.forced_kind()
        )

    return _undisturbed(x, run)


def backward(
    x, batch_sizes, state0, weights, y, gates, cells, dy, dh_n, dc_n, cell, directions, mask
):
    """lstm_fused::recurrent_backward; a gradient that mask does not ask for is empty."""
    _check(
        len(mask) == 4 + len(weights),
        "mask must have one entry each for x, h0, c0, every weight and the pre-activations",
    )
    if models.several(weights):
        tensors = (state0, weights, y, gates, cells, dy, dh_n, dc_n)
        return models.each(backward, x, batch_sizes, *tensors, cell, directions, mask)
    sizes, padding = _without_padding(batch_sizes)
    if padding:
        y, gates, cells, dy = (
            t[:-padding] if t is not None and t.dim() > 1 else t for t in (y, gates, cells, dy)
        )
        found = backward(
            *(x[:-padding], sizes, state0, weights, y, gates, cells, dy, dh_n, dc_n),
            *(cell, directions, mask),
        )
        dx, dh0, dc0, dweights, d_preacts = found
        return _padded(dx, padding), dh0, dc0, dweights, _padded(d_preacts, padding)
    _check(y is not None, "y is needed: the gradient of w_hh reads it")

    def run(tf32):
        one = _Backward(x, batch_sizes, state0, weights, y, cell, directions, mask, tf32)
        return one.gradients(gates, cells, dy, dh_n, dc_n)

    return _undisturbed(x, run)


class _Backward:
    """One backward pass: the walk back through time, then the gradients of x and the weights."""

    def __init__(self, x, batch_sizes, state0, weights, y, cell, directions, mask, tf32):
        self.x, self.batch_sizes, self.y, self.mask, self.tf32 = x, batch_sizes, y, mask, tf32
        self.cell, self.D = cell, directions
        self.state0, self.given = list(state0), list(weights)
        self.G, self.sums, self.input_gates, self.hidden_gates = (
            cuda.CELLS[cell][key] for key in ("gates", "sums", "input_gates", "hidden_gates")
        )
        each = len(self.given) // self.D
        self.weights = [self.given[d * each : (d + 1) * each] for d in range(self.D)]
        self.projection = each % 2 == 1
        w_hh = self.given[1]
        self.H, self.R = w_hh.shape[0] // self.G, w_hh.shape[1]
        self.T = len(x) if batch_sizes is None else len(batch_sizes)
        self.N = x.shape[1] if batch_sizes is None else int(batch_sizes[0])
        self.S = self.T * self.N if batch_sizes is None else len(x)
        _check(
            y.shape == (*x.shape[:-1], self.D * self.R) and y.dtype is x.dtype,
            f"y has shape {tuple(y.shape)} and {y.dtype}, which is not what forward gave",
        )

    def gradients(self, gates, cells, dy, dh_n, dc_n):
        if self.N == 0:
            return self._nothing()
        self.d_gates, dh0, dc0, self.hidden, self.d_hidden, self.before = cuda.kernels.backward(
            self.x,
            self.batch_sizes,
            self.state0,
            self.given,
            [self._turned(w[1], self.G) for w in self.weights],
            [self._turned(w[-1], 1) for w in self.weights] if self.projection else [],
            self.y,
            gates,
            cells,
            dy,
            dh_n,
            dc_n,
            self.cell,
            self.D,
            self.mask[1],
            self.mask[2],
            self.tf32,
            cuda.forced_kind(),
        )
        dweights = [self._weight_gradients(d) for d in range(self.D)]
        dweights = [g for each in dweights for g in each]
        d_preacts = self.d_gates if self.mask[-1] else self.x.new_empty(0)
        return self._input_gradient(), dh0, dc0, dweights, d_preacts.to(_compute(self.x))

    def _product(self, a, b):
        """a (n, k) b (k, m), accumulated and given in the compute dtype."""
        return cuda.kernels.product(a, b, self.tf32)

    def _nothing(self):
        def wanted(want, *shape):
            return self.x.new_zeros(*shape) if want else self.x.new_empty(0)

        dx, dh0, dc0 = self.mask[:3]
        return (
            wanted(dx, *self.x.shape),
            wanted(dh0, self.D, 0, self.R),
            wanted(dc0, self.D, 0, self.H),
            [wanted(m, *w.shape) for w, m in zip(self.given, self.mask[3:-1], strict=True)],
            wanted(self.mask[-1], 0, self.D, self.sums, self.H).to(_compute(self.x)),
        )

    def _turned(self, w, gates):
        """w (gates * n, m) as (m, gates * n), n padded with zeros to whole products."""
        n, m = w.shape[0] // gates, w.shape[1]
        dtype = str(w.dtype).removeprefix("torch.")
        padded = _plan.cuda_row_bytes(dtype, n) // w.element_size()
        turned = w.new_empty(m, gates, padded) if n == padded else w.new_zeros(m, gates, padded)
        turned[:, :, :n] = w.reshape(gates, n, m).permute(2, 0, 1)
        return turned.view(m, gates * padded)

    def _input_part(self, d):
        """Gradients of the input's sums, (S, G * H), in the order of input_gates."""
        return self.d_gates.view(self.S, self.D, self.sums * self.H)[:, d, : self.G * self.H]

    def _hidden_part(self, d):
        return self.d_gates.view(self.S, self.D, self.sums * self.H)[
            :, d, (self.sums - self.G) * self.H :
        ]

    def _input_gradient(self):
        if not self.mask[0]:
            return self.x.new_empty(0)
        dx = None
        for d, w in enumerate(self.weights):
            part = self._product(self._input_part(d), self._gates_in(w[0], self.input_gates))
            dx = part if dx is None else dx.add_(part)
        return dx.to(self.x.dtype).view(self.x.shape)

    def _gates_in(self, w, order):
        """w's gates, (G * H, ...), in another order."""
        if order == sorted(order):
            return w
        return torch.cat([w[g * self.H : (g + 1) * self.H] for g in order])

    def _weight_gradients(self, d):
        each = len(self.weights[d])
        mask = self.mask[3 + d * each : 3 + (d + 1) * each]
        back_in = [
            sorted(range(self.G), key=order.__getitem__)
            for order in (self.input_gates, self.hidden_gates)
        ]
        sums = None
        grads = []
        for i, want in enumerate(mask):
            if not want:
                grads.append(self.x.new_empty(0))
                continue
            if self.projection and i == each - 1:
                grad = self._product(self.d_hidden[:, d].t(), self.hidden[:, d])
            elif i == 0:
                grad = self._gates_in(
                    self._product(self._input_part(d).t(), self.x.reshape(self.S, -1)), back_in[0]
                )
            elif i == 1:
                grad = self._gates_in(self._recurrent_gradient(d), back_in[1])
            else:
                if sums is None:
                    sums = self.d_gates[:, d].sum(0, dtype=_compute(self.x))  # (sums, H)
                part = sums[: self.G] if i == 2 else sums[self.sums - self.G :]
                grad = self._gates_in(part.flatten(), back_in[i - 2]).clone()
            grads.append(grad.to(self.x.dtype))
        return grads

    def _recurrent_gradient(self, d):
        """Gradient of w_hh (G * H, R): every step's, times what h was before it."""
        grad, y = self._hidden_part(d), self.y.view(self.S, self.D, self.R)[:, d]
        h0 = self.state0[0][d] if self.state0 else None
        if self.batch_sizes is not None:
            return self._product(grad.t(), self.before[:, d])
        if h0 is None:
            if self.T == 1:
                return grad.new_zeros(self.G * self.H, self.R)
            later, earlier = (
                (grad[self.N :], y[: -self.N]) if d == 0 else (grad[: -self.N], y[self.N :])
            )
            return self._product(later.t(), earlier)
        before = torch.cat((h0, y[: -self.N]) if d == 0 else (y[self.N :], h0))
        return self._product(grad.t(), before)
