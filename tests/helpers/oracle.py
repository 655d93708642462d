"""One problem computed by lstm_fused, by torch.nn in its dtype and by the reference in float64.

The reference is driven from here, layer by layer, so that nothing of lstm_fused.nn is taken for
granted. It sees features and hidden units in reverse order: its sums then round differently from
torch.nn's, whose own error would otherwise come out as zero in float64.

The largest of four numbers is a matter of luck, so that small problems are drawn several times and
all their draws are compared together.

Sizes are T, N, I, H; R is proj or else H, D directions, L layers, S rows of packed data.
"""

import zlib
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch.nn.utils.rnn import pack_padded_sequence

import lstm_fused
from lstm_fused import reference, reference_steps, runtime
from lstm_fused.testing import tolerance
from tests.helpers import described

# {name of the operator's cell: (module of torch.nn and of lstm_fused, further arguments)}.
CELLS = {
    "lstm": ("LSTM", {}),
    "gru": ("GRU", {}),
    "rnn_tanh": ("RNN", {}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
}
# With those that torch.nn does not have: there, torch.nn's part is that of the reference in the
# problem's own dtype.
EVERY_CELL = (*CELLS, *described.CELLS)
ELEMENTS_JUDGED = 64
MAX_DRAWS = 16


def has_cell_state(cell):
    """Whether the cell has a state c besides h."""
    return reference_steps.CELLS[cell].cells > 0


def may_project(cell):
    """Whether there are projections of the cell's h."""
    return described.CELLS[cell].projects if cell in described.CELLS else has_cell_state(cell)


def module_of(cell, library, *sizes, **options):
    """A module of torch.nn or lstm_fused, or of a cell without one the layers by the reference or
    by ops.layer, with the same arguments; sizes: I, H."""
    if cell in described.CELLS:
        by_reference = library is torch.nn
        return described.Layers(cell, *sizes, **options, by_reference=by_reference)
    name, more = CELLS[cell]
    return getattr(library, name)(*sizes, **options | more)


@dataclass(frozen=True)
class Problem:
    """A module, its input and the gradients of its outputs; the same fields, the same numbers."""

    T: int
    N: int
    I: int  # noqa: E741
    H: int
    dtype: torch.dtype = torch.float32
    layers: int = 1
    directions: int = 1
    bias: bool = True
    proj: int = 0
    batch_first: bool = False
    form: str = "dense"  # or "sorted", "unsorted": packed, or "single": 2-D, of one row
    hx: bool = False
    device: str = "cpu"
    cell: str = "lstm"

    def __str__(self):
        words = [self.cell] if self.cell != "lstm" else []
        words += [
            str(self.dtype).removeprefix("torch."),
            f"T{self.T}-N{self.N}-I{self.I}-H{self.H}",
        ]
        words += [f"L{self.layers}"] if self.layers > 1 else []
        words += ["both"] if self.directions == 2 else []
        words += [] if self.bias else ["nobias"]
        words += [f"proj{self.proj}"] if self.proj else []
        words += ["batch_first"] if self.batch_first else []
        words += [self.form] if self.form != "dense" else []
        words += ["hx"] if self.hx else []
        words += [self.device] if self.device != "cpu" else []
        return "-".join(words)

    @property
    def packed(self):
        return self.form in ("sorted", "unsorted")

    @property
    def draws(self):
        smallest = min(self.H, self.T * self.N * self.I, self.directions * self.N * self.R)
        return min(MAX_DRAWS, -(-ELEMENTS_JUDGED // smallest))

    @property
    def R(self):
        return self.proj or self.H

    @property
    def states(self):
        """Widths of the states."""
        return described.widths_of(self.cell, self.H, self.R)

    def module(self, library=torch.nn):
        more = {"proj_size": self.proj} if self.proj else {}
        return module_of(
            self.cell,
            library,
            self.I,
            self.H,
            num_layers=self.layers,
            bidirectional=self.directions == 2,
            bias=self.bias,
            batch_first=self.batch_first,
            dtype=self.dtype,
            device=self.device,
            **more,
        )


@dataclass
class Values:
    """What goes into a problem: x (T, N, I), state (h0 (L*D, N, R)[, c0 (L*D, N, H)]) or ().

    lengths: (N,) or None. weights: by name. cotangents: of y, laid out as y is, of h_n[ and c_n].
    """

    x: torch.Tensor
    lengths: torch.Tensor | None
    state: tuple
    weights: dict
    cotangents: list = field(default_factory=list)


@dataclass
class Outcome:
    """Outputs, states and gradients by name; what ran (ours only); the arguments of relu
    (reference only), for each layer those of each step in the order of the steps; see errors_of."""

    tensors: dict
    forward_run: dict = field(default_factory=dict)
    backward_run: dict = field(default_factory=dict)
    preacts: list = field(default_factory=list)
    errors: dict = field(default_factory=dict)


def on_default_device(problem):
    """The problem on torch's default device, which conftest's `device` fixture sets."""
    return replace(problem, device=torch.get_default_device().type)


@lru_cache(maxsize=MAX_DRAWS)
def values_of(problem, draw=0):
    """Drawn on the CPU, then in the problem's dtype: uniform weights, the rest normal.

    Weights are as large as nn.LSTM draws them, or smaller where there are many columns: gates at
    their ends tell little of errors.
    """
    p = problem
    generator = torch.Generator("cpu").manual_seed(zlib.crc32(f"{p} {draw}".encode()))
    drawn = {"generator": generator, "device": "cpu"}  # whatever the default device is

    def normal(*shape):
        return torch.randn(*shape, **drawn).to(p.device, p.dtype)

    weights = {}
    for name, w in p.module().named_parameters():
        uniform = torch.rand(w.shape, **drawn) * 2 - 1
        weights[name] = (uniform * max(p.H, w.shape[-1] if w.dim() == 2 else 1) ** -0.5).to(
            p.device, p.dtype
        )
    lengths = None
    if p.packed:
        lengths = torch.randint(1, p.T + 1, (p.N,), **drawn)
        lengths[int(torch.randint(p.N, (), **drawn))] = p.T
        if p.form == "sorted":
            lengths = lengths.sort(descending=True).values
    states = p.layers * p.directions
    state = tuple(normal(states, p.N, width) for width in p.states) if p.hx else ()
    state = described.proper_state(p.cell, state)
    rows = (int(lengths.sum()),) if p.packed else (p.T, p.N)
    cotangents = [
        normal(*rows, p.directions * p.R),
        *(normal(states, p.N, width) for width in p.states),
    ]
    cotangents = described.proper_cotangents(p.cell, cotangents, p.dtype)
    return Values(normal(p.T, p.N, p.I), lengths, state, weights, cotangents)


def shaped(problem, x, lengths):
    """x (T, N, I) in the form that the problem's module takes."""
    if problem.packed:
        return pack_padded_sequence(x, lengths, enforce_sorted=problem.form == "sorted")
    if problem.form == "single":
        return x.squeeze(1)
    return x.transpose(0, 1) if problem.batch_first else x


def rows_of(problem, y):
    """What such a module returns, as (T, N, D*R) or packed (S, D*R)."""
    if problem.packed:
        return y.data
    if problem.form == "single":
        return y.unsqueeze(1)
    return y.transpose(0, 1) if problem.batch_first else y


def run_module(problem, library, draw=0, gradients=True):
    """Outcome of the problem by the module of torch.nn or lstm_fused; no backward pass without
    gradients."""
    p, values = problem, values_of(problem, draw)
    module = p.module(library).requires_grad_(gradients)
    module.load_state_dict(values.weights)
    x = values.x.clone().requires_grad_(gradients)
    state = tuple(s.clone().requires_grad_(gradients) for s in values.state)
    given_state = state
    if p.form == "single":
        given_state = tuple(s.squeeze(1) for s in state)
    if not has_cell_state(p.cell):
        given_state = given_state and given_state[0]
    y, ends = module(shaped(p, x, values.lengths), given_state if p.hx else None)
    ends = ends if has_cell_state(p.cell) else (ends,)
    forward_run = runtime.last_run(p.device)
    y = rows_of(p, y)
    if p.form == "single":
        ends = tuple(end.unsqueeze(1) for end in ends)
    if not gradients:
        return Outcome(named(y, ends, {}), forward_run)
    torch.autograd.backward([y, *ends], values.cotangents)
    leaves = {"x": x, **dict(module.named_parameters()), **initial(state)}
    return Outcome(named(y, ends, leaves), forward_run, runtime.last_run(p.device))


def initial(state):
    return dict(zip(("h0", "c0"), state, strict=False))


def signs_of(problem, library, draw, y):
    """Where each layer's output is positive, (n, H) for each step in the order the steps run:
    the branches that relu took.

    One layer's are those of y. Several run one by one, as they do inside of the module, which must
    have given y; to the last bit for ours, while torch.nn's products depend on where a state
    happens to lie.
    """
    p, values = problem, values_of(problem, draw)
    given, signs = shaped(p, values.x, values.lengths), []
    if p.layers == 1:
        sizes = given.batch_sizes if p.packed else None
        return [list(in_order(y > 0, sizes, p.directions))]
    each = len(values.weights) // p.layers
    for k in range(p.layers):
        module = replace(p, layers=1, I=p.directions * p.H if k else p.I).module(library)
        weights = list(values.weights.values())[k * each : (k + 1) * each]
        module.load_state_dict(dict(zip(module.state_dict(), weights, strict=True)))
        state = None
        if p.hx:
            state = values.state[0][k * p.directions : (k + 1) * p.directions]
            state = state.squeeze(1) if p.form == "single" else state
        given, _ = module(given, state)
        sizes = given.batch_sizes if p.packed else None
        signs.append(list(in_order(rows_of(p, given).cpu() > 0, sizes, p.directions)))
    exactly = {"rtol": 0, "atol": 0} if library is lstm_fused else {}
    torch.testing.assert_close(rows_of(p, given).detach().cpu(), y, **exactly)
    return signs


def in_order(rows, batch_sizes, directions):
    """(n, H) of each step of rows (T, N, D*H) or packed (S, D*H), in the order the steps run."""
    steps = rows.unbind(0) if batch_sizes is None else rows.split(batch_sizes.tolist())
    for d in range(directions):
        for step in reversed(steps) if d else steps:
            yield step.chunk(directions, -1)[d]


class Relu:
    """relu as the reference calls it, once a step; keeps the pre-activations in that order.

    Its slope jumps at 0, so that a rounding error may decide it. With signs, of every step, it
    takes their branches in place of its own.
    """

    def __init__(self, signs=None):
        self.signs, self.preacts = signs and iter(signs), []

    def __call__(self, preacts):  # (n, H), units in reverse order
        self.preacts.append(preacts.detach().flip(-1))
        return torch.relu(preacts) if self.signs is None else preacts * next(self.signs).flip(-1)


def reversed_layer(cell, layer, x, batch_sizes, state0, weights, directions, **options):
    """layer, of the reference, with its features and hidden units in reverse order."""

    known = reference_steps.CELLS[cell]
    own = ["vectors"] * (known.vectors > 0) + ["masks"] * (known.masks > 0)
    shared = len(weights) // directions - len(own)  # of every cell
    names = ["w_ih", "w_hh", "b_ih", "b_hh"][: shared // 2 * 2] + ["w_hr"] * (shared % 2)

    def in_parts(t, parts):
        """t with each of so many parts of its last dimension in reverse order."""
        return t.unflatten(-1, (parts, -1)).flip(-1).flatten(-2)

    def reversed_weight(name, w):
        if name in ("w_hr", "vectors"):  # (R, H), (V, H)
            return w.flip(0, 1) if name == "w_hr" else w.flip(1)
        if name == "masks":  # (..., M * H)
            return in_parts(w, known.masks)
        w = in_parts(w.mT if w.dim() == 2 else w, known.gates)
        return w.mT.flip(1) if w.dim() == 2 else w

    weights = [
        reversed_weight(name, w)
        for name, w in zip((names + own) * directions, weights, strict=True)
    ]
    blocks = (1, known.cells)
    state0 = tuple(in_parts(s, k) for s, k in zip(state0, blocks, strict=False))
    y, states, *cells = layer(x.flip(-1), batch_sizes, state0, weights, directions, **options)
    states = tuple(in_parts(s, k) for s, k in zip(states, blocks, strict=False))
    return in_parts(y, directions), states, *(in_parts(c, directions * known.cells) for c in cells)


def run_reference(problem, draw=0, signs=None, dtype=torch.float64):
    """The problem in float64 by lstm_fused.reference, which shares nothing with the kernels.

    signs: for each layer, the branches that its relu takes, as signs_of gives them; or None. dtype:
    another one for a computation like torch.nn's part of a cell that torch.nn has not, but of other
    rounding errors.
    """

    def exact(t):
        return t.to("cpu", dtype, copy=True).requires_grad_()

    p, values = problem, values_of(problem, draw)
    x = exact(values.x)
    weights = {name: exact(w) for name, w in values.weights.items()}
    state = tuple(exact(s) for s in values.state)
    rows, sizes, order, back = x, None, None, None
    if p.packed:
        rows, sizes, order, back = pack_padded_sequence(x, values.lengths, enforce_sorted=False)
    each = len(weights) // p.layers
    flat = list(weights.values())
    ends, preacts = [], []
    for k in range(p.layers):
        layer = reference.CELLS[p.cell]
        if p.cell == "rnn_relu":
            relu = Relu(signs and signs[k])
            preacts.append(relu.preacts)
            layer = reference.rnn(relu)
        state0 = ()
        if state:
            part = slice(k * p.directions, (k + 1) * p.directions)
            state0 = tuple(s[part] if order is None else s[part][:, order] for s in state)
        part = flat[k * each : (k + 1) * each]
        part = described.whole(p.cell, part, p.directions, rows)
        rows, end = reversed_layer(p.cell, layer, rows, sizes, state0, part, p.directions)
        ends.append(tuple(s if back is None else s[:, back] for s in end))
    ends = tuple(torch.cat(s) for s in zip(*ends, strict=True))
    torch.autograd.backward([rows, *ends], [g.to("cpu", dtype) for g in values.cotangents])
    return Outcome(named(rows, ends, {"x": x, **weights, **initial(state)}), preacts=preacts)


def named(y, ends, leaves):
    outputs = {"y": y, **dict(zip(("h_n", "c_n"), ends, strict=False))}
    found = {k: v.detach() for k, v in outputs.items()}
    found |= {f"d_{name}": leaf.grad for name, leaf in leaves.items()}
    return {k: None if v is None else v.cpu() for k, v in found.items()}


def errors_of(problem, library, draw, tensors, exact):
    """Errors of the tensors that library computed for a draw; exact: the reference's Outcome.

    Gradients of relu are held to those of the branches that the library's forward pass took, and
    relu_preact is the pre-activation furthest from 0 whose branch is not the reference's.
    """
    truth, errors = exact.tensors, {}
    if problem.cell == "rnn_relu" and "d_x" in tensors:
        signs = signs_of(problem, library, draw, tensors["y"])
        along = run_reference(problem, draw, signs).tensors
        truth = {name: (along if name.startswith("d_") else truth)[name] for name in truth}
        for k, steps in enumerate(zip(exact.preacts, signs, strict=True)):
            flipped = [s[(s > 0) != taken].abs() for s, taken in zip(*steps, strict=True)]
            errors[f"relu_preact_l{k}"] = max(
                (s.max().item() for s in flipped if len(s)), default=0.0
            )
    return errors | {name: tolerance.error_of(t, truth[name]) for name, t in tensors.items()}


@lru_cache(maxsize=128)  # one ISA after another is judged by the same
def expected_outcomes(problem):
    """Outcomes of torch.nn and of the float64 reference, for each draw of a problem."""
    draws = range(problem.draws)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # torch's own threads are no gain at these sizes
    try:
        exact = [run_reference(problem, k) for k in draws]
        torchs = [run_module(problem, torch.nn, k) for k in draws]
        for k in draws:
            torchs[k].errors = errors_of(problem, torch.nn, k, torchs[k].tensors, exact[k])
            if described.is_sensitive(problem.cell):
                other = run_reference(problem, k, dtype=problem.dtype).tensors
                errors = errors_of(problem, torch.nn, k, other, exact[k])
                torchs[k].errors = {n: max(e, errors[n]) for n, e in torchs[k].errors.items()}
        return torchs, exact
    finally:
        torch.set_num_threads(threads)


def violations(found, problem):
    """A line for each tensor whose error exceeds its tolerance; found: a dict for each draw."""
    torchs, exact = expected_outcomes(problem)
    ours = [errors_of(problem, lstm_fused, k, t, exact[k]) for k, t in enumerate(found)]
    lines = []
    for name in ours[0]:
        if wrong := {t[name].dtype for t in found if t.get(name) is not None} - {problem.dtype}:
            lines.append(f"{name} is {wrong}")
        if is_undecided(name, problem):
            continue
        error, torch_error = (max(e[name] for e in es) for es in (ours, [t.errors for t in torchs]))
        limit = tolerance.allowed(name, problem.dtype, torch_error, largest(name, exact))
        if not error <= limit:
            lines.append(f"{name}: off by {error:.2e} > {limit:.2e}, torch by {torch_error:.2e}")
    return lines


def is_undecided(name, problem):
    """Whether rounding errors may decide this gradient: a slope jumps, and whose branches were
    taken is known of relu in torch.nn's cells alone. At a clip's bound that takes the large ones of
    16 bits: nothing is drawn to it, as units of a relu are to 0."""
    kinked = problem.cell in described.KINKED and problem.dtype is not torch.float64
    clipped = problem.cell in described.CLIPPED and problem.dtype.itemsize == 2
    return (kinked or clipped) and name.startswith("d_")


def largest(name, exact):
    """The largest absolute value of a tensor, or of a layer's pre-activations, in the Outcomes."""
    layer = name.removeprefix("relu_preact_l")
    given = [e.preacts[int(layer)] if layer != name else [e.tensors[name]] for e in exact]
    return max(t.abs().max().item() if t.numel() else 0.0 for ts in given for t in ts)


def check(problem):
    """Run the problem by lstm_fused with and without gradients; returns the Outcome with them.

    Fails naming every tensor that is off.
    """
    plain, full = (
        [run_module(problem, lstm_fused, k, gradients) for k in range(problem.draws)]
        for gradients in (False, True)
    )
    assert full[0].tensors.keys() == expected_outcomes(problem)[1][0].tensors.keys()
    lines = [
        f"without gradients {line}" for line in violations([r.tensors for r in plain], problem)
    ]
    lines += violations([r.tensors for r in full], problem)
    assert not lines, "\n".join([str(problem), *lines])
    assert plain[-1].forward_run["pass"] == "forward"
    return full[-1]
