"""Derivatives of the operators: one rule for each, in reverse and in forward mode.

A rule is an autograd.Function whose forward runs the operator. There are two ways to it. In eager
mode `record` applies it directly, which costs least. Under torch.compile, torch.export and
torch.func the call goes to the operator, and the operator's Autograd kernel below applies the rule
once for each level that differentiates: which tensors need a gradient is a question that only the
level itself can answer. Second derivatives and tangents are those of the pure-torch reference.

Sizes as in `ops`: T steps, N rows, I inputs, H hidden units, R recurrent width, D directions, S
rows of all steps.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch._functorch.utils import enable_single_level_autograd_function, unwrap_dead_wrappers
from torch.autograd import Function, forward_ad
from torch.utils._pytree import tree_leaves, tree_map

from lstm_fused import cuda, models, reference
from lstm_fused.cuda import CELLS
from lstm_fused.operators import backward_op, forward_op, library, run_directly, samples_op

_NAMES = {number: cell["name"] for number, cell in CELLS.items()}


@dataclass(frozen=True)
class Layer:
    """What a call of an operator says beside its tensors."""

    cell: int
    directions: int
    states: int  # initial states given: 0, or as many as the cell has
    samples: int = 0  # of recurrent_backward_samples, 0 for the other operators

    @property
    def has_cell_state(self):
        return CELLS[self.cell]["memory"] == "cell"

    def split(self, tensors):
        """(state0, weights) of the tensors after x."""
        return list(tensors[: self.states]), list(tensors[self.states :])


def record(x, batch_sizes, state0, weights, cell, directions):
    """recurrent_forward, recorded for autograd in eager mode."""
    layer = Layer(cell, directions, len(state0))
    run = partial(run_directly, forward_op)
    return _apply(LayerForward, run, layer, False, x, batch_sizes, *state0, *weights)


def _apply(rule, *args):
    """rule.apply at this level alone: Function.apply would begin with the outermost transform."""
    return super(Function, rule).apply(*args)


class LayerForward(Function):
    """The forward pass. Its derivatives are LayerBackward, and the reference's in forward mode."""

    @staticmethod
    def forward(ctx, run, layer, dispatched, x, batch_sizes, *tensors):
        state0, weights = layer.split(tensors)
        out = run(x, batch_sizes, state0, weights, layer.cell, layer.directions, True)
        y, _, c_n, gates, saved_states = out
        ctx.layer, ctx.dispatched = layer, dispatched
        ctx.mark_non_differentiable(gates, saved_states, *([] if layer.has_cell_state else [c_n]))
        ctx.set_materialize_grads(False)
        projection = (len(weights) // layer.directions) % 2 == 1
        if not (dispatched or cuda.serves(x)):
            # The CPU's kernels find h in what is saved beside it, but not after a projection. A
            # copy leaves the caller free to change y in place.
            y = y.clone() if projection else None
        kept = (x, batch_sizes, y, gates, saved_states, *tensors)
        if not dispatched and torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
            kept, ctx.unread = _set_apart_unread(kept, layer, ctx.needs_input_grad[3:])
        else:
            ctx.unread = {}
        ctx.save_for_backward(*kept)
        if _follows_tangents():
            ctx.save_for_forward(x, batch_sizes, *tensors)
        return out

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n, _gates, _saved_states):
        layer = ctx.layer
        if not layer.has_cell_state:
            dc_n = None
        needs = ctx.needs_input_grad
        if dy is None and dh_n is None and dc_n is None:
            return (None,) * len(needs)
        kept = _with_unread(ctx.saved_tensors, ctx.unread)
        x, batch_sizes, y, gates, saved_states, *tensors = kept
        needs_states, needs_weights = layer.split(needs[5:])
        mask = [needs[3], *(*needs_states, False, False)[:2], *needs_weights, False]
        rest = (batch_sizes, y, gates, saved_states, dy, dh_n, dc_n, x, *tensors)
        run = partial(_gradients, ctx.dispatched, layer, mask)
        if (level := _batched_level(dy, dh_n, dc_n)) and not ctx.dispatched:
            grads = _each_example(run, level, *rest)
        else:
            grads = run(*rest)
        dx, dh0, dc0, *dweights = grads[:-1]
        found = (dx, *(dh0, dc0)[: layer.states], *dweights)
        wanted = (needs[3], *needs[5:])
        found = [g if want else None for g, want in zip(found, wanted, strict=True)]
        return None, None, None, found[0], None, *found[1:]

    @staticmethod
    def jvp(ctx, *tangents):
        x, batch_sizes, *tensors = ctx.saved_tensors
        primals = [_primal(t) for t in (x, *tensors)]
        given = [tangents[3], *tangents[5:]]
        moving = [k for k, t in enumerate(given) if t is not None]

        def call(*moved):
            full = _replaced(primals, moving, moved)
            return _reference(ctx.layer, batch_sizes, full[0], full[1:], _INSIDE)

        out = _tangents(call, [primals[k] for k in moving], [given[k] for k in moving])
        c_n = out[2] if len(out) > 2 else None
        return out[0], out[1], c_n, None, None


