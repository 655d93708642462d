"""Derivatives of the operators: one rule for each, in reverse and in forward mode.

A rule is an autograd.Function whose forward runs the operator. It is applied in two ways. In eager
mode `record` applies it directly, which costs least. Under torch.compile, torch.export and
torch.func the call goes to the operator, whose Autograd kernel below applies the rule once for each
level that differentiates, since only that level knows which tensors need a gradient. Second
derivatives and tangents are those of the pure-torch reference.

Sizes as in `ops`: T steps, N rows, I inputs, H hidden units, R recurrent width, D directions, S
rows of all steps.
"""

from functools import partial

import torch
from torch._functorch.utils import enable_single_level_autograd_function, unwrap_dead_wrappers
from torch.autograd import Function, forward_ad

from lstm_fused import cuda
from lstm_fused.batched_grads import each_example, level_of
from lstm_fused.operators import (
    backward_op,
    forward_op,
    jvp_op,
    library,
    run_directly,
    samples_op,
)
from lstm_fused.reference_derivatives import (
    BETWEEN,
    INSIDE,
    Layer,
    gradients_of,
    outputs_of,
    replaced,
    tangents_of,
    with_moved,
)
from lstm_fused.tangents import has_kernel


def _apply_of(rule):
    """rule.apply at the current level only; Function.apply starts at the outermost transform."""
    return super(Function, rule).apply


def _primal(t):
    """t without its tangent at the current level."""
    return None if t is None else torch.ops.aten._fw_primal(t, 0)


