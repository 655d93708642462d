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
    _C,  # loads the operators, too
    _plan,
    cuda,
    reference,
)

CELLS = _plan.cells()  # by name: id, gates, sums, memory; csrc/cells/cells.h
_IDS = {name: cell["id"] for name, cell in CELLS.items()}
_IDS_BY_MODE = {name.upper(): number for name, number in _IDS.items()}
_BY_ID = cuda.CELLS
_STEP_WEIGHTS = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]  # of torch.nn's cells
_STEP_WEIGHTS_WITHOUT_BIAS = _STEP_WEIGHTS[:2]
_BLOCK = 16  # units to a block of the gates saved on the CPU, csrc/params.h

cuda.load()

_forward_op = torch.ops.lstm_fused.recurrent_forward.default
_backward_op = torch.ops.lstm_fused.recurrent_backward.default


def layer(x, batch_sizes, state0, weights, cell="lstm", directions=1):
    """Run one layer of a recurrent network in one or two directions.

    Args:
        x: (T, N, I), any strides; or the data of a PackedSequence, (S, I).
        batch_sizes: None, or the PackedSequence's (T,), int64 on the CPU, never growing.
        state0: () for zeros, or (h0 (D, N, R),), with c0 (D, N, H) after it for "lstm".
        weights: for each direction w_ih (G*H, I), w_hh (G*H, R), then b_ih (G*H,) and b_hh (G*H,)
            if there are biases, then w_hr (R, H) if there is a projection ("lstm" only); flat, as a
            sequence. G, the gates, are 4 of "lstm", 3 of "gru" and 1 of the others.
        cell: "lstm", "gru", "rnn_tanh" or "rnn_relu".
        directions: 1, or 2 for a second one that walks from the last step to the first.

    Returns:
        y (T, N, D * R) or (S, D * R), and the final states (h_n (D, N, R),), with c_n (D, N, H)
        after it for "lstm".

    Everything is of one dtype, float32, float64, bfloat16 or float16, and on the CPU or one CUDA
    device. Gradients of any order are given. Raises RuntimeError on shapes, dtypes or devices that
    do not fit.
    """
    # torch.jit's tracer records the operator, for torch.onnx, and no autograd.Function.
    if torch.is_grad_enabled() and not torch.jit.is_tracing() and (
        x.requires_grad
        or any(w.requires_grad for w in weights)
        or any(s.requires_grad for s in state0)
    ):
        y, h_n, c_n, _, _ = _Layer.apply(
            cell, directions, len(state0), x, batch_sizes, *state0, *weights
        )
    else:
        y, h_n, c_n, _, _ = _forward_op(
            x, batch_sizes, state0, weights, _IDS[cell], directions, False
        )
    return y, ((h_n, c_n) if CELLS[cell]["memory"] == "cell" else (h_n,))


def infer(module, input, hx):
    """The result of a recurrent module without gradients, past torch's dispatcher, or None.

    None whenever something is not plain: gradients are recorded, a mode of torch's is on that wants
    to see operators, weights are parametrized, anything is not a contiguous CPU tensor of the
    expected shape and one of the four dtypes. It checks that anew at each call and raises nothing:
    what is wrong is for the usual way to say.

    module: an LSTM, GRU or RNN of torch.nn's attributes. input: (T, N, I), or (N, T, I) if
    ``batch_first``. hx: None, or the states in the form the module takes them.
    """
    layers = module.num_layers
    if layers > 1 and module.dropout and module.training:
        return None
    first = module.batch_first and type(input) is torch.Tensor and input.dim() == 3
    found = _C.infer(
        module._flat_weights_names,
        module._parameters,
        input.transpose(0, 1) if first else input,
        hx,
        _IDS_BY_MODE[module.mode],
        2 if module.bidirectional else 1,
        layers,
    )
    return (found[0].transpose(0, 1), found[1]) if first and found is not None else found