def _set_apart_unread(kept, layer, needs):
    """Tensors to save for backward without those that it does not read, and these by place.

    It reads no bias, and x only for the gradient of w_ih. Not saved, they may be changed in place
    before backward, as torch.nn allows. A second derivative does read them: see _with_unread.
    needs: of (x, batch_sizes, *state0, *weights).
    """
    first = len(kept) - len(needs) + 2 + layer.states  # of the weights
    each = (len(kept) - first) // layer.directions
    places = []
    for d in range(layer.directions):
        if each >= 4:
            places += [first + d * each + 2, first + d * each + 3]
    if not any(needs[2 + layer.states + d * each] for d in range(layer.directions)):
        places.append(0)
    unread = {k: (kept[k], _version(kept[k])) for k in places}
    return [None if k in unread else t for k, t in enumerate(kept)], unread


def _with_unread(kept, unread):
    kept = list(unwrap_dead_wrappers(kept))
    for k, (t, version) in unread.items():
        if torch.is_grad_enabled() and _version(t) != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: a tensor of shape {tuple(t.shape)} is at version "
                f"{_version(t)}; expected version {version} instead. The first derivative does "
                "without it, derivatives of it (create_graph=True) do not."
            )
        kept[k] = t
    return kept


def _version(t):
    return 0 if t.is_inference() else t._version


def _gradients(dispatched, layer, mask, *tensors):
    """(dx, dh0, dc0, *dweights, d_preacts), recorded if there are to be derivatives of them."""
    if not dispatched and torch.is_grad_enabled():
        return _apply(LayerBackward, partial(run_directly, backward_op), layer, mask, *tensors)
    run = backward_op if dispatched else partial(run_directly, backward_op)
    dx, dh0, dc0, dweights, d_preacts = run(*_arguments(layer, mask, tensors))
    return dx, dh0, dc0, *dweights, d_preacts


def _arguments(layer, mask, tensors):
    """The arguments of recurrent_backward, or of recurrent_backward_samples."""
    batch_sizes, y, gates, saved_states, dy, dh_n, dc_n, x, *rest = tensors
    state0, weights = layer.split(rest)
    args = (x, batch_sizes, state0, weights, y, gates, saved_states, dy, dh_n, dc_n)
    args = (*args, layer.cell, layer.directions, mask)
    return (*args, layer.samples) if layer.samples else args


class LayerBackward(Function):
    """The backward pass. Its own derivatives are those of the reference's backward pass."""

    @staticmethod
    def forward(ctx, run, layer, mask, *tensors):
        dx, dh0, dc0, dweights, d_preacts = run(*_arguments(layer, mask, tensors))
        grads = (dx, dh0, dc0, *dweights, d_preacts)
        ctx.layer, ctx.mask = layer, mask
        unwanted = [g for g, want in zip(grads, mask, strict=True) if not want]
        # Pre-activations' gradients are asked for by recurrent_backward_samples, below autograd.
        ctx.mark_non_differentiable(*unwanted, *([d_preacts] if mask[-1] else []))
        ctx.set_materialize_grads(False)
        batch_sizes, _, _, _, dy, dh_n, dc_n, x, *rest = tensors
        kept = (batch_sizes, dy, dh_n, dc_n, x, *rest)
        ctx.save_for_backward(*kept)
        if _follows_tangents():
            ctx.save_for_forward(*kept)
        return grads

    @staticmethod
    def backward(ctx, *grad_grads):
        if level := _batched_level(*grad_grads):
            run = partial(_second_derivatives, ctx.layer, ctx.mask, ctx.needs_input_grad[7:])
            found = _each_example(run, level, list(grad_grads), *ctx.saved_tensors)
        else:
            found = _second_derivatives(
                ctx.layer, ctx.mask, ctx.needs_input_grad[7:], list(grad_grads), *ctx.saved_tensors
            )
        return (None,) * 7 + tuple(found)

    @staticmethod
    def jvp(ctx, *tangents):
        batch_sizes, *tensors = ctx.saved_tensors
        primals = [None if t is None else _primal(t) for t in tensors]
        given = tangents[7:]
        moving = [k for k, t in enumerate(given) if t is not None]

        def call(*moved):
            full = _replaced(primals, moving, moved)
            return _reference_gradients(
                ctx.layer, ctx.mask, batch_sizes, full[:3], full[3:], _INSIDE
            )

        found = _tangents(call, [primals[k] for k in moving], [given[k] for k in moving])
        return _at_wanted(found, ctx.mask)


