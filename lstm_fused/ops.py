"""One recurrent layer as a differentiable function, and what can be asked about the kernels.

`layer` calls the operator `lstm_fused::recurrent_forward` directly when nothing needs a gradient,
and through an autograd.Function otherwise. Shapes: T steps, N rows, I inputs, H hidden units, R
recurrent width (the projection's size, or H), D directions, S rows of packed data.
"""

from functools import partial

import torch
from torch.library import register_fake, register_vmap
from torch.utils._pytree import tree_map

from lstm_fused import (
    _C,  # noqa: F401  loads the operators
    _plan,
    cuda,
    reference,
)

CELL_IDS = {name: number for name, (number, _) in _plan.cells().items()}
_GATES = {number: gates for number, gates in _plan.cells().values()}
_BLOCK = 16  # units to a block of the gates saved on the CPU, csrc/params.h

cuda.load()

_forward_op = torch.ops.lstm_fused.recurrent_forward.default
_backward_op = torch.ops.lstm_fused.recurrent_backward.default


def layer(x, batch_sizes, state0, weights, cell="lstm", directions=1):
    """Run one layer of a recurrent network in one or two directions.

    Args:
        x: (T, N, I), any strides; or the data of a PackedSequence, (S, I).
        batch_sizes: None, or the PackedSequence's (T,), int64 on the CPU, never growing.
        state0: () for zeros, or (h0 (D, N, R), c0 (D, N, H)).
        weights: for each direction w_ih (4H, I), w_hh (4H, R), then b_ih (4H,) and b_hh (4H,) if
            there are biases, then w_hr (R, H) if there is a projection; flat, as a sequence.
        cell: "lstm".
        directions: 1, or 2 for a second one that walks from the last step to the first.

    Returns:
        y (T, N, D * R) or (S, D * R), and the final states (h_n (D, N, R), c_n (D, N, H)).

    Everything is of one dtype, float32, float64, bfloat16 or float16, and on the CPU or one CUDA
    device. Gradients of any order are given. Raises RuntimeError on shapes, dtypes or devices that
    do not fit.
    """
    cell_id = CELL_IDS[cell]
    if torch.is_grad_enabled() and (
        x.requires_grad
        or any(w.requires_grad for w in weights)
        or any(s.requires_grad for s in state0)
    ):
        y, h_n, c_n, _, _ = _Layer.apply(
            cell, directions, len(state0), x, batch_sizes, *state0, *weights
        )
    else:
        y, h_n, c_n, _, _ = _forward_op(x, batch_sizes, state0, weights, cell_id, directions, False)
    return y, (h_n, c_n)


