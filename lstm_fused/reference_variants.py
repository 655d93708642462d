"""References of options that no kernel has yet; see reference.py.

A step is as those in reference_steps.py. Sizes: n rows, I inputs, H hidden units, R recurrent
width.
"""

from functools import partial

import torch

from lstm_fused import reference
from lstm_fused.reference_steps import Cell, _linear


def _projected_lstm(x, state, w_ih, w_hh, b_ih, b_hh, w_hr, vectors, masks, proj_clip):
    """variational_lstm with a projection of h, R wide, and a clip of that, before zoneout of it.

    state: h as it is. masks: those of variational_lstm; the first R columns of those of h.
    """
    h, c = state
    p_i, p_f, p_o, clip, cell_clip = (v.detach() if k > 2 else v for k, v in enumerate(vectors))
    update, zone_c, zone_h, hidden = masks.unbind(1)
    zone_h, hidden = zone_h[:, : h.shape[1]], hidden[:, : h.shape[1]]
    preacts = _linear(x, w_ih, b_ih) + _linear(hidden * h, w_hh, b_hh)
    i, f, g, o = preacts.chunk(4, dim=1)
    i = torch.sigmoid(torch.clamp(i + p_i * c, -clip, clip))
    f = torch.sigmoid(torch.clamp(f + p_f * c, -clip, clip))
    g = update * torch.tanh(torch.clamp(g, -clip, clip))
    new = torch.clamp(f * c + i * g, -cell_clip, cell_clip)
    o = torch.sigmoid(torch.clamp(o + p_o * new, -clip, clip))
    h_new = (o * torch.tanh(new)) @ w_hr.t()
    if proj_clip is not None:
        h_new = h_new.clamp(-proj_clip, proj_clip)
    return zone_h * h + (1 - zone_h) * h_new, zone_c * c + (1 - zone_c) * new


def projected_lstm(proj_clip):
    """A layer with every option of RegularizedLSTM, of a projection; proj_clip: None for none."""
    step = partial(_projected_lstm, proj_clip=proj_clip)
    return partial(reference._layer, Cell(step, gates=4, cells=1, vectors=5, masks=4))