def _primal(t):
    """t without its tangent of this level."""
    return torch.ops.aten._fw_primal(t, 0)


def _replaced(tensors, places, others):
    found = list(tensors)
    for k, t in zip(places, others, strict=True):
        found[k] = t
    return found


def _at_wanted(found, mask):
    """One entry for each of mask's: those found where it is set, None elsewhere."""
    rest = iter(found)
    return tuple(next(rest) if want else None for want in (*mask[:-1], False))


def _second_derivatives(layer, mask, needs, grad_grads, batch_sizes, *tensors):
    """Gradients of (dy, dh_n, dc_n, x, *state0, *weights), None where needs is not set."""
    weights = [g for g, want in zip(grad_grads[:-1], mask[:-1], strict=True) if want]
    used = [k for k, g in enumerate(weights) if g is not None]
    moving = [k for k, need in enumerate(needs) if need and tensors[k] is not None]
    found = [None] * len(tensors)
    if not used or not moving:
        return found

    def call(*moved):
        full = _replaced(tensors, moving, moved)
        first = _reference_gradients(layer, mask, batch_sizes, full[:3], full[3:], _BETWEEN)
        return tuple(first[k] for k in used)

    again = _BETWEEN.pull(call, [tensors[k] for k in moving], [weights[k] for k in used])
    return _replaced(found, moving, again)


@contextmanager
def _recording():
    """Autograd records at the level of the tensors, whatever the transform they are inside of."""
    allowed = torch._C._functorch.get_inplace_requires_grad_allowed()
    torch._C._functorch.set_inplace_requires_grad_allowed(True)
    try:
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            yield
    finally:
        torch._C._functorch.set_inplace_requires_grad_allowed(allowed)


def _leaf(t):
    """An alias of t that gradients are recorded for: one for each place of a tensor given twice."""
    alias = t.view_as(t)
    return alias if alias.requires_grad else alias.requires_grad_()


def _pull(call, args, cotangents):
    with _recording():
        places = [_leaf(t) for t in args]
        out = call(*places)
        pairs = [(o, d) for o, d in zip(out, cotangents, strict=True) if o.requires_grad]
        return torch.autograd.grad(
            [o for o, _ in pairs],
            places,
            [d for _, d in pairs],
            create_graph=True,
            materialize_grads=True,
        )


def _tangents(call, args, tangents):
    """The Jacobian-vector product of call(*args): the gradient of _pull, which is linear in u."""
    with _recording():
        out_like = call(*args)
        u = [_leaf(torch.zeros_like(o)) for o in out_like]
        return _pull(lambda *u: _pull(call, args, u), u, tangents)


def _one_by_one(run, in_dims=0, out_dims=0):
    """torch.func.vmap for where it cannot begin: inside an operator's kernel."""

    def each(*args):
        dims = in_dims if isinstance(in_dims, tuple) else (in_dims,) * len(args)

        def of(k, arg, dim):
            return tree_map(lambda t: t.select(dim, k), arg) if dim is not None else arg

        count = next(
            t.shape[dim]
            for arg, dim in zip(args, dims, strict=True)
            if dim is not None
            for t in tree_leaves(arg)
        )
        found = [run(*(of(k, a, d) for a, d in zip(args, dims, strict=True))) for k in range(count)]
        parts = list(zip(*found, strict=True))
        ends = out_dims if isinstance(out_dims, tuple) else (out_dims,) * len(parts)
        return tuple(torch.stack(ts, d) for ts, d in zip(parts, ends, strict=True))

    return each


def _func_pull(call, args, cotangents):
    _, pull = torch.func.vjp(call, *args)
    return pull(tuple(cotangents))


@dataclass(frozen=True)
class _Tools:
    """pull(call, args, cotangents): the vector-Jacobian product of call(*args); and torch.vmap."""

    pull: Callable
    vmap: Callable


# Between two calls of operators, where a transform can begin, and inside of an operator's kernel.
_BETWEEN = _Tools(_func_pull, torch.func.vmap)
_INSIDE = _Tools(_pull, _one_by_one)


def _reference(layer, batch_sizes, x, tensors, tools):
    """(y, h_n[, c_n]) by the reference; x and tensors may have a first dimension of models."""

    def one(x, *tensors):
        state0, weights = layer.split(tensors)
        run = reference.CELLS[_NAMES[layer.cell]]
        y, ends = run(x, batch_sizes, tuple(state0), weights, layer.directions)
        return y, *ends

    run = tools.vmap(one) if models.several(x, batch_sizes) else one
    return run(x, *tensors)