class LayerForward(Function):
    """The forward pass. Its derivatives are LayerBackward, and the reference's in forward mode."""

    @staticmethod
    def forward(ctx, redispatch, layer, x, batch_sizes, *tensors):
        """redispatch: the operator for the level below, None in eager mode."""
        state0, weights = layer.split(tensors)
        args = x, batch_sizes, state0, weights, layer.cell, layer.directions, True
        if redispatch:
            out = redispatch(*args)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                out = forward_op(*args)
        y, _, c_n, gates, saved_states = out
        dispatched = redispatch is not None
        ctx.layer, ctx.dispatched = layer, dispatched
        ctx.mark_non_differentiable(gates, saved_states, *([] if layer.has_cell_state else [c_n]))
        ctx.set_materialize_grads(False)
        projection = (len(weights) // layer.directions) % 2 == 1
        if not (dispatched or cuda.serves(x)):
            # The CPU's kernels recompute h from what else is saved, except after a projection. A
            # copy lets the caller change y in place before backward.
            y = y.clone() if projection else None
        kept = (x, batch_sizes, y, gates, saved_states, *tensors)
        if not dispatched and torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
            kept, ctx.unread = _save_unread_apart(kept, layer, ctx.needs_input_grad[2:])
        else:
            ctx.unread = {}
        ctx.save_for_backward(*kept)
        if _follows_tangents():
            ctx.save_for_forward(x, batch_sizes, out[0], gates, saved_states, *tensors)
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
        needs_states, needs_weights = layer.split(needs[4:])
        mask = [needs[2], *(*needs_states, False, False)[:2], *needs_weights, False]
        rest = (batch_sizes, y, gates, saved_states, dy, dh_n, dc_n, x, *tensors)
        if ctx.dispatched:
            dx, dh0, dc0, dweights, _ = backward_op(*_arguments(layer, mask, rest))
        elif torch.is_grad_enabled():  # there are to be derivatives of the gradients
            run = partial(_record_gradients, layer, mask)
            dx, dh0, dc0, *dweights, _ = each_example(run, level_of(dy, dh_n, dc_n), *rest)
        elif level := level_of(dy, dh_n, dc_n):
            run = partial(_gradients, layer, mask)
            dx, dh0, dc0, *dweights, _ = each_example(run, level, *rest)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                dx, dh0, dc0, dweights, _ = backward_op(*_arguments(layer, mask, rest))
        found = (dx, *(dh0, dc0)[: layer.states], *dweights)
        wanted = (needs[2], *needs[4:])
        found = [g if want else None for g, want in zip(found, wanted, strict=True)]
        return None, None, found[0], None, *found[1:]

    @staticmethod
    def jvp(ctx, *tangents):
        layer = ctx.layer
        x, batch_sizes, *saved = ctx.saved_tensors
        x, y, gates, saved_states, *tensors = (_primal(t) for t in (x, *saved))
        moves = [tangents[2], *tangents[4:]]
        state0, weights = layer.split(tensors)
        if has_kernel(x, weights, layer.directions):
            args = (x, batch_sizes, state0, weights, y, gates, saved_states, moves)
            out = jvp_op(*args, layer.cell, layer.directions)
        else:
            moving = [k for k, t in enumerate(moves) if t is not None]
            call = with_moved([x, *tensors], moving, outputs_of(layer, batch_sizes, INSIDE))
            primals = [(x, *tensors)[k] for k in moving]
            out = INSIDE.push(call, primals, [moves[k] for k in moving])
        return out[0], out[1], out[2] if layer.has_cell_state else None, None, None


# record(None, layer, x, batch_sizes, *state0, *weights): recurrent_forward, recorded in eager mode.
record = _apply_of(LayerForward)


def _save_unread_apart(kept, layer, needs):
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


def _gradients(layer, mask, *tensors):
    """(dx, dh0, dc0, *dweights, d_preacts)."""
    args = _arguments(layer, mask, tensors)
    dx, dh0, dc0, dweights, d_preacts = run_directly(backward_op, *args)
    return dx, dh0, dc0, *dweights, d_preacts


def _record_gradients(layer, mask, *tensors):
    """_gradients, recorded so that they can be differentiated."""
    return _apply_of(LayerBackward)(partial(run_directly, backward_op), layer, mask, *tensors)


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
        # Only recurrent_backward_samples asks for the pre-activations' gradients, below autograd.
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
        if level := level_of(*grad_grads):
            run = partial(_second_derivatives, ctx.layer, ctx.mask, ctx.needs_input_grad[7:])
            found = each_example(run, level, list(grad_grads), *ctx.saved_tensors)
        else:
            found = _second_derivatives(
                ctx.layer, ctx.mask, ctx.needs_input_grad[7:], list(grad_grads), *ctx.saved_tensors
            )
        return (None,) * 7 + tuple(found)

    @staticmethod
    def jvp(ctx, *tangents):
        layer, mask = ctx.layer, ctx.mask
        batch_sizes, *tensors = ctx.saved_tensors
        primals = [_primal(t) for t in tensors]
        moves = tangents[7:]
        moving = [k for k, t in enumerate(moves) if t is not None]
        call = with_moved(primals, moving, gradients_of(layer, mask, batch_sizes, INSIDE))
        found = INSIDE.push(call, [primals[k] for k in moving], [moves[k] for k in moving])
        rest = iter(found)
        return tuple(next(rest) if want else None for want in (*mask[:-1], False))


class LayerTangents(Function):
    """The tangents of a layer's outputs; their derivatives are the reference's."""

    @staticmethod
    def forward(ctx, run, layer, batch_sizes, y, gates, saved_states, x, *tensors):
        """tensors: the states and the weights, then a tangent of x and of each of them, or None."""
        count = (len(tensors) - 1) // 2
        state0, weights = layer.split(tensors[:count])
        out = run(
            *(x, batch_sizes, state0, weights, y, gates, saved_states, list(tensors[count:])),
            *(layer.cell, layer.directions),
        )
        ctx.layer = layer
        if not layer.has_cell_state:
            ctx.mark_non_differentiable(out[2])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(batch_sizes, x, *tensors)
        if _follows_tangents():
            ctx.save_for_forward(batch_sizes, x, *tensors)
        return out

    @staticmethod
    def backward(ctx, *d_out):
        batch_sizes, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[6:]
        moving = [k for k, need in enumerate(needs) if need and tensors[k] is not None]
        used = [k for k, d in enumerate(d_out) if d is not None and k < 1 + ctx.layer.outputs]
        found = [None] * len(tensors)
        if moving and used:
            of_all = with_moved(tensors, moving, tangents_of(ctx.layer, batch_sizes, BETWEEN))

            def call(*moved):
                out = of_all(*moved)
                return tuple(out[k] for k in used)

            grads = BETWEEN.pull(call, [tensors[k] for k in moving], [d_out[k] for k in used])
            found = replaced(found, moving, grads)
        return None, None, None, None, None, None, *found

    @staticmethod
    def jvp(ctx, *tangents):
        layer = ctx.layer
        batch_sizes, *tensors = ctx.saved_tensors
        primals = [_primal(t) for t in tensors]
        moves = tangents[6:]
        moving = [k for k, t in enumerate(moves) if t is not None]
        call = with_moved(primals, moving, tangents_of(layer, batch_sizes, INSIDE))
        out = INSIDE.push(call, [primals[k] for k in moving], [moves[k] for k in moving])
        return out[0], out[1], out[2] if layer.has_cell_state else None


def _second_derivatives(layer, mask, needs, grad_grads, batch_sizes, *tensors):
    """Gradients of (dy, dh_n, dc_n, x, *state0, *weights), None where needs is not set."""
    weights = [g for g, want in zip(grad_grads[:-1], mask[:-1], strict=True) if want]
    used = [k for k, g in enumerate(weights) if g is not None]
    moving = [k for k, need in enumerate(needs) if need and tensors[k] is not None]
    found = [None] * len(tensors)
    if not used or not moving:
        return found
    gradients = with_moved(tensors, moving, gradients_of(layer, mask, batch_sizes, BETWEEN))

    def call(*moved):
        first = gradients(*moved)
        return tuple(first[k] for k in used)

    again = BETWEEN.pull(call, [tensors[k] for k in moving], [weights[k] for k in used])
    return replaced(found, moving, again)


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
    """The operator for the level below, which may record gradients and tangents."""

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
        return record(run, layer, x, batch_sizes, *state0, *weights)


def _backward_kernel(op, keyset, *args):
    x, batch_sizes, state0, weights, y, gates, saved_states, dy, dh_n, dc_n, *options = args
    cell, directions, mask, *samples = options
    if not _differentiates(x, *state0, *weights, dy, dh_n, dc_n):
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)
    layer = Layer(cell, directions, len(state0), *samples)
    tensors = (batch_sizes, y, gates, saved_states, dy, dh_n, dc_n, x, *state0, *weights)
    with enable_single_level_autograd_function():
        dx, dh0, dc0, *dweights, d_preacts = _apply_of(LayerBackward)(
            _below(op, keyset), layer, mask, *tensors
        )
    return dx, dh0, dc0, dweights, d_preacts


def _jvp_kernel(keyset, *args):
    x, batch_sizes, state0, weights, y, gates, saved_states, tangents, cell, directions = args
    if not _differentiates(x, *state0, *weights, *tangents):
        with torch._C._AutoDispatchBelowAutograd():
            return jvp_op.redispatch(keyset & torch._C._after_autograd_keyset, *args)
    layer = Layer(cell, directions, len(state0))
    tensors = (batch_sizes, y, gates, saved_states, x, *state0, *weights, *tangents)
    with enable_single_level_autograd_function():
        return _apply_of(LayerTangents)(_below(jvp_op, keyset), layer, *tensors)


def register():
    """Register the rules as the operators' Autograd kernels."""
    library.impl("recurrent_forward", _forward_kernel, "Autograd", with_keyset=True)
    library.impl("recurrent_jvp", _jvp_kernel, "Autograd", with_keyset=True)
    for op, name in (
        (backward_op, "recurrent_backward"),
        (samples_op, "recurrent_backward_samples"),
    ):
        library.impl(name, partial(_backward_kernel, op), "Autograd", with_keyset=True)
