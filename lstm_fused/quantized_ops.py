"""One recurrent layer with int8 or bfloat16 weights, for inference.

`layer` calls the operator `lstm_fused::quantized_forward`. The CPU's kernel reads the weights as
they are; elsewhere they become float32 and the float kernels run. There are no gradients: a call
may be recorded, backward raises. Sizes as in `ops`; weights as in `panels.plain_weights`.
"""

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction
from torch.library import register_fake, register_vmap

from lstm_fused import batching, by_reference, fakes, ops, padded
from lstm_fused.autograd import below, differentiates
from lstm_fused.cuda import CELLS
from lstm_fused.dynamo import untraced
from lstm_fused.export import zeros_state
from lstm_fused.observed import is_captured, is_transformed
from lstm_fused.operators import (
    forward_op,
    library,
    quantized_gradient_op,
    quantized_op,
    run_directly,
)
from lstm_fused.panels import plain_weights

NO_GRADIENTS = (
    "int8 and bfloat16 weights are for inference, gradients do not pass through them: "
    "lstm_fused.dequantize_(model) makes them parameters again"
)


def layer(
    x,
    batch_sizes,
    state0,
    weights,
    cell,
    directions,
    *,
    sizes,
    resets=None,
    cell_states=False,
    save_every=1,
):
    """`ops.layer` with quantized weights; x, states and results are float32.

    sizes: (hidden_size, proj_size), proj_size 0 without a projection. save_every is of no effect:
    nothing is kept for backward.
    """
    number = ops.CELLS[cell]["id"]
    if not state0 and torch.compiler.is_exporting():
        state0 = zeros_state(x, batch_sizes, _widths(number, *sizes), directions)  # as ops.layer
    args = x, batch_sizes, resets, state0, weights, *sizes, number, directions, cell_states
    observed = is_captured() or is_transformed()
    recorded = torch.is_grad_enabled() and any([t.requires_grad for t in (x, *state0)])
    found = quantized_op(*args) if observed or recorded else run_directly(quantized_op, *args)
    return _results(found, number, sizes, directions, cell_states)


def _widths(cell, hidden_size, proj_size):
    """Of the states."""
    both = proj_size or hidden_size, hidden_size
    return both if CELLS[cell]["carry"] == "cell" else both[:1]


def _results(found, cell, sizes, directions, cell_states):
    """The operator's results as ops.layer returns them."""
    y, *ends = found
    if CELLS[cell]["carry"] != "cell":
        return y, (ends[0],)
    if not cell_states:
        return y, tuple(ends)
    width = directions * _widths(cell, *sizes)[0]
    return y[..., :width], tuple(ends), y[..., width:]


def padded_layer(
    x,
    lengths,
    state0,
    weights,
    cell,
    directions,
    *,
    sizes,
    resets=None,
    cell_states=False,
    save_every=1,
):
    """`padded.layer` with quantized weights."""
    number = ops.CELLS[cell]["id"]
    if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
        # One operator of lengths, where ONNX would spell out the packing.
        plain = plain_weights(weights, number, directions, x.shape[-1], *sizes)
        more = {"resets": resets, "cell_states": cell_states}
        return padded.layer(x, lengths, state0, plain, cell, directions, **more)
    options = *sizes, number, directions, cell_states
    state0 = state0 or zeros_state(x, None, _widths(number, *sizes), directions)

    def run(rows, batch_sizes, anew, start):
        return quantized_op(rows, batch_sizes, anew, start, weights, *options)

    found = padded.by_packing(run, x, lengths, resets, state0)
    return _results(found, number, sizes, directions, cell_states)


def masked(*args, sizes, **options):
    """`padded.masked` with quantized weights."""

    def run(*args, **options):
        return layer(*args, sizes=sizes, **options)

    return padded.masked(*args, run=run, **options)


def reference(x, batch_sizes, state0, weights, cell, directions, *, sizes, **options):
    """`by_reference.layer` with quantized weights."""
    number = ops.CELLS[cell]["id"]
    weights = plain_weights(weights, number, directions, x.shape[-1], *sizes)
    return by_reference.layer(x, batch_sizes, state0, weights, cell, directions, **options)


# For each way to run a layer the same with quantized weights.
LAYERS = {
    ops.layer: layer,
    padded.layer: padded_layer,
    padded.masked: masked,
    by_reference.layer: reference,
}