class _Layer(torch.autograd.Function):
    """The fused forward pass; its backward is _LayerBackward, which can be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(cell, directions, n_state, x, batch_sizes, *tensors):
        return _forward_op(
            x,
            batch_sizes,
            tensors[:n_state],
            tensors[n_state:],
            CELL_IDS[cell],
            directions,
            True,
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        cell, directions, n_state, x, batch_sizes, *tensors = inputs
        y, _, _, gates, cells = output
        ctx.cell, ctx.directions, ctx.n_state = cell, directions, n_state
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(gates, cells)
        ctx.save_for_backward(x, batch_sizes, y, gates, cells, *tensors)

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n, _gates, _cells):
        x, batch_sizes, y, gates, cells, *tensors = ctx.saved_tensors
        if dy is None and dh_n is None and dc_n is None:
            return (None,) * len(ctx.needs_input_grad)
        needs = ctx.needs_input_grad[3:4] + ctx.needs_input_grad[5:]
        run = _LayerBackward.apply if torch.is_grad_enabled() else _LayerBackward.forward
        if not torch.compiler.is_compiling() and any(map(_is_batched_grad, (dy, dh_n, dc_n))):
            run = partial(_each_example, run, torch._C._vmapmode_increment_nesting() - 1)
            torch._C._vmapmode_decrement_nesting()
        grads = run(
            ctx.cell,
            ctx.directions,
            ctx.n_state,
            needs,
            batch_sizes,
            y,
            gates,
            cells,
            dy,
            dh_n,
            dc_n,
            x,
            *tensors,
        )
        return None, None, None, grads[0], None, *grads[1:]


def _is_batched_grad(t):
    return t is not None and torch._C._functorch.is_legacy_batchedtensor(t)


def _each_example(run, level, *args):
    """run once per example under is_grads_batched of torch.autograd.grad, a vmap of its own kind.

    Only outside of run's autograd.Function can its results be differentiated again.
    """
    if level == 0:
        return run(*args)

    def bare(a):  # (B, *shape), or (1, *shape) if a is not batched at this level
        return torch._remove_batch_dim(a, level, 1, 0) if isinstance(a, torch.Tensor) else a

    def example(k, a):
        return a.select(0, k % a.shape[0]) if isinstance(a, torch.Tensor) else a

    def joined(*ts):
        return None if ts[0] is None else torch._add_batch_dim(torch.stack(ts), 0, level)

    args = tree_map(bare, args)
    count = max(a.shape[0] for a in args if isinstance(a, torch.Tensor))
    results = [
        _each_example(run, level - 1, *tree_map(partial(example, k), args)) for k in range(count)
    ]
    return tree_map(joined, *results)


class _LayerBackward(torch.autograd.Function):
    """The fused backward pass. Its own backward goes through the reference, step by step."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        cell, directions, n_state, needs, batch_sizes, y, gates, cells, dy, dh_n, dc_n, x, *tensors
    ):
        state0, weights = tensors[:n_state], tensors[n_state:]
        # The operator's mask always has places for h0 and c0.
        states = needs[1 : 1 + n_state] if n_state else (False, False)
        dx, dh0, dc0, dweights = _backward_op(
            x,
            batch_sizes,
            state0,
            weights,
            y,
            gates,
            cells,
            dy,
            dh_n,
            dc_n,
            CELL_IDS[cell],
            directions,
            [needs[0], *states, *needs[1 + n_state :]],
        )
        grads = [dx, *((dh0, dc0) if n_state else ()), *dweights]
        return tuple(g if need else None for g, need in zip(grads, needs, strict=True))

    @staticmethod
    def setup_context(ctx, inputs, output):
        cell, directions, n_state, needs, batch_sizes, _, _, _, dy, dh_n, dc_n, x, *tensors = inputs
        ctx.cell, ctx.directions, ctx.n_state, ctx.needs = cell, directions, n_state, needs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(batch_sizes, dy, dh_n, dc_n, x, *tensors)

    @staticmethod
    def backward(ctx, *grad_grads):
        batch_sizes, dy, dh_n, dc_n, *tensors = ctx.saved_tensors
        outer = [t for t in (dy, dh_n, dc_n) if t is not None]
        # Aliases, so that a tensor given twice (tied weights) has a gradient for each place.
        with torch.enable_grad():
            tensors = [_alias(t) for t in tensors]
            outer_aliases = [_alias(t) for t in outer]
            x, *rest = tensors
            y, (h_n, c_n) = reference.CELLS[ctx.cell](
                x, batch_sizes, tuple(rest[: ctx.n_state]), rest[ctx.n_state :], ctx.directions
            )
            given = zip((y, h_n, c_n), (dy, dh_n, dc_n), strict=True)
            outputs = [out for out, d in given if d is not None]
            inner = [t for t, need in zip(tensors, ctx.needs, strict=True) if need]
            first = torch.autograd.grad(
                outputs, inner, outer_aliases, create_graph=True, allow_unused=True
            )
            wanted = [g for g, need in zip(grad_grads, ctx.needs, strict=True) if need]
            pairs = [
                (f, g)
                for f, g in zip(first, wanted, strict=True)
                if f is not None and g is not None and f.requires_grad
            ]
            targets = [t for t in (*outer_aliases, *tensors) if t.requires_grad]
            second = iter(
                torch.autograd.grad(
                    [f for f, _ in pairs],
                    targets,
                    [g for _, g in pairs],
                    create_graph=torch.is_grad_enabled(),
                    allow_unused=True,
                )
                if pairs
                else [None] * len(targets)
            )
        found = [next(second) if t.requires_grad else None for t in (*outer_aliases, *tensors)]
        d_outer = iter(found[: len(outer)])
        d_given = [None if d is None else next(d_outer) for d in (dy, dh_n, dc_n)]
        return (None,) * 8 + (*d_given, *found[len(outer) :])


def _alias(t):
    return t.view_as(t) if t.requires_grad else t


