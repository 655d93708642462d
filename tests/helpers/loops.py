"""What the options beyond torch.nn stand for: torch.nn's layers called for one step of one row.

Sizes are T, N, I, H; R is proj_size or else H, L layers, D directions.
"""

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from tests.helpers.compare_modules import states_of


def by_steps(module, x, state=(), resets=None, reset_state=None, lengths=None, layer_of=None):
    """(y (T, N, D*R), final states, cell states (T, N, D*H) or None) of torch.nn's module.

    x: (T, N, I); state and reset_state: each (L*D, N, width), () or None for zeros; resets: (T, N),
    bool; lengths: N integers. y and the cell states are zero in the padding. layer_of: in place of
    one_layer.
    """
    directions = 2 if module.bidirectional else 1
    lengths = lengths or [x.shape[0]] * x.shape[1]
    finals, each = [], []
    for k in range(module.num_layers):
        each = []
        for d in range(directions):
            layer = (layer_of or one_layer)(module, k, d, x)
            row = k * directions + d
            begin = [s[row] for s in state] or zeros(module, x)
            after_reset = zeros(module, x) if reset_state is None else [s[row] for s in reset_state]
            each.append(one_direction(layer, x, begin, resets, after_reset, lengths, d))
        finals += [ends for _, ends in each]
        x = torch.cat([histories[0] for histories, _ in each], -1)
    ends = tuple(torch.stack(s) for s in zip(*finals, strict=True))
    cells = torch.cat([h[2] for h, _ in each], -1) if len(ends) == 2 else None
    return x, ends, cells


def one_layer(module, k, d, x):
    """A function (x (1, 1, I), hx) of layer k in direction d, with the module's weights."""
    options = {"bias": module.bias, "dtype": x.dtype, "device": x.device}
    if module.mode == "LSTM":
        options["proj_size"] = module.proj_size
    elif module.mode != "GRU":
        options["nonlinearity"] = module.nonlinearity
    kind = next(c for c in (nn.LSTM, nn.GRU, nn.RNN) if isinstance(module, c))
    with torch.random.fork_rng(devices=[]):
        layer = kind(x.shape[2], module.hidden_size, **options)
    suffix = f"_l{k}{'_reverse' if d else ''}"
    weights = {
        name: getattr(module, name.removesuffix("_l0") + suffix) for name in layer.state_dict()
    }
    return lambda *given: functional_call(layer, weights, given)


def zeros(module, x):
    widths = [module.proj_size or module.hidden_size, module.hidden_size]
    widths = widths[: 2 if module.mode == "LSTM" else 1]
    if hasattr(module, "_state_widths"):  # of ours
        widths = module._state_widths()
    return [x.new_zeros(x.shape[1], w) for w in widths]


def one_direction(layer, x, begin, resets, after_reset, lengths, backwards):
    """Output and states (T, N, width) of each step, and the last states (N, width).

    begin: each (N, width).
    """
    T, N = x.shape[:2]
    histories = [[[None] * T for n in range(N)] for _ in (None, *begin)]
    ends = []
    for n in range(N):
        state = [s[n] for s in begin]
        order = range(lengths[n])
        for t in reversed(order) if backwards else order:
            boundary = t + 1 if backwards else t
            if resets is not None and boundary < lengths[n] and resets[boundary, n]:
                state = [s[n] for s in after_reset]
            hx = [s.view(1, 1, -1) for s in state]
            y, hx = layer(x[t, n].view(1, 1, -1), hx[0] if len(hx) == 1 else tuple(hx))
            state = [s.view(-1) for s in states_of(hx)]
            for history, s in zip(histories, (y.view(-1), *state), strict=True):
                history[n][t] = s
        ends.append(state)
    histories = [
        torch.stack([_with_padding(row, history) for row in history], dim=1)
        for history in histories
    ]
    return histories, [torch.stack(s) for s in zip(*ends, strict=True)]


def _with_padding(row, rows):
    """(T, width) of the steps of a row, None in the padding; rows: those of all rows."""
    like = next(s for r in rows for s in r if s is not None)
    return torch.stack([torch.zeros_like(like) if s is None else s for s in row])


def as_hx(module, state):
    """A tuple of states as the module takes them; None for () and None."""
    return None if not state else state[0] if len(state) == 1 else tuple(state)


# A call of the module in each form of input, its arguments and results as by_steps has them.


