"""Derivatives of the operators: one rule for each, in reverse and in forward mode.

A rule is an autograd.Function whose forward runs the operator. It is applied in two ways. In eager
mode `record` applies it directly, which costs least. Under torch.compile, torch.export and
torch.func the call goes to the operator, whose Autograd kernel below applies the rule once for each
level that differentiates, since only that level knows which tensors need a gradient. Second
derivatives and tangents are those of the pure-torch reference.

Sizes as in `ops`: T steps, N rows, I inputs, H hidden units, R recurrent width, D directions, S
rows of all steps.
"""

from functools import cache, partial

import torch
from torch._functorch.utils import enable_single_level_autograd_function, unwrap_dead_wrappers
from torch.autograd import forward_ad

# Function.apply starts at the outermost transform, this one's at the current level alone.
from torch.autograd.function import _SingleLevelFunction

from lstm_fused import _C, cuda, operators
from lstm_fused.batched_grads import each_example, level_of
from lstm_fused.dynamo import untraced
from lstm_fused.operators import (
    backward_op,
    forward_op,
    jvp_op,
    library,
    lifted,
    lowered,
    run_directly,
    samples_op,
)
from lstm_fused.reference_derivatives import (
    BETWEEN,
    INSIDE,
    Layer,
    gradients_of,
    has_cell_states,
    outputs_of,
    replaced,
    tangents_of,
    with_moved,
)
from lstm_fused.tangents import has_kernel


def _primal(t):
    """t without its tangent at the current level."""
    return None if t is None else torch.ops.aten._fw_primal(t, 0)


class LayerForward(_SingleLevelFunction):
    """The forward pass. Its derivatives are LayerBackward, and the reference's in forward mode.

    Returns what the operator does below torch's dispatcher, and in eager mode (y, h_n[, c_n]).
    """

    @staticmethod
    def forward(ctx, redispatch, layer, x, batch_sizes, resets, *tensors):
        """redispatch: the operator for the level below, None in eager mode."""
        state0, weights = layer.split(tensors)
        ctx.layer, ctx.dispatched = layer, redispatch is not None
        ctx.set_materialize_grads(False)
        call = (x, batch_sizes, resets, state0, weights, layer.cell, layer.directions)
        call = (*call, layer.cell_states, layer.save_every)
        if redispatch:
            out = y, _, c_n, gates, saved_states = redispatch(*call)
            unused = () if layer.has_cell_state else (c_n,)
            ctx.mark_non_differentiable(gates, saved_states, *unused)
        else:
            y, h_n, c_n, gates, saved_states = operators.forward(*call)
            out = (y, h_n, c_n) if layer.has_cell_state else (y, h_n)
            if not cuda.serves(x):
                # The CPU's kernels recompute h from what else is saved, except after a projection.
                # A copy lets the caller change y in place before backward.
                y = y.clone() if layer.is_projected(weights) else None
        kept = (x, batch_sizes, resets, y, gates, saved_states, *tensors)
        _save(ctx, ctx.needs_input_grad[5:], kept)
        if _follows_tangents():
            ctx.save_for_forward(x, batch_sizes, resets, out[0], gates, saved_states, *tensors)
        return out

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n=None, *_):
        layer, needs = ctx.layer, ctx.needs_input_grad
        grads = (dy, dh_n, dc_n if layer.has_cell_state else None)
        if all(g is None for g in grads):
            return (None,) * len(needs)
        mask = layer.mask(needs[2], needs[5:])
        kept = _saved(ctx)
        if ctx.dispatched:
            x, batch_sizes, resets, y, gates, saved_states, *tensors = kept
            rest = (batch_sizes, resets, y, gates, saved_states, *grads, x, *tensors)
            dx, dh0, dc0, dweights, _ = backward_op(*_arguments(layer, mask, rest))
            found = _wanted(layer, mask, (dx, dh0, dc0, *dweights))
        else:
            found = _gradients_in_eager_mode(layer, mask, kept, grads)
        return None, None, found[0], None, None, *found[1:]

    @staticmethod
    def jvp(ctx, *tangents):
        layer = ctx.layer
        x, batch_sizes, resets, *saved = ctx.saved_tensors
        x, y, gates, saved_states, *tensors = (_primal(t) for t in (x, *saved))
        moves = [tangents[2], *tangents[5:]]
        state0, weights = layer.split(tensors)
        if has_kernel(x, weights, layer.cell, layer.directions):
            call = (x, batch_sizes, resets, state0, weights)
            options = (layer.cell, layer.directions)
            if layer.save_every > 1:  # a tangent needs every step
                y, _, _, gates, saved_states = forward_op(*call, *options, layer.cell_states, 1)
            out = jvp_op(*call, y, gates, saved_states, moves, *options)
        else:
            moving = [k for k, t in enumerate(moves) if t is not None]
            outputs = outputs_of(layer, batch_sizes, resets, INSIDE)
            call = with_moved([x, *tensors], moving, outputs)
            primals = [(x, *tensors)[k] for k in moving]
            out = INSIDE.push(call, primals, [moves[k] for k in moving])
        return out[0], out[1], out[2] if layer.has_cell_state else None, None, None


