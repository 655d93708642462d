"""What CompiledLayer.check compares: a user's cell in the kernels, in torch, and by differences."""

import torch

from lstm_fused import ops, reference, runtime, traces
from lstm_fused.testing.tolerance import allowed, error_of

# T, N, I, H, directions; the first two run by the kernel for few rows.
_SIZES = ((1, 1, 5, 19, 1), (1, 2, 16, 32, 2), (7, 5, 5, 19, 2), (3, 9, 4, 48, 1))


def check(layer, step=None, operand=None):
    """Lines that say what was compared; see CompiledLayer.check."""
    lines = [] if step is None else [_check_step(layer.trace, step)]
    if operand is not None:
        lines.append(_check_operand(layer.trace, operand))
    active = torch.ops.lstm_fused.active_isa()
    isas = [isa for isa in runtime.available_isas() if not isa.endswith(("_vnni", "_bf16"))]
    try:
        for isa in isas:
            runtime.set_isa(isa)
            for dtype in (torch.float64, torch.float32):
                for sizes in _SIZES:
                    _check_kernels(layer, dtype, sizes, isa)
            lines.append(f"{isa}: outputs and gradients of {len(_SIZES)} layers in two dtypes")
    finally:
        runtime.set_isa(active)
    lines.append(_check_derivatives(layer))
    return lines


def _drawn(layer, dtype, T, N, I, H, directions):  # noqa: E741
    """x, the initial states and the weights of an operator call, in float64 rounded to dtype."""
    trace = layer.trace
    bound, R = H**-0.5, H if layer.has_hidden_weight else 0

    def uniform(*shape):
        return torch.empty(shape, dtype=torch.float64).uniform_(-bound, bound)

    weights = []
    for _ in range(directions):
        weights += [uniform(trace.gates * H, I), uniform(trace.gates * H, R)]
        weights += [uniform(trace.gates * H), uniform(trace.gates * H)]
        weights += [uniform(trace.vectors, H)] if trace.vectors else []
        if trace.groups:
            weights[-1][-1] = 1e-5  # epsilon
        if trace.masks:
            weights.append(torch.rand(T, N, trace.masks * H, dtype=torch.float64))
    x = torch.randn(T, N, I, dtype=torch.float64)
    # States that the cell reaches: some have a domain, such as the normalizer of sLSTM.
    _, state = reference.CELLS[layer.cell](x.flip(0), None, (), weights, directions)
    tensors = [t.detach().to(dtype).to(torch.float64) for t in (x, *state, *weights)]
    return tensors[0], tensors[1 : 1 + len(state)], tensors[1 + len(state) :]


def _results(run, x, state, weights, directions, dtype):
    """y, the final states and the gradients of a sum of all, by name."""
    leaves = [t.detach().clone().to(dtype).requires_grad_() for t in (x, *state, *weights)]
    masks = {id(t) for t in leaves[1 + len(state) :] if t.dim() == 3}
    given = [t.detach() if id(t) in masks else t for t in leaves]
    count = 1 + len(state)
    y, ends = run(given[0], None, given[1:count], given[count:], directions)
    generator = torch.Generator().manual_seed(1)
    outputs = [y, *ends]
    total = 0
    for t in outputs:
        factor = torch.randn(t.shape, generator=generator, dtype=torch.float64).to(dtype)
        total = total + (t * factor).sum()
    wanted = [t for t in leaves if id(t) not in masks]
    gradients = torch.autograd.grad(total, wanted, allow_unused=True)
    names = ["y", "h_n", "c_n"][: len(outputs)]
    names += ["d_x", "d_h0", "d_c0"][:count]
    names += [f"d_weight_{k}" for k in range(len(wanted) - count)]
    found = [*outputs, *(torch.zeros(()) if g is None else g for g in gradients)]
    return {n: t.detach().double() for n, t in zip(names, found, strict=True)}


