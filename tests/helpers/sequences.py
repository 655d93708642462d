"""Layers with resets, reset states, all cell states, documents and checkpoints.

A Sequence is a form for the programs of helpers/transforms.py, run by ops.layer or by the
reference, and a problem whose results are judged as in helpers/oracle.py. The peer is the reference
in the problem's own dtype, since torch.nn has no layer of this kind.

Sizes are T, N, I, H; R is proj or else H, D directions, S rows of packed data or of all documents.
"""

from dataclasses import dataclass
from functools import cached_property, partial

import torch

import lstm_fused
from lstm_fused import ops, reference
from lstm_fused.testing import tolerance
from tests.helpers import described
from tests.helpers.oracle import has_cell_state, module_of, reversed_layer

MASKS = ("none", "all", "first", "last", "adjacent", "random")
ROWS = ("dense", "packed", "documents")
DRAWS = 3  # of a problem's numbers, whose errors are compared together


@dataclass(frozen=True)
class Sequence:
    cell: str = "lstm"
    directions: int = 1
    rows: str = "dense"  # or another of ROWS
    mask: str = "random"  # of resets, one of MASKS, or "" for no resets at all
    state: str = "given"  # "none", "given", or "with reset": 2 * N rows
    cells: bool = False
    proj: int = 0
    bias: bool = True
    save_every: int = 1
    T: int = 4
    N: int = 3
    I: int = 3  # noqa: E741
    H: int = 5

    def __post_init__(self):
        """Compute what is cached, outside of every transform."""
        for name in ("names", "lengths", "batch_sizes", "resets"):
            getattr(self, name)

    def __str__(self):
        words = [self.cell, self.rows if self.rows != "dense" else "", self.mask, self.state]
        words += ["both" if self.directions > 1 else "", "cells" if self.cells else ""]
        words += [f"proj{self.proj}" if self.proj else "", "" if self.bias else "nobias"]
        words += [f"every{self.save_every}" if self.save_every > 1 else ""]
        return " ".join(filter(None, words))

    def module(self):
        """A module with the layer's parameters."""
        torch.manual_seed(1)
        return module_of(
            self.cell,
            lstm_fused,
            self.I,
            self.H,
            bidirectional=self.directions == 2,
            bias=self.bias,
            dtype=torch.float64,
            **({"proj_size": self.proj} if self.proj else {}),
        )

    @cached_property
    def names(self):
        return [name for name, _ in self.module().named_parameters()]

    @cached_property
    def lengths(self):
        """Of each row: from 1 to T; of documents from 0 to T, in any order, not all 0."""
        generator = torch.Generator().manual_seed(self.T + 31 * self.N)
        least = 0 if self.rows == "documents" else 1
        lengths = torch.randint(least, self.T + 1, (self.N,), generator=generator)
        lengths[self.N // 2] = self.T
        return lengths if self.rows == "documents" else lengths.sort(descending=True).values

    @cached_property
    def batch_sizes(self):
        if self.rows == "dense":
            return None
        if self.rows == "documents":
            return torch.cat((torch.zeros(1, dtype=torch.int64), self.lengths.cumsum(0)))[None]
        return (torch.arange(self.T).unsqueeze(1) < self.lengths).sum(1)

    @property
    def shape(self):
        """Of all steps' rows."""
        return (self.T, self.N) if self.rows == "dense" else (int(self.lengths.sum()),)

    @cached_property
    def resets(self):
        """As the operators take them, or None."""
        return self.resets_of(0) if self.mask else None

    def resets_of(self, draw):
        generator = torch.Generator().manual_seed(draw)
        marked = torch.zeros(self.T, self.N, dtype=torch.uint8)
        if self.mask == "random":
            marked = torch.randint(0, 2, marked.shape, dtype=torch.uint8, generator=generator)
        at = {"all": slice(None), "first": 0, "last": -1, "adjacent": slice(-3, -1)}
        if self.mask in at:
            marked[at[self.mask]] = 1
        steps = torch.arange(self.T).unsqueeze(1)
        if self.mask == "last":  # of each row
            marked = (steps == self.lengths - 1).to(torch.uint8) if self.batched else marked
        if self.rows == "packed":
            marked = marked[steps < self.lengths]
        elif self.rows == "documents":
            marked = marked.T[(steps < self.lengths).T]
        return marked.unsqueeze(-1)

    @property
    def batched(self):
        return self.rows != "dense"

    @property
    def widths(self):
        """Of the states."""
        return described.widths_of(self.cell, self.H, self.proj or self.H)

    def inputs(self, draw=0):
        """x and the states, as a tuple."""
        generator = torch.Generator().manual_seed(2 + draw)

        def normal(*shape):
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        rows = self.N * (2 if self.state == "with reset" else 1)
        x = normal(*self.shape, self.I)
        if self.state == "none":
            return (x,)
        states = tuple(normal(self.directions, rows, width) for width in self.widths)
        return x, *described.proper_state(self.cell, states)

    def run(self, layer, weights, x, *states, resets=None):
        """(y, *final states, cell states if wanted) by ops.layer or one of the same arguments."""
        found = layer(
            x,
            self.batch_sizes,
            states,
            described.whole(self.cell, weights, self.directions, x),
            directions=self.directions,
            resets=self.resets if resets is None else resets,
            cell_states=self.cells,
        )
        y, ends, *cells = found
        return y, *ends, *cells

    def call(self, library):
        """f(weights by name, x, *states) -> tuple of outputs, by lstm_fused or the reference."""
        layer = self.layer if library is lstm_fused else reference.CELLS[self.cell]
        return lambda weights, *ts: self.run(layer, [weights[n] for n in self.names], *ts)

    @property
    def layer(self):
        return partial(ops.layer, cell=self.cell, save_every=self.save_every)


def results(sequence, layer, dtype, compute, draw):
    """{name: tensor} of the outputs and all gradients, numbers of dtype computed in `compute`."""

    def leaf(t):
        return t.detach().to(dtype).to(compute, copy=True).requires_grad_()

    tensors = [leaf(t) for t in sequence.inputs(draw)]
    weights = {name: leaf(w) for name, w in sequence.module().named_parameters()}
    resets = sequence.resets_of(draw) if sequence.mask else None
    out = sequence.run(layer, list(weights.values()), *tensors, resets=resets)
    names = ["y", "h_n", "c_n", "c_n_all"] if has_cell_state(sequence.cell) else ["y", "h_n"]
    generator = torch.Generator().manual_seed(99 + draw)
    # Gradients of the outputs, drawn alike for all.
    cotangents = [
        torch.randn(t.shape, dtype=torch.float64, generator=generator).to(dtype).to(compute)
        for t in out
    ]
    cotangents = described.proper_cotangents(sequence.cell, cotangents, dtype)
    torch.autograd.backward(out, cotangents)
    found = dict(zip(names, [t.detach() for t in out], strict=False))
    leaves = {**dict(zip(("x", "h0", "c0"), tensors, strict=False)), **weights}
    return found | {f"d_{name}": t.grad for name, t in leaves.items()}


def violations(sequence, dtype):
    """A line for each tensor whose error exceeds its tolerance."""
    naive = reference.CELLS[sequence.cell]
    exact_layer = partial(reversed_layer, sequence.cell, naive)
    errors, limits, largest = {}, {}, {}
    for draw in range(DRAWS):
        exact = results(sequence, exact_layer, dtype, torch.float64, draw)
        peer = results(sequence, naive, dtype, dtype, draw)
        ours = results(sequence, sequence.layer, dtype, dtype, draw)
        assert ours.keys() == exact.keys()
        for name, t in exact.items():
            for kind, found in ((errors, ours), (limits, peer)):
                kind[name] = max(kind.get(name, 0.0), tolerance.error_of(found[name], t))
            assert ours[name].dtype is dtype
            largest[name] = max(largest.get(name, 0.0), t.abs().max().item() if t.numel() else 0)
    return [
        f"{name}: off by {error:.2e} > {limit:.2e}, the peer by {limits[name]:.2e}"
        for name, error in errors.items()
        if not error <= (limit := tolerance.allowed(name, dtype, limits[name], largest[name]))
    ]