# record(None, layer, x, batch_sizes, resets, *state0, *weights): recurrent_forward, recorded in
# eager mode.
record = LayerForward.apply  # type: ignore[attr-defined]  # of a base class in C++


class StepForward(_SingleLevelFunction):
    """LayerForward of a single-step cell in eager mode: x (N, I) or (I,), states (N, H) or (H,)."""

    @staticmethod
    def forward(ctx, layer, x, *tensors):
        h, c, gates, saved_states = operators.forward_step(x, *layer.split(tensors), layer.cell)
        ctx.layer, ctx.dispatched = layer, False
        ctx.set_materialize_grads(False)
        kept = (x, None, None, None, gates, saved_states, *tensors)
        _save(ctx, ctx.needs_input_grad[2:], kept)
        return (h, c) if layer.has_cell_state else h

    @staticmethod
    def backward(ctx, dh, dc=None):
        layer, needs = ctx.layer, ctx.needs_input_grad
        if dh is None and dc is None:
            return (None,) * len(needs)
        mask = layer.mask(needs[1], needs[2:])
        x, _, _, _, gates, saved_states, *tensors = kept = _saved(ctx)
        if not _differentiates_gradients() and not level_of(dh, dc):
            rest = (None, gates, saved_states, None, dh, dc, layer.cell, 0, 1, mask)
            found = _C.backward(x, None, None, *layer.split(tensors), *rest)
            if found is not None:
                return None, *_wanted(layer, mask, found)
        missing, states = 3 - x.dim(), 1 + layer.states
        moved = [lifted(t, missing) for t in (x, *tensors[: layer.states])]
        kept = (moved[0], None, None, None, gates, saved_states, *moved[1:])
        kept = (*kept, *tensors[layer.states :])
        grads = (None, lifted(dh, missing), lifted(dc, missing))
        found = _gradients_in_eager_mode(layer, mask, kept, grads)
        found[:states] = [None if g is None else lowered(g, missing) for g in found[:states]]
        return None, *found


record_step = StepForward.apply  # type: ignore[attr-defined]


def _save(ctx, needs, kept):
    """Save kept for backward: (x, batch_sizes, resets, y, gates, saved_states, *state0, *weights).

    Except for what backward does not read: the biases, and x without a gradient of w_ih. Not saved,
    they may be changed in place before backward, as torch.nn allows. A second derivative does read
    them, see _saved. needs: of the states and weights.
    """
    layer = ctx.layer
    if ctx.dispatched or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        ctx.unread = ()
        return ctx.save_for_backward(*kept)
    each = (len(needs) - layer.states) // layer.directions
    reads_x = any(needs[layer.states :: each])
    kept = list(kept)
    ctx.unread = []
    first = len(kept) - len(needs) + layer.states
    biased = layer.plain_count(kept[first:]) >= 4
    for k in _unread(first, each, layer.directions, reads_x, biased):
        t = kept[k]
        ctx.unread.append((k, t, _version(t)))
        kept[k] = None
    ctx.save_for_backward(*kept)


@cache
def _unread(first, each, directions, reads_x, biased):
    """The places that backward does not read; `each` weights of a direction begin at `first`."""
    places = [] if reads_x else [0]
    if biased:
        places += [first + d * each + k for d in range(directions) for k in (2, 3)]
    return places


def _saved(ctx):
    """What _save was given."""
    kept = ctx.saved_tensors
    if ctx.dispatched:
        return unwrap_dead_wrappers(kept)
    kept = list(kept)
    for k, t, version in ctx.unread:
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