@torch.library.impl(library, "quantized_forward", "CompositeExplicitAutograd")
def _by_dequantizing(x, batch_sizes, resets, state0, weights, *options):
    hidden_size, proj_size, cell, directions, cell_states = options
    plain = plain_weights(weights, cell, directions, x.shape[-1], hidden_size, proj_size)
    args = x, batch_sizes, resets, list(state0), plain, cell, directions, cell_states
    return forward_op(*args, 0)[:3]


@torch.library.impl(library, "quantized_gradient", "CompositeExplicitAutograd")
def _raise(t, d_out):
    raise RuntimeError(NO_GRADIENTS)


@register_fake("lstm_fused::quantized_gradient")
def _fake_gradient(t, d_out):
    return torch.empty_like(t)


@register_fake("lstm_fused::quantized_forward")
def _fake(x, batch_sizes, resets, state0, weights, *options):
    hidden_size, proj_size, cell, directions, cell_states = options
    N = fakes.batch_of(x, batch_sizes, state0[0] if state0 and resets is None else None)
    R, *of_cell_state = _widths(cell, hidden_size, proj_size)
    return (
        x.new_empty(*x.shape[:-1], directions * (R + hidden_size * cell_states)),
        x.new_empty(directions, N, R),
        x.new_empty(*((directions, N, hidden_size) if of_cell_state else (0,))),
    )


class LayerWithoutGradients(_SingleLevelFunction):
    """The forward pass of tensors that require gradients; backward raises.

    In a compiled graph it raises where backward runs, not where it is traced.
    """

    @staticmethod
    def forward(ctx, run, states, x, batch_sizes, resets, *rest):
        """states: how many; rest: the states, then the weights and the operator's numbers."""
        weights = [t for t in rest[states:] if isinstance(t, torch.Tensor)]
        numbers = rest[states + len(weights) :]
        out = run(x, batch_sizes, resets, list(rest[:states]), weights, *numbers)
        if CELLS[numbers[2]]["carry"] != "cell":
            ctx.mark_non_differentiable(out[2])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *rest[:states])
        return out

    @staticmethod
    def backward(ctx, *d_out):
        found = [None] * len(ctx.needs_input_grad)
        given = [d for d in d_out if d is not None]
        x, *state0 = ctx.saved_tensors
        for k, t in zip((2, *range(5, 5 + len(state0))), (x, *state0), strict=True):
            if given and ctx.needs_input_grad[k]:
                found[k] = quantized_gradient_op(t, given[0])
        return tuple(found)

    @staticmethod
    def jvp(ctx, *tangents):
        raise RuntimeError(NO_GRADIENTS)


def _autograd_kernel(keyset, *args):
    x, batch_sizes, resets, state0, weights, *numbers = args
    if not differentiates(x, *state0):
        with torch._C._AutoDispatchBelowAutograd():
            return quantized_op.redispatch(keyset & torch._C._after_autograd_keyset, *args)
    run = below(quantized_op, keyset)
    with enable_single_level_autograd_function():
        return LayerWithoutGradients.apply(
            run, len(state0), x, batch_sizes, resets, *state0, *weights, *numbers
        )


def _vmap_rule(info, in_dims, x, batch_sizes, resets, state0, weights, *options):
    """Examples become rows where they share the weights, else they run one after the other."""
    x_dim, sizes_dim, resets_dim, state_dims, weight_dims, *_ = in_dims
    several = any(d is not None for d in weight_dims) or batching.of_documents(batch_sizes)
    if several and sizes_dim is None:
        dims = (x_dim, resets_dim, *state_dims, *weight_dims)
        tensors = (x, resets, *state0, *weights)
        found = []
        for k in range(info.batch_size):
            own = [t if d is None else t.select(d, k) for t, d in zip(tensors, dims, strict=True)]
            states, rest = own[2 : 2 + len(state0)], own[2 + len(state0) :]
            found.append(quantized_op(own[0], batch_sizes, own[1], states, rest, *options))
        stacked = [torch.stack(ts) for ts in zip(*found, strict=True)]
        return tuple(stacked), (0,) * len(stacked)
    examples = batching.Examples(info, x, weights, weight_dims, batch_sizes, sizes_dim, False)
    out = quantized_op(
        examples.rows(x, x_dim),
        examples.batch_sizes,
        examples.rows(resets, resets_dim),
        [examples.rows(t, d) for t, d in zip(state0, state_dims, strict=True)],
        list(weights),
        *options,
    )
    parts = [examples.part(t) for t in out]
    return tuple(t for t, _ in parts), tuple(d for _, d in parts)


library.impl("quantized_forward", untraced(_autograd_kernel), "Autograd", with_keyset=True)
register_vmap(quantized_op, untraced(_vmap_rule))
