"""A model that contains our modules with every option, for the tests of exports.

One export of all of them takes as long as one of each, so that a test is of one row of the result.
Sizes are T, N, I, H; L layers, D directions.
"""

import torch
from torch import nn
from torch.export import Dim

import lstm_fused
from tests.helpers.compare_modules import states_of
from tests.helpers.oracle import CELLS, has_cell_state
from tests.helpers.pairwise import pairwise

I, H, R = 3, 7, 4  # noqa: E741
SIZES = ((6, 5), (9, 2))  # T, N: as exported, and another
LAYER = {
    "cell": tuple(CELLS),
    "form": ("plain", "hx", "lengths", "hx and lengths"),
    "num_layers": (1, 2),
    "bidirectional": (False, True),
    "bias": (True, False),
    "batch_first": (False, True),
    "projection": (False, True),
}
# Cells that torch.nn has not and ONNX has, and the modules of every cell.
IN_ONNX = {
    "peephole_lstm": ("PeepholeLSTM", {}),
    "coupled_lstm": ("CoupledLSTM", {}),
    "reset_before_gru": ("ResetBeforeGRU", {}),
}
MODULES = CELLS | IN_ONNX
STEP = {"cell": tuple(CELLS), "form": ("step", "step and hx"), "bias": (True, False)}


def rows(layer=LAYER, step=STEP, seed=0):
    """Layers and single-step cells: {description: options}."""
    found = {}
    for row in (*pairwise(layer, seed), *pairwise(step, seed)):
        if not has_cell_state(row["cell"]):
            row.pop("projection", None)
        words = [row["cell"], row["form"]]
        words += [name for name, value in row.items() if value is True and name != "bias"]
        words += ["two layers"] if row.get("num_layers") == 2 else []
        words += ["no bias"] if row.get("bias") is False else []
        found[", ".join(words)] = row
    return found


class Row(nn.Module):
    """One layer or cell, and the arguments it takes of those that the model has."""

    def __init__(self, cell, form, projection=False, **options):
        super().__init__()
        kind, more = MODULES[cell]
        step = form.startswith("step")
        more = more | ({"proj_size": R} if projection else {})
        self.layer = getattr(lstm_fused, kind + "Cell" * step)(I, H, **more, **options)
        self.step, self.hx, self.lengths = step, "hx" in form, "lengths" in form
        self.width = R if projection else H
        self.count = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
        self.two_states = has_cell_state(cell)

    def forward(self, x, h, c, lengths):
        """x (T, N, I), h and c (4, N, H), lengths (N,) -> its outputs as a list."""
        hx = None
        if self.hx:
            h, c = h[: self.count, :, : self.width], c[: self.count]
            h, c = (h[0], c[0]) if self.step else (h, c)
            hx = (h, c) if self.two_states else h
        if self.step:
            return list(states_of(self.layer(x[0], hx)))
        x = x.transpose(0, 1) if self.layer.batch_first else x
        y, ends = self.layer(x, hx, lengths if self.lengths else None)
        return [y, *states_of(ends)]


class Model(nn.Module):
    """All rows, each applied to the same arguments."""

    def __init__(self, rows):
        super().__init__()
        self.rows = nn.ModuleList([Row(**row) for row in rows.values()])

    def forward(self, x, h, c, lengths):
        return [t for row in self.rows for t in row(x, h, c, lengths)]

    def results(self, names, tensors):
        """What an export gives, a list of tensors, by row."""
        tensors = iter(tensors)
        return {
            name: [next(tensors) for _ in range((0 if row.step else 1) + 1 + row.two_states)]
            for name, row in zip(names, self.rows, strict=True)
        }


def inputs(T, N):
    """x, h, c and lengths, one of them 0 and another T."""
    lengths = torch.arange(N) * 7 % (T + 1)
    lengths[-1] = T
    return torch.randn(T, N, I), torch.randn(4, N, H), torch.randn(4, N, H), lengths


def dynamic_shapes(T=True):
    """Any number of rows, and of steps unless T is False."""
    N = Dim("N", min=1)
    steps = {0: Dim("T", min=1)} if T else {}
    return {"x": steps | {1: N}, "h": {1: N}, "c": {1: N}, "lengths": {0: N}}