def infer_step(module, input, hx):
    """`infer` for a single-step cell: input (N, I) or (I,), and the states it returns likewise."""
    names = _STEP_WEIGHTS if module.bias else _STEP_WEIGHTS_WITHOUT_BIAS
    return _C.infer(names, module._parameters, input, hx, _IDS.get(module._cell(), -1))


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
            _IDS[cell],
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
        if CELLS[ctx.cell]["memory"] != "cell":
            dc_n = None  # torch.compile gives zeros for the c_n that there is not
        if dy is None and dh_n is None and dc_n is None:
            return (None,) * len(ctx.needs_input_grad)
        needs = ctx.needs_input_grad[3:4] + ctx.needs_input_grad[5:]
        run = _LayerBackward.apply if torch.is_grad_enabled() else _LayerBackward.forward
        if not torch.compiler.is_compiling() and (level := _batched_level(dy, dh_n, dc_n)):
            run = partial(_each_example, run, level)
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


def _batched_level(*grads):
    """How many vmaps of is_grads_batched the gradients are inside of, 0 outside.

    Of the gradients themselves: torch's own count is not known to the thread that autograd has for
    a CUDA device.
    """
    level = 0
    grads = [g for g in grads if g is not None]
    while any(map(torch._C._functorch.is_legacy_batchedtensor, grads)):
        level += 1
        grads = [torch._remove_batch_dim(g, level, 1, 0) for g in grads]
    return level


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
        states = (*needs[1 : 1 + n_state], False, False)[:2]
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
            _IDS[cell],
            directions,
            [needs[0], *states, *needs[1 + n_state :]],
        )
        grads = [dx, *(dh0, dc0)[:n_state], *dweights]
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
            y, states = reference.CELLS[ctx.cell](
                x, batch_sizes, tuple(rest[: ctx.n_state]), rest[ctx.n_state :], ctx.directions
            )
            given = zip((y, *states), (dy, dh_n, dc_n), strict=False)
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
    info = _BY_ID[cell]
    hidden, width = weights[1].shape[0] // info["gates"], weights[1].shape[1]
    n = x.shape[1] if batch_sizes is None else _batch_of(batch_sizes, state0)
    rows = x.shape[0] * x.shape[1] if batch_sizes is None else x.shape[0]
    saved_dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    if x.device.type == "cuda":
        gates, cells = (rows, directions, info["sums"], hidden), (rows, directions, hidden)
    else:
        saved = (directions, (hidden + _BLOCK - 1) // _BLOCK, rows)
        gates, cells = (*saved, info["sums"], _BLOCK), (*saved, _BLOCK)

    def maybe(wanted, *shape, dtype=x.dtype):
        return x.new_empty(shape if wanted else (0,), dtype=dtype)

    return (
        x.new_empty(*x.shape[:-1], directions * width),
        x.new_empty(directions, n, width),
        maybe(info["memory"] == "cell", directions, n, hidden),
        maybe(training, *gates, dtype=saved_dtype),
        maybe(training and info["memory"] != "none", *cells, dtype=saved_dtype),
    )


def _batch_of(batch_sizes, state0):
    """N of packed data: a state's if there is one, else only the data itself can tell."""
    if state0:
        return state0[0].shape[1]
    return torch.library.get_ctx().new_dynamic_size()


@register_fake("lstm_fused::recurrent_backward")
def _fake_backward(
    x, batch_sizes, state0, weights, y, gates, cells, dy, dh_n, dc_n, cell, directions, mask
):
    hidden, width = weights[1].shape[0] // _BY_ID[cell]["gates"], weights[1].shape[1]
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
    return cuda.words_as_dict(torch.ops.lstm_fused.last_run())


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

    cell is as for ``layer``; dtype is a torch.dtype or its name; threads is
    torch.get_num_threads() unless given; device is a torch.device, the CPU unless given. Raises
    ValueError for a name that is unknown.
    """
    if device is not None and device.type == "cuda":
        return cuda.plan_on(device, _IDS[cell], dtype, T, N, H, R, directions)
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
        cell=cell,
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