def dense(module, x, state=(), resets=None, reset_state=None, lengths=None, **more):
    """Also with lengths, as the argument of that name."""

    def turned(t):
        return t.transpose(0, 1) if module.batch_first and t is not None else t

    if lengths is not None:
        more["lengths"] = lengths
    more |= {"resets": turned(resets), "reset_state": as_hx(module, reset_state)}
    y, ends, *cells = module(turned(x), as_hx(module, state), **more)
    return turned(y), states_of(ends), turned(cells[0]) if cells else None


def unbatched(module, x, state=(), resets=None, reset_state=None, lengths=None, **more):
    """x (T, 1, I)."""
    state, reset_state = (
        as_hx(module, s and [t.squeeze(1) if t.dim() == 3 else t for t in s])
        for s in (state, reset_state)
    )
    resets = None if resets is None else resets.squeeze(1)
    more |= {"resets": resets, "reset_state": reset_state}
    y, ends, *cells = module(x.squeeze(1), state, **more)
    ends = tuple(s.unsqueeze(1) for s in states_of(ends))
    return y.unsqueeze(1), ends, cells[0].unsqueeze(1) if cells else None


def packed(module, x, state=(), resets=None, reset_state=None, lengths=None, **more):
    """resets padded."""
    data = pack_padded_sequence(x, lengths, enforce_sorted=False)
    if resets is not None and not isinstance(resets, PackedSequence) and module.batch_first:
        resets = resets.t()
    hx, reset_state = as_hx(module, state), as_hx(module, reset_state)
    found = module(data, hx, resets=resets, reset_state=reset_state, **more)
    y, ends, *cells = found
    y, *cells = (pad_packed_sequence(t, total_length=x.shape[0])[0] for t in (y, *cells))
    return y, states_of(ends), cells[0] if cells else None


def packed_resets(module, x, state=(), resets=None, reset_state=None, lengths=None, **more):
    """resets packed as x is."""
    if resets is not None:
        resets = pack_padded_sequence(resets, lengths, enforce_sorted=False)
    return packed(module, x, state, resets, reset_state, lengths, **more)


def documents(module, x, state=(), resets=None, reset_state=None, lengths=None, **more):
    """Rows one after the other."""
    T = x.shape[0]
    cu_seqlens = torch.tensor([0, *lengths], device=x.device).cumsum(0)

    def joined(t):
        return torch.cat([t[:length, n] for n, length in enumerate(lengths)])

    def apart(t):
        rows = t.split(list(lengths))
        return torch.stack([torch.cat((r, r.new_zeros(T - len(r), *r.shape[1:]))) for r in rows], 1)

    resets = None if resets is None else joined(resets)
    more |= {"resets": resets, "reset_state": as_hx(module, reset_state)}
    y, ends, *cells = module(joined(x), as_hx(module, state), cu_seqlens=cu_seqlens, **more)
    return apart(y), states_of(ends), apart(cells[0]) if cells else None


LENGTHS = (5, 0, 3, 1)
# {name: (a call, the lengths of 4 rows, or None for T each)}.
FORMS = {
    "dense": (dense, None),
    "lengths": (dense, LENGTHS),
    "sorted": (packed, (5, 3, 3, 1)),
    "unsorted": (packed, (2, 5, 1, 4)),
    "packed resets": (packed_resets, (2, 5, 1, 4)),
    "documents": (documents, LENGTHS),
}


def results(call, *args, leaves, cells=False, **more):
    """Outputs and gradients of leaves (a dict) by name; outputs are weighted, all differently.

    cells: whether the cell states of all steps are among the outputs.
    """
    if cells and call is not by_steps:
        more["return_cell_states"] = True
    y, ends, of_all_steps = call(*args, **more)
    found = {"y": y, **dict(zip(("h_n", "c_n"), ends, strict=False))}
    found |= {"cells": of_all_steps} if cells else {}
    outputs = [t for t in found.values() if t.requires_grad]
    if not outputs:
        return found
    weights = [torch.linspace(-1, 1, t.numel()).to(t.dtype).view_as(t) for t in outputs]
    grads = torch.autograd.grad(outputs, list(leaves.values()), weights, allow_unused=True)
    return found | {
        f"d_{name}": torch.zeros_like(leaf) if g is None else g
        for (name, leaf), g in zip(leaves.items(), grads, strict=True)
    }
