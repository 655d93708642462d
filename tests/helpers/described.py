"""Described cells (csrc/cells/described.h) in tests: rows of a table, and layers of them.

A Layers module is called as torch.nn's are and has the parameters that a layer's weights are made
of, under torch.nn's names. `whole` adds what is no parameter: constants, which have no gradient,
and masks, which depend on the number of rows alone, so that whoever computes a problem finds the
same ones.

Sizes are T, N, I, H; R is proj or else H, D directions, S rows of packed data.
"""

import math
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import PackedSequence

from lstm_fused import ops, reference
from lstm_fused.reference_steps import CELLS as KNOWN


@dataclass(frozen=True)
class Row:
    w_hh: str = "full"  # or "heads", if H can be parted, or "none": it has no column
    projects: bool = False  # whether there may be a projection
    # The last vectors, where they are no parameters: bounds of clips, or an epsilon.
    constants: tuple = ()
    kinked: bool = False  # a slope jumps at 0: a rounding error may decide a gradient


CELLS = {
    "peephole_lstm": Row(projects=True),
    "regularized_lstm": Row(constants=("bound", "bound")),
    "regularized_gru": Row(constants=("bound",)),
    "coupled_lstm": Row(projects=True),
    "reset_before_gru": Row(),
    "mgu": Row(),
    "ind_rnn": Row("none", kinked=True),
    "ind_rnn_tanh": Row("none"),
    "sru": Row("none"),
    "qrnn": Row("none"),
    "min_gru": Row("none", kinked=True),
    "min_lstm": Row("none", kinked=True),
    "slstm": Row("heads"),
    "layer_norm_lstm": Row(projects=True, constants=("epsilon",)),
    "layer_norm_lstm_carried": Row(projects=True, constants=("epsilon",)),
    "layer_norm_gru": Row(constants=("epsilon",)),
}
# One for each thing that the kernels do differently: projections, masks and gates in two parts, a
# second product, no product with the hidden state, heads, normalisation. For tests of the kernels,
# which are the same for all described cells.
EACH_KIND = (
    *("peephole_lstm", "regularized_gru", "reset_before_gru", "ind_rnn_tanh", "slstm"),
    "layer_norm_lstm",
)
KINKED = tuple(cell for cell, row in CELLS.items() if row.kinked)
CLIPPED = tuple(cell for cell, row in CELLS.items() if "bound" in row.constants)
BLOCK = 16  # of a head's units, a multiple