def _reference_gradients(layer, mask, batch_sizes, d_out, tensors, tools):
    """The gradients that mask asks for, as a tuple of those alone.

    d_out: of y, h_n and c_n, None where there is none. tensors: x, the states, the weights. With
    samples, the rows are (n, sample), the last the innermost, and a weight has a gradient for each.
    """
    given = [k for k, d in enumerate(d_out) if d is not None]
    wanted = [
        k for k, want in enumerate((mask[0], *mask[1 : 1 + layer.states], *mask[3:-1])) if want
    ]
    sizes = batch_sizes
    if batch_sizes is not None and layer.samples:
        sizes = batch_sizes // layer.samples

    def one(d_out, *tensors):
        def outputs(*moved):
            full = _replaced(tensors, wanted, moved)
            out = _reference(layer, sizes, full[0], full[1:], tools)
            return tuple(out[k] for k in given)

        return tools.pull(outputs, [tensors[k] for k in wanted], d_out)

    run = _over_samples(layer, one, wanted, tools) if layer.samples else one
    if models.several(tensors[0], batch_sizes):
        run = tools.vmap(run)
    return run(tuple(d_out[k] for k in given), *tensors)


def _over_samples(layer, one, wanted, tools):
    """one for each sample, whose rows are unflattened from (N * samples) and flattened again."""

    def parted(t):
        return t.unflatten(-2, (-1, layer.samples))

    def run(d_out, *tensors):
        rows, weights = tensors[: 1 + layer.states], tensors[1 + layer.states :]
        in_dims = (-2, *[-2] * len(rows), *[None] * len(weights))
        out_dims = tuple(-2 if k <= layer.states else 0 for k in wanted)
        found = tools.vmap(one, in_dims, out_dims)(
            tuple(map(parted, d_out)), *map(parted, rows), *weights
        )
        return tuple(
            g.flatten(-3, -2) if k <= layer.states else g
            for k, g in zip(wanted, found, strict=True)
        )

    return run


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
    count = max(a.shape[0] for a in tree_leaves(args) if isinstance(a, torch.Tensor))
    results = [
        _each_example(run, level - 1, *tree_map(partial(example, k), args)) for k in range(count)
    ]
    return tree_map(joined, *results)


def _follows_tangents():
    """Whether this level is one of forward mode."""
    transform = torch._C._functorch.peek_interpreter_stack()
    if transform is None:
        return forward_ad._current_level >= 0
    return transform.key() == torch._C._functorch.TransformType.Jvp


def _differentiates(*tensors):
    """Whether this level records tensors' history, or follows their tangents."""
    if _follows_tangents():
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _below(op, keyset):
    """The operator for the level below, which may record and follow tangents as it likes."""

    def run(*args):
        with (
            torch.enable_grad(),
            forward_ad._set_fwd_grad_enabled(True),
            torch._C._AutoDispatchBelowAutograd(),
        ):
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return run


def _forward_kernel(keyset, x, batch_sizes, state0, weights, cell, directions, training):
    if not _differentiates(x, *state0, *weights):
        with torch._C._AutoDispatchBelowAutograd():
            return forward_op.redispatch(
                keyset & torch._C._after_autograd_keyset,
                *(x, batch_sizes, state0, weights, cell, directions, training),
            )
    layer = Layer(cell, directions, len(state0))
    with enable_single_level_autograd_function():
        run = _below(forward_op, keyset)
        return _apply(LayerForward, run, layer, True, x, batch_sizes, *state0, *weights)


def _backward_kernel(op, keyset, *args):
    x, batch_sizes, state0, weights, y, gates, saved_states, dy, dh_n, dc_n, *options = args
    cell, directions, mask, *samples = options
    if not _differentiates(x, *state0, *weights, dy, dh_n, dc_n):
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)
    layer = Layer(cell, directions, len(state0), *samples)
    tensors = (batch_sizes, y, gates, saved_states, dy, dh_n, dc_n, x, *state0, *weights)
    with enable_single_level_autograd_function():
        dx, dh0, dc0, *dweights, d_preacts = _apply(
            LayerBackward, _below(op, keyset), layer, mask, *tensors
        )
    return dx, dh0, dc0, dweights, d_preacts


def register():
    """Make the rules the operators' Autograd kernels."""
    library.impl("recurrent_forward", _forward_kernel, "Autograd", with_keyset=True)
    for op, name in (
        (backward_op, "recurrent_backward"),
        (samples_op, "recurrent_backward_samples"),
    ):
        library.impl(name, partial(_backward_kernel, op), "Autograd", with_keyset=True)
