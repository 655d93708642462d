"""Fake kernels: the shapes and dtypes of the operators' results, for torch.compile and export."""

import torch
from torch.library import register_fake

from lstm_fused import _plan, cuda, models
from lstm_fused.cuda import CELLS


def _batch_of(batch_sizes, state):
    """N of packed data: a state's if there is one, else only the data itself can tell."""
    if state is not None:
        return state.shape[-2]
    return torch.library.get_ctx().new_dynamic_size()


def _saved_shapes(x, rows, directions, hidden, preacts):
    """Of gates and saved states, beside models."""
    extents = {
        "rows": rows,
        "directions": directions,
        "blocks": (hidden + _plan.block - 1) // _plan.block,
        "preacts": preacts,
        "lanes": _plan.block,
        "units": hidden,
    }
    layout = cuda.saved_layout(x)
    return (tuple(extents[dim] for dim in layout[t]) for t in ("gates", "saved_states"))


def _compute_dtype(x):
    return torch.float64 if x.dtype is torch.float64 else torch.float32


@register_fake("lstm_fused::recurrent_forward")
def _forward(x, batch_sizes, state0, weights, cell, directions, training):
    info = CELLS[cell]
    lead = x.shape[:1] if models.several(weights) else ()
    hidden, width = weights[1].shape[-2] // info["gates"], weights[1].shape[-1]
    if batch_sizes is None:
        n, rows = x.shape[-2], x.shape[-3] * x.shape[-2]
    else:
        n, rows = _batch_of(batch_sizes, state0[0] if state0 else None), x.shape[-2]
    gates, saved_states = _saved_shapes(x, rows, directions, hidden, info["preacts"])
    saves_states = training and info["carry"] != "none"

    def maybe(wanted, *shape, dtype=x.dtype):
        return x.new_empty((*lead, *shape) if wanted else (0,), dtype=dtype)

    return (
        x.new_empty(*x.shape[:-1], directions * width),
        maybe(True, directions, n, width),
        maybe(info["carry"] == "cell", directions, n, hidden),
        maybe(training, *gates, dtype=_compute_dtype(x)),
        maybe(saves_states, *saved_states, dtype=_compute_dtype(x)),
    )


def _backward(x, batch_sizes, state0, weights, y, gates, saved_states, dy, dh_n, dc_n, *options):
    cell, directions, mask, *samples = options
    info = CELLS[cell]
    lead = x.shape[:1] if models.several(weights) else ()
    hidden, width = weights[1].shape[-2] // info["gates"], weights[1].shape[-1]
    rows = x.shape[-2] if batch_sizes is not None else x.shape[-3] * x.shape[-2]
    n = x.shape[-2]
    if batch_sizes is not None and (mask[1] or mask[2]):
        states = [t for t in (*state0, dh_n, dc_n) if t is not None]
        n = _batch_of(batch_sizes, states[0] if states else None)

    def wanted(want, shape, dtype=x.dtype):
        return x.new_empty(shape if want else (0,), dtype=dtype)

    def of_weight(w):
        return (*lead, *samples, *w.shape[len(lead) :])

    d_preacts = (*lead, rows, directions, info["preacts"], hidden)
    return (
        wanted(mask[0], x.shape),
        wanted(mask[1], (*lead, directions, n, width)),
        wanted(mask[2], (*lead, directions, n, hidden)),
        [wanted(want, of_weight(w)) for want, w in zip(mask[3:-1], weights, strict=True)],
        wanted(mask[-1], d_preacts, _compute_dtype(x)),
    )


@register_fake("lstm_fused::recurrent_jvp")
def _jvp(x, batch_sizes, state0, weights, y, gates, saved_states, tangents, cell, directions):
    return _forward(x, batch_sizes, state0, weights, cell, directions, False)[:3]


register_fake("lstm_fused::recurrent_backward")(_backward)
register_fake("lstm_fused::recurrent_backward_samples")(_backward)
