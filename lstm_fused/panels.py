"""The forms of an int8 or bfloat16 weight: as in a state_dict, and as the kernels read it.

Sizes: G gates, U units of a gate (H; of a projection R, with G = 1), K columns. A weight is
(G*U, K), gate after gate in torch's order. Each row of an int8 weight is cut into groups of `GROUP`
consecutive columns, the last may be shorter; a group has one scale, and weight = q * scale.

Kernels read panels, (blocks, steps, G, 16, depth): entry [b, s, j, l, e] is unit 16*b + l of the
j-th gate they want, at column depth*s + e, zero where there is none; depth is 4 of int8, whose
panels are uint8 with 128 added, and 2 of bfloat16. Scales are (blocks, groups, G, 16).
"""

from typing import NamedTuple

import torch
from torch.nn.functional import pad

from lstm_fused import _plan
from lstm_fused.cuda import CELLS

DTYPES = torch.int8, torch.bfloat16
GROUP = _plan.quantization_group
_LANES = _plan.block
_LARGEST = 127  # of |q|
_CANDIDATES = 32  # of a group's scale
# Numbers that are tried with all candidates at a time: a core's cache holds them, and torch divides
# no fewer among threads.
_CHUNK = 1 << 15
_DEPTHS = {torch.int8: 4, torch.bfloat16: 2}  # consecutive columns in a lane
SIGN = 128  # the bit in which a byte and the same number with 128 added differ


class Form(NamedTuple):
    """What panels hold: U, K, and the gates in the order in which the kernels read them."""

    units: int
    columns: int
    gates: tuple[int, ...] = (0,)

    @property
    def shape(self):
        return len(self.gates) * self.units, self.columns

    @property
    def scale_shape(self):
        return len(self.gates) * self.units, -(-self.columns // GROUP)


class Forms(NamedTuple):
    """The forms of one direction's weights; w_hr is None without a projection."""

    w_ih: Form
    w_hh: Form
    w_hr: Form | None


def forms_of(cell, inputs, hidden_size, proj_size=0):
    """The Forms of a direction of a cell, by its number, with so many inputs."""
    info, R = CELLS[cell], proj_size or hidden_size
    return Forms(
        Form(hidden_size, inputs, info["input_gates"]),
        Form(hidden_size, R, info["hidden_gates"]),
        Form(proj_size, hidden_size) if proj_size else None,
    )


def quantized(w):
    """(q (G*U, K) int8, scales (G*U, groups) bfloat16) of a weight w (G*U, K), all finite.

    Of the `_CANDIDATES` bfloat16 numbers from max|w| / 127 of the group upwards, the scale is the
    one with the least squared error.
    """
    rows = max(1, _CHUNK // w.shape[1])
    parts = [_quantized_rows(part.to(torch.float32)) for part in w.detach().split(rows)]
    return tuple(torch.cat(each) for each in zip(*parts, strict=True))


def _quantized_rows(w):
    groups = pad(w, (0, -w.shape[1] % GROUP)).view(w.shape[0], -1, GROUP)
    # The bits of the smallest bfloat16 that is not below max|w| / 127, and is normal.
    largest = groups.abs().amax(-1, keepdim=True) / _LARGEST
    bits = ((largest.view(torch.int32) + 0xFFFF) >> 16).clamp_(min=0x80)
    best, least = None, None
    for k in range(_CANDIDATES):
        scale = ((bits + k) << 16).view(torch.float32)
        errors = (groups / scale).round_().mul_(scale).sub_(groups)
        error = errors.square_().sum(-1, keepdim=True)
        if best is None:
            best, least = scale, error
        else:
            best = torch.where(error < least, scale, best)
            least = torch.minimum(error, least)
    q = (groups / best).round_().to(torch.int8)
    return q.flatten(1)[:, : w.shape[1]], best.squeeze(-1).to(torch.bfloat16)


def dequantized(q, scales):
    """The float32 weight of q (G*U, K) and scales (G*U, groups); q alone if scales is None."""
    if scales is None:
        return q.to(torch.float32)
    each = scales.to(torch.float32).repeat_interleave(GROUP, 1)
    return q.to(torch.float32) * each[:, : q.shape[1]]


def packed(w, form):
    """The panels of a weight (G*U, K)."""
    U, K, gates = form
    depth = _DEPTHS[w.dtype]
    w = _ordered(w.detach().reshape(len(gates), U, K), gates)
    w = pad(w, (0, -K % depth, 0, -U % _LANES))
    w = w.view(len(gates), -1, _LANES, w.shape[2] // depth, depth)
    w = w.permute(1, 3, 0, 2, 4).contiguous()
    return w.view(torch.uint8).bitwise_xor_(SIGN) if w.dtype is torch.int8 else w


def unpacked(panels, form):
    """The weight (G*U, K) in panels."""
    U, K, gates = form
    if panels.dtype is torch.uint8:
        panels = (panels.to(torch.int16) - SIGN).to(torch.int8)
    w = panels.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)[:, :U, :K]
    return _ordered(w, inverse(gates)).flatten(0, 1)


def packed_scales(scales, form):
    """Scales (G*U, groups) as the kernels read them."""
    U, _, gates = form
    s = _ordered(scales.detach().reshape(len(gates), U, -1), gates)
    s = pad(s, (0, 0, 0, -U % _LANES)).view(len(gates), -1, _LANES, s.shape[2])
    return s.permute(1, 3, 0, 2).contiguous()


def unpacked_scales(scales, form):
    """The scales (G*U, groups) of what packed_scales gave."""
    U, _, gates = form
    s = scales.permute(2, 0, 3, 1).flatten(1, 2)[:, :U]
    return _ordered(s, inverse(gates)).flatten(0, 1)


def inverse(gates):
    """The place of each of torch's gates among gates."""
    return [gates.index(j) for j in range(len(gates))]


def _ordered(t, places):
    """t with these entries of its first dimension; without an index, which exports would keep."""
    return t if list(places) == sorted(places) else torch.stack([t[k] for k in places])


def plain_weights(weights, cell, directions, inputs, hidden_size, proj_size):
    """The weights of a layer in float32, as `ops.layer` takes them, of those of its quantized form.

    weights: for each direction [w_ih, s_ih, w_hh, s_hh] of uint8 panels or [w_ih, w_hh] of bfloat16
    ones, then [b_ih, b_hh] if there are biases, then [w_hr, s_hr] or [w_hr] with a projection.
    """
    forms = forms_of(cell, inputs, hidden_size, proj_size)
    each, has_scales = len(weights) // directions, weights[0].dtype is torch.uint8

    def take(part, form):
        w = unpacked(part.pop(0), form)
        return dequantized(w, unpacked_scales(part.pop(0), form) if has_scales else None)

    parts = [list(weights[d * each : (d + 1) * each]) for d in range(directions)]
    return [w for part in parts for w in in_torch_order(part, forms, has_scales, take)]


def in_torch_order(part, forms, has_scales, take):
    """One direction's weights and biases: of part, as plain_weights is given them.

    take(part, form): removes a weight, and its scales, from part's begin, and returns it.
    """
    yield take(part, forms.w_ih)
    yield take(part, forms.w_hh)
    if len(part) > (1 + has_scales) * (forms.w_hr is not None):
        yield part.pop(0)
        yield part.pop(0)
    if forms.w_hr is not None:
        yield take(part, forms.w_hr)