def columns_of(cell, H, R):
    """Of w_hh."""
    form = CELLS[cell].w_hh if cell in CELLS else "full"
    return {"full": R, "none": 0, "heads": H if H % (2 * BLOCK) else H // 2}[form]


def widths_of(cell, H, R):
    """Of the states of any cell."""
    return (R, KNOWN[cell].cells * H) if KNOWN[cell].cells else (H,)


def proper_state(cell, states):
    """States as a call may be given them; states: normal numbers, h0 first."""
    if cell != "slstm" or len(states) < 2:
        return states
    h, cells = states
    c, n, m = cells.chunk(3, -1)
    return h, torch.cat((c, 1 + n.abs(), m), -1)


def proper_cotangents(cell, cotangents, dtype):
    """Gradients of y, h_n, c_n and the like, from which the gradients of an sLSTM can be computed.

    Its c and n are divided by exp(m), and m is the larger of two numbers. Which one is decided by
    rounding now and then, in 16 bits. A loss on h alone does not depend on it.
    """
    if cell != "slstm" or dtype.itemsize > 2:
        return cotangents
    return [*cotangents[:2], *map(torch.zeros_like, cotangents[2:])]


def is_sensitive(cell):
    """Whether a row now and then magnifies rounding errors a hundredfold, or does not, as they
    happen to fall: those of one computation are no measure for those of another."""
    return cell == "layer_norm_lstm_carried"


def is_invariant(cell, I, H):  # noqa: E741
    """Whether the normalized products of so few numbers do not depend on them, but for rounding."""
    return cell.startswith("layer_norm") and min(I, H) < 3


def masks_of(cell, shape, H, number):
    """Masks of rows of this shape, (*shape, M*H) in float64: the last of them 0 or 1 now and then.

    number: of the layer's direction.
    """
    width = KNOWN[cell].masks * H
    numbers = torch.arange(math.prod(shape) * width, dtype=torch.float64) + 7919 * number
    return ((numbers * 0.6180339887498949) % 1 * 5).floor().div(4).view(*shape, width)


def constants_of(cell, H):
    """(constants, H) in float64: most units have no bound."""
    bound = torch.full((H,), math.inf, dtype=torch.float64)
    bound[::4] = 1.0
    of = {"bound": bound, "epsilon": torch.full_like(bound, 1e-5)}
    return torch.stack([of[name] for name in CELLS[cell].constants])


def whole(cell, weights, directions, x):
    """A layer's weights: those that are parameters, flat, and per direction what is added to them.

    x: rows (T, N, I) or (S, I).
    """
    if cell not in CELLS:
        return list(weights)
    known, count = KNOWN[cell], len(CELLS[cell].constants)
    each, found = len(weights) // directions, []
    H = weights[0].shape[0] // known.gates
    for d in range(directions):
        own = list(weights[d * each : (d + 1) * each])
        if count:
            constants = constants_of(cell, H).to(x)
            has_vectors = known.vectors > count
            own.append(torch.cat((own.pop(), constants)) if has_vectors else constants)
        if known.masks:
            own.append(masks_of(cell, x.shape[:-1], H, d).to(x))
        found += own
    return found


def with_gradients(cell, weights, directions):
    """Of each of a layer's weights, whether it may have a gradient."""
    last = len(weights) // directions if KNOWN[cell].masks else 0
    return [not last or k % last != last - 1 for k in range(len(weights))]


class Layers(torch.nn.Module):
    """Layers of a described cell by ops.layer, or by the reference in their own dtype."""

    def __init__(
        self,
        cell,
        I,  # noqa: E741
        H,
        num_layers=1,
        bidirectional=False,
        bias=True,
        batch_first=False,
        proj_size=0,
        dtype=None,
        device=None,
        by_reference=False,
    ):
        super().__init__()
        self.cell, self.num_layers, self.batch_first = cell, num_layers, batch_first
        self.directions, self.by_reference = 1 + bidirectional, by_reference
        known, row, R = KNOWN[cell], CELLS[cell], proj_size or H
        columns = columns_of(cell, H, R)
        for k in range(num_layers):
            for d in range(self.directions):
                shapes = {
                    "weight_ih": (known.gates * H, self.directions * R if k else I),
                    "weight_hh": (known.gates * H, columns),
                }
                if bias:
                    shapes |= dict.fromkeys(("bias_ih", "bias_hh"), (known.gates * H,))
                if proj_size:
                    shapes["weight_hr"] = (R, H)
                if vectors := known.vectors - len(row.constants):
                    shapes["vectors"] = (vectors, H)
                for name, shape in shapes.items():
                    w = torch.rand(shape, dtype=dtype, device=device) * 2 - 1
                    suffix = f"_l{k}" + "_reverse" * d
                    self.register_parameter(name + suffix, torch.nn.Parameter(w * H**-0.5))

    def layer(self, x, batch_sizes, state0, weights):
        weights = whole(self.cell, weights, self.directions, x)
        args = (x, batch_sizes, state0, weights)
        if self.by_reference:
            return reference.CELLS[self.cell](*args, self.directions)
        return ops.layer(*args, self.cell, self.directions)

    def forward(self, input, hx=None):
        """What torch.nn's LSTM takes and returns if the cell has cell states, else its GRU: input
        (T, N, I), (N, T, I) with batch_first, (T, I), or a PackedSequence."""
        packed = isinstance(input, PackedSequence)
        x, batch_sizes, order, back = input if packed else (input, None, None, None)
        single, turned = x.dim() == 2 and not packed, self.batch_first and x.dim() == 3
        x = x.unsqueeze(1) if single else x.transpose(0, 1) if turned else x
        states = () if hx is None else (hx,) if torch.is_tensor(hx) else tuple(hx)
        states = tuple(s.unsqueeze(1) if single else s for s in states)
        states = tuple(s if order is None else s.index_select(1, order) for s in states)
        D, flat, ends = self.directions, list(self.parameters()), []
        each = len(flat) // self.num_layers
        for k in range(self.num_layers):
            own = tuple(s[k * D : (k + 1) * D] for s in states)
            x, end = self.layer(x, batch_sizes, own, flat[k * each : (k + 1) * each])
            ends.append(end)
        ends = tuple(torch.cat(parts) for parts in zip(*ends, strict=True))
        ends = tuple(s if back is None else s.index_select(1, back) for s in ends)
        ends = tuple(s.squeeze(1) if single else s for s in ends)
        y = x.squeeze(1) if single else x.transpose(0, 1) if turned else x
        y = PackedSequence(y, batch_sizes, order, back) if packed else y
        return y, ends if len(ends) > 1 else ends[0]