@register_fake("lstm_fused::recurrent_forward")
def _fake_forward(x, batch_sizes, state0, weights, cell, directions, training):
    gates = _GATES[cell]
    hidden, width = weights[1].shape[0] // gates, weights[1].shape[1]
    n = x.shape[1] if batch_sizes is None else _batch_of(batch_sizes, state0)
    rows = x.shape[0] * x.shape[1] if batch_sizes is None else x.shape[0]
    saved = torch.float64 if x.dtype is torch.float64 else torch.float32
    y = x.new_empty(*x.shape[:-1], directions * width)
    h_n = x.new_empty(directions, n, width)
    c_n = x.new_empty(directions, n, hidden)
    if not training:
        return y, h_n, c_n, x.new_empty(0, dtype=saved), x.new_empty(0, dtype=saved)
    if x.device.type == "cuda":
        shapes = (rows, directions, cuda.CELLS[cell][1], hidden), (rows, directions, hidden)
    else:
        blocks = (hidden + _BLOCK - 1) // _BLOCK
        shapes = (directions, blocks, rows, gates, _BLOCK), (directions, blocks, rows, _BLOCK)
    return y, h_n, c_n, *(x.new_empty(shape, dtype=saved) for shape in shapes)


def _batch_of(batch_sizes, state0):
    """N of packed data: a state's if there is one, else only the data itself can tell."""
    if state0:
        return state0[0].shape[1]
    return torch.library.get_ctx().new_dynamic_size()


@register_fake("lstm_fused::recurrent_backward")
def _fake_backward(
    x, batch_sizes, state0, weights, y, gates, cells, dy, dh_n, dc_n, cell, directions, mask
):
    hidden, width = weights[1].shape[0] // _GATES[cell], weights[1].shape[1]
    if batch_sizes is None:
        n = x.shape[1]
    else:
        states = [t for t in (*state0, dh_n, dc_n) if t is not None]
        n = _batch_of(batch_sizes, states) if mask[1] or mask[2] else None

    def wanted(want, shape):
        return x.new_empty(shape if want else (0,))

    return (
        wanted(mask[0], x.shape),
        wanted(mask[1], (directions, n, width)),
        wanted(mask[2], (directions, n, hidden)),
        [wanted(want, w.shape) for want, w in zip(mask[3:], weights, strict=True)],
    )


def set_isa(name=None):
    """Force the instruction set kernels use, for every thread; None goes back to the best one.

    Raises RuntimeError for a name that is unknown or that this machine cannot run. The environment
    variable LSTM_FUSED_ISA does the same when the package is imported.
    """
    torch.ops.lstm_fused.force_isa(name or "")


def available_isas():
    """Names of the instruction sets this machine can run, slowest first."""
    return tuple(torch.ops.lstm_fused.available_isas().split())


def last_run(device="cpu"):
    """What the newest forward or backward call ran, as a dict; empty before any.

    On the CPU that is this thread's; on "cuda" any thread's, as autograd has its own there.
    """
    if device == "cuda":
        return cuda.last_run()
    words = (word.split("=") for word in torch.ops.lstm_fused.last_run().split())
    return {key: int(value) if value.isdigit() else value for key, value in words}


def plan(
    cell,
    dtype,
    T,
    N,
    I,  # noqa: E741
    H,
    R,
    directions,
    threads=None,
    training=False,
    device=None,
):
    """The plan a forward call with these sizes would run, as a printable object.

    dtype is a torch.dtype or its name; threads is torch.get_num_threads() unless given; device is
    a torch.device, the CPU unless given.
    """
    if cell not in CELL_IDS:
        raise ValueError(f"cell is {cell!r} but must be one of {sorted(CELL_IDS)}")
    if device is not None and device.type == "cuda":
        return cuda.plan_on(device, CELL_IDS[cell], dtype, T, N, H, R, directions)
    return _plan.plan(
        str(dtype).removeprefix("torch."),
        torch.ops.lstm_fused.active_isa(),
        torch.get_num_threads() if threads is None else threads,
        T,
        N,
        I,
        H,
        R,
        directions,
        projection=R != H,
        training=training,
    )


def build_info():
    """Version, compiler, the torch built against, ISAs compiled in, whether CUDA kernels are."""
    return _plan.build_info()


def _vmap_as_loop(op):
    """A vmap rule that runs op once per example: Tensor lists have no fallback in torch."""

    def rule(info, in_dims, *args):
        def example(k):
            return tree_map(lambda a, d: a if d is None else a.select(d, k), args, in_dims)

        results = [op(*example(k)) for k in range(info.batch_size)]
        stacked = tree_map(lambda *ts: torch.stack(ts), *results)
        return stacked, tree_map(lambda _: 0, stacked)

    register_vmap(op, rule)


_vmap_as_loop(_forward_op)
_vmap_as_loop(_backward_op)