def _differentiates_gradients():
    """Whether derivatives of the gradients are wanted: create_graph, or tangents of them."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def _gradients_in_eager_mode(layer, mask, kept, grads):
    """The gradients that mask asks for, else None, of (x, *state0, *weights).

    kept: as _save was given; grads: dy, dh_n, dc_n.
    """
    x, batch_sizes, resets, y, gates, saved_states, *tensors = kept
    level, recorded = level_of(*grads), _differentiates_gradients()
    if not level and not recorded:
        call = (x, batch_sizes, resets, *layer.split(tensors), y, gates, saved_states, *grads)
        if found := _C.backward(*call, layer.cell, layer.directions, layer.save_every, mask):
            return _wanted(layer, mask, found)
    if saved_states is None:
        saved_states = gates.new_empty(0)
    rest = (batch_sizes, resets, y, gates, saved_states, *grads, x, *tensors)
    run = partial(_record_gradients if recorded else _gradients, layer, mask)
    found = each_example(run, level, *rest)
    return _wanted(layer, mask, found[:-1])


def _wanted(layer, mask, found):
    """Of (dx, dh0, dc0, *dweights), those of (x, *state0, *weights); None where mask is not set."""
    found = [g if want else None for g, want in zip(found, mask, strict=False)]
    del found[1 + layer.states : 3]
    return found


def _gradients(layer, mask, *tensors):
    """(dx, dh0, dc0, *dweights, d_preacts)."""
    args = _arguments(layer, mask, tensors)
    dx, dh0, dc0, dweights, d_preacts = run_directly(backward_op, *args)
    return dx, dh0, dc0, *dweights, d_preacts


def _record_gradients(layer, mask, *tensors):
    """_gradients, recorded so that they can be differentiated."""
    return LayerBackward.apply(partial(run_directly, backward_op), layer, mask, *tensors)


def _arguments(layer, mask, tensors):
    """The arguments of recurrent_backward, or of recurrent_backward_samples."""
    batch_sizes, resets, y, gates, saved_states, dy, dh_n, dc_n, x, *rest = tensors
    state0, weights = layer.split(rest)
    args = (x, batch_sizes, resets, state0, weights, y, gates, saved_states, dy, dh_n, dc_n)
    args = (*args, layer.cell, layer.directions, layer.save_every, mask)
    return (*args, layer.samples) if layer.samples else args


class LayerBackward(_SingleLevelFunction):
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
        batch_sizes, resets, _, _, _, *rest = tensors
        kept = (batch_sizes, resets, *rest)
        ctx.save_for_backward(*kept)
        if _follows_tangents():
            ctx.save_for_forward(*kept)
        return grads

    @staticmethod
    def backward(ctx, *grad_grads):
        if level := level_of(*grad_grads):
            run = partial(_second_derivatives, ctx.layer, ctx.mask, ctx.needs_input_grad[8:])
            found = each_example(run, level, list(grad_grads), *ctx.saved_tensors)
        else:
            found = _second_derivatives(
                ctx.layer, ctx.mask, ctx.needs_input_grad[8:], list(grad_grads), *ctx.saved_tensors
            )
        return (None,) * 8 + tuple(found)

    @staticmethod
    def jvp(ctx, *tangents):
        layer, mask = ctx.layer, ctx.mask
        batch_sizes, resets, *tensors = ctx.saved_tensors
        primals = [_primal(t) for t in tensors]
        moves = tangents[8:]
        moving = [k for k, t in enumerate(moves) if t is not None]
        gradients = gradients_of(layer, mask, batch_sizes, resets, INSIDE)
        call = with_moved(primals, moving, gradients)
        found = INSIDE.push(call, [primals[k] for k in moving], [moves[k] for k in moving])
        rest = iter(found)
        return tuple(next(rest) if want else None for want in (*mask[:-1], False))


class LayerTangents(_SingleLevelFunction):
    """The tangents of a layer's outputs; their derivatives are the reference's."""

    @staticmethod
    def forward(ctx, run, layer, batch_sizes, resets, y, gates, saved_states, x, *tensors):
        """tensors: the states and the weights, then a tangent of x and of each of them, or None."""
        count = (len(tensors) - 1) // 2
        state0, weights = layer.split(tensors[:count])
        out = run(
            *(x, batch_sizes, resets, state0, weights, y, gates, saved_states),
            *(list(tensors[count:]), layer.cell, layer.directions),
        )
        ctx.layer = layer
        if not layer.has_cell_state:
            ctx.mark_non_differentiable(out[2])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(batch_sizes, resets, x, *tensors)
        if _follows_tangents():
            ctx.save_for_forward(batch_sizes, resets, x, *tensors)
        return out

    @staticmethod
    def backward(ctx, *d_out):
        batch_sizes, resets, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[7:]
        moving = [k for k, need in enumerate(needs) if need and tensors[k] is not None]
        used = [k for k, d in enumerate(d_out) if d is not None and k < 1 + ctx.layer.outputs]
        found = [None] * len(tensors)
        if moving and used:
            of_all = tangents_of(ctx.layer, batch_sizes, resets, BETWEEN)
            of_all = with_moved(tensors, moving, of_all)

            def call(*moved):
                out = of_all(*moved)
                return tuple(out[k] for k in used)

            grads = BETWEEN.pull(call, [tensors[k] for k in moving], [d_out[k] for k in used])
            found = replaced(found, moving, grads)
        return (None,) * 7 + tuple(found)

    @staticmethod
    def jvp(ctx, *tangents):
        layer = ctx.layer
        batch_sizes, resets, *tensors = ctx.saved_tensors
        primals = [_primal(t) for t in tensors]
        moves = tangents[7:]
        moving = [k for k, t in enumerate(moves) if t is not None]
        call = with_moved(primals, moving, tangents_of(layer, batch_sizes, resets, INSIDE))
        out = INSIDE.push(call, [primals[k] for k in moving], [moves[k] for k in moving])
        return out[0], out[1], out[2] if layer.has_cell_state else None


def _second_derivatives(layer, mask, needs, grad_grads, batch_sizes, resets, *tensors):
    """Gradients of (dy, dh_n, dc_n, x, *state0, *weights), None where needs is not set."""
    weights = [g for g, want in zip(grad_grads[:-1], mask[:-1], strict=True) if want]
    used = [k for k, g in enumerate(weights) if g is not None]
    moving = [k for k, need in enumerate(needs) if need and tensors[k] is not None]
    found = [None] * len(tensors)
    if not used or not moving:
        return found
    of_all = gradients_of(layer, mask, batch_sizes, resets, BETWEEN)
    gradients = with_moved(tensors, moving, of_all)

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


def differentiates(*tensors):
    """Whether this level records tensors' history, or follows their tangents."""
    if _follows_tangents():
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def below(op, keyset):
    """The operator for the level below, which may record gradients and tangents."""

    def run(*args):
        with (
            torch.enable_grad(),
            forward_ad._set_fwd_grad_enabled(True),
            torch._C._AutoDispatchBelowAutograd(),
        ):
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return run


