"""Fake kernels: the shapes and dtypes of the operators' results, for torch.compile and export."""

import torch
from torch.library import register_fake

from lstm_fused import _plan, cuda, layer_weights, models
from lstm_fused.cuda import CELLS
from lstm_fused.reference_derivatives import has_cell_states


def batch_of(x, batch_sizes, state):
    """N; of packed data a state's (..., N, width) if there is one, else only the data can tell."""
    if batch_sizes is None:
        return x.shape[-2]
    if batch_sizes.dim() == 2:  # of documents
        return batch_sizes.shape[1] - 1
    if state is not None:
        return state.shape[-2]
    return torch.library.get_ctx().new_dynamic_size()


def _saved_shapes(x, rows, directions, hidden, info):
    """Of gates and saved states, beside models."""
    carried = info["cells"] + info["keeps_hidden"] + info["groups"]
    extents = {
        "rows": rows,
        "directions": directions,
        "blocks": (hidden + _plan.block - 1) // _plan.block,
        "preacts": info["preacts"],
        "lanes": _plan.block,
        "units": hidden,
        "carried_lanes": carried * _plan.block,
        "carried_units": carried * hidden,
    }
    layout = cuda.saved_layout(x)
    return (tuple(extents[dim] for dim in layout[t]) for t in ("gates", "saved_states"))


def _compute_dtype(x):
    return torch.float64 if x.dtype is torch.float64 else torch.float32


@register_fake("lstm_fused::recurrent_forward")
def _forward(x, batch_sizes, resets, state0, weights, cell, directions, cell_states, save_every):
    info = CELLS[cell]
    lead = x.shape[:1] if models.several(weights) else ()
    hidden, width = layer_weights.widths(info, weights, directions)
    cell_width = info["cells"] * hidden
    rows = x.shape[-2] if batch_sizes is not None else x.shape[-3] * x.shape[-2]
    # With resets a state may have 2 * N rows.
    n = batch_of(x, batch_sizes, state0[0] if state0 and resets is None else None)
    gates, saved_states = _saved_shapes(x, rows, directions, hidden, info)
    saves_steps, saves_states = save_every > 0, save_every > 0 and info["carry"] != "none"
    if save_every > 1 and batch_sizes is None:
        chunks = (x.shape[-3] + save_every - 1) // save_every
        saves_steps, saves_states = False, True
        saved_states = (chunks - 1, directions, n, width + cell_width)

    def maybe(wanted, *shape, dtype=x.dtype):
        return x.new_empty((*lead, *shape) if wanted else (0,), dtype=dtype)

    return (
        x.new_empty(*x.shape[:-1], directions * (width + cell_width * cell_states)),
        maybe(True, directions, n, width),
        maybe(cell_width > 0, directions, n, cell_width),
        maybe(saves_steps, *gates, dtype=_compute_dtype(x)),
        maybe(saves_states, *saved_states, dtype=_compute_dtype(x)),
    )


def _backward(x, batch_sizes, resets, state0, weights, y, gates, saved_states, *rest):
    dy, dh_n, dc_n, cell, directions, save_every, mask, *samples = rest
    info = CELLS[cell]
    lead = x.shape[:1] if models.several(weights) else ()
    hidden, width = layer_weights.widths(info, weights, directions)
    rows = x.shape[-2] if batch_sizes is not None else x.shape[-3] * x.shape[-2]

    def wanted(want, shape, dtype=x.dtype):
        return x.new_empty(shape if want else (0,), dtype=dtype)

    def of_weight(w):
        return (*lead, *samples, *w.shape[len(lead) :])

    def of_state(k, width):
        if not mask[1 + k]:
            return x.new_empty(0)
        if state0:
            return torch.empty_like(state0[k], memory_format=torch.contiguous_format)
        ends = [t for t in (dh_n, dc_n) if t is not None]
        n = batch_of(x, batch_sizes, ends[0] if ends else None)
        return x.new_empty(*lead, directions, n, width)

    d_preacts = (*lead, rows, directions, info["preacts"], hidden)
    return (
        wanted(mask[0], x.shape),
        of_state(0, width),
        of_state(1, info["cells"] * hidden),
        [wanted(want, of_weight(w)) for want, w in zip(mask[3:-1], weights, strict=True)],
        wanted(mask[-1], d_preacts, _compute_dtype(x)),
    )


@register_fake("lstm_fused::recurrent_jvp")
def _jvp(
    x, batch_sizes, resets, state0, weights, y, gates, saved_states, tangents, cell, directions
):
    cell_states = has_cell_states(y, weights, cell, directions)
    call = (x, batch_sizes, resets, state0, weights, cell, directions, cell_states)
    return _forward(*call, 0)[:3]


register_fake("lstm_fused::recurrent_backward")(_backward)
register_fake("lstm_fused::recurrent_backward_samples")(_backward)