def _check_kernels(layer, dtype, sizes, isa):
    torch.manual_seed(0)
    directions = sizes[-1]
    x, state, weights = _drawn(layer, dtype, *sizes)

    def kernels(x, batch_sizes, state, weights, directions):
        return ops.layer(x, batch_sizes, state, weights, layer.cell, directions)

    naive = reference.CELLS[layer.cell]
    exact = _results(naive, x, state, weights, directions, torch.float64)
    peer = _results(naive, x, state, weights, directions, dtype)
    found = _results(kernels, x, state, weights, directions, dtype)
    ran = runtime.last_run()
    assert ran and ran["isa"] == isa, f"the kernels of {isa} did not run: {ran}"
    for name, right in exact.items():
        if right.dim() == 0 or right.numel() == 0:
            continue  # a weight that nothing depends on, or without a column
        error, largest = error_of(found[name], right), right.abs().max().item()
        limit = allowed(name, dtype, error_of(peer[name], right), largest)
        assert error <= limit, (
            f"{layer.__name__}, {isa}, {dtype}, (T, N, I, H, D) {sizes}: {name} is off by "
            f"{error:.3g}, at most {limit:.3g} is allowed"
        )


def _check_derivatives(layer):
    torch.manual_seed(0)
    x, state, weights = _drawn(layer, torch.float64, 2, 2, 3, 3, 1)
    fixed = [w.dim() == 3 for w in weights]
    if layer.trace.groups or _bounds_are_vectors(layer.trace):
        fixed[4] = True  # epsilon and the bound of a clip have no gradient
    leaves = [x, *state, *weights]
    for t, is_fixed in zip(leaves, [False] * (1 + len(state)) + fixed, strict=True):
        t.requires_grad_(not is_fixed)

    def run(x, *given):
        y, ends = ops.layer(x, None, given[: len(state)], given[len(state) :], layer.cell, 1)
        return (y, *ends)

    torch.autograd.gradcheck(run, leaves)
    torch.autograd.gradgradcheck(run, leaves)
    return "gradcheck and gradgradcheck"


def _bounds_are_vectors(trace):
    vectors = range(trace.preacts, trace.preacts + trace.vectors)
    clips = [step for step in trace.steps if traces.is_clip(step)]
    return any(step.operands[1] in vectors for step in clips)


def _check_operand(trace, operand):
    assert trace.operand, "the cell has no operand"

    def step(preact, vector, mask, prev):
        return operand(preact, vector, mask, prev), list(prev[: trace.cells])

    return _check_step(trace.operand, step, "operand")


def _check_step(trace, step, name="step"):
    """The cell's values and gradients in torch against those of the user's function."""
    torch.manual_seed(0)
    n, H = 64, 8
    shapes = [(n, H)] * trace.preacts + [(H,)] * trace.vectors + [(n, H)] * trace.masks
    shapes += [(n, H)] * trace.states
    inputs = [torch.randn(shape, dtype=torch.float64).abs() for shape in shapes]
    for k in range(trace.preacts):
        inputs[k] = torch.randn(n, H, dtype=torch.float64)
    if trace.groups:
        inputs[trace.preacts + trace.vectors - 1] = torch.full((H,), 1e-5, dtype=torch.float64)
    for t in inputs:
        t.requires_grad_()
    ends = [trace.preacts, trace.vectors, trace.masks, trace.states]
    h, states = traces.run(trace, inputs)
    groups = [list(part) for part in _split(inputs, ends)]
    h_step, states_step = step(*groups)
    ours, theirs = [h, *states[: trace.cells]], [h_step, *states_step]
    assert len(ours) == len(theirs), f"step gives {len(theirs) - 1} states, not {trace.cells}"
    for part, a, b in zip(["h", *range(trace.cells)], ours, theirs, strict=True):
        torch.testing.assert_close(b, a, msg=lambda m, part=part: f"{name}'s {part}: {m}")
    pairs = [_gradients(found, inputs) for found in (ours, theirs)]
    for k, (a, b) in enumerate(zip(*pairs, strict=True)):
        torch.testing.assert_close(b, a, msg=lambda m, k=k: f"{name}'s gradient of input {k}: {m}")
    return f"the values and gradients of {name}"


def _split(inputs, counts):
    for count in counts:
        yield inputs[:count]
        inputs = inputs[count:]


def _gradients(outputs, inputs):
    total = sum((k + 1) * t.sum() for k, t in enumerate(outputs))
    found = torch.autograd.grad(total, inputs, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, inputs, strict=True)]