def _forward_kernel(keyset, *args):
    x, batch_sizes, resets, state0, weights, cell, directions, cell_states, save_every = args
    if not differentiates(x, *state0, *weights):
        with torch._C._AutoDispatchBelowAutograd():
            return forward_op.redispatch(keyset & torch._C._after_autograd_keyset, *args)
    layer = Layer(cell, directions, len(state0), cell_states, max(save_every, 1))
    with enable_single_level_autograd_function():
        run = below(forward_op, keyset)
        return record(run, layer, x, batch_sizes, resets, *state0, *weights)


def _backward_kernel(op, keyset, *args):
    x, batch_sizes, resets, state0, weights, y, gates, saved_states, *rest = args
    dy, dh_n, dc_n, cell, directions, save_every, mask, *samples = rest
    if not differentiates(x, *state0, *weights, dy, dh_n, dc_n):
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)
    cell_states = has_cell_states(dy, weights, cell, directions)
    layer = Layer(cell, directions, len(state0), cell_states, save_every, *samples)
    tensors = (batch_sizes, resets, y, gates, saved_states, dy, dh_n, dc_n, x, *state0, *weights)
    with enable_single_level_autograd_function():
        dx, dh0, dc0, *dweights, d_preacts = LayerBackward.apply(
            below(op, keyset), layer, mask, *tensors
        )
    return dx, dh0, dc0, dweights, d_preacts


def _jvp_kernel(keyset, *args):
    x, batch_sizes, resets, state0, weights, y, gates, saved_states, tangents, *rest = args
    if not differentiates(x, *state0, *weights, *tangents):
        with torch._C._AutoDispatchBelowAutograd():
            return jvp_op.redispatch(keyset & torch._C._after_autograd_keyset, *args)
    cell, directions = rest
    layer = Layer(cell, directions, len(state0), has_cell_states(y, weights, cell, directions))
    tensors = (batch_sizes, resets, y, gates, saved_states, x, *state0, *weights, *tangents)
    with enable_single_level_autograd_function():
        return LayerTangents.apply(below(jvp_op, keyset), layer, *tensors)


def register():
    """Register the rules as the operators' Autograd kernels."""
    kernels = {
        "recurrent_forward": _forward_kernel,
        "recurrent_backward": partial(_backward_kernel, backward_op),
        "recurrent_backward_samples": partial(_backward_kernel, samples_op),
        "recurrent_jvp": _jvp_kernel,
    }
    for name, kernel in kernels.items():
        library.impl(name, untraced(kernel), "Autograd", with_keyset=True)
