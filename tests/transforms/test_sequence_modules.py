"""Modules called with resets, documents, lengths and all cell states, under every transform.

test_sequences.py does the same for one layer as a function; here the mask is the user's, there are
two layers, and the initial states and those that resets put in are two arguments.
"""

from dataclasses import dataclass

import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

import lstm_fused
from lstm_fused.testing.oracle import by_reference
from tests.helpers.oracle import CELLS, has_cell_state
from tests.helpers.transforms import TRANSFORMS, assert_close, run, total

T, N, I, H = 4, 3, 3, 5  # noqa: E741
LENGTHS = [2, 4, 3]  # of rows and documents
SIZES = [3, 3, 2, 1]  # of packed data
F64 = torch.float64


@dataclass(frozen=True)
class Called:
    """A module and the form of its call."""

    cell: str
    form: str  # "dense", "single", "packed", "lengths" or "documents"
    bidirectional: bool = False
    batch_first: bool = False
    cells: bool = False
    proj: int = 0
    checkpoint_every: int | None = None

    def __str__(self):
        words = [self.cell, self.form, "both" if self.bidirectional else ""]
        words += ["batch_first" if self.batch_first else "", "cells" if self.cells else ""]
        words += [f"proj{self.proj}" if self.proj else ""]
        words += [f"every{self.checkpoint_every}" if self.checkpoint_every else ""]
        return " ".join(filter(None, words))

    def module(self):
        name, more = CELLS[self.cell]
        torch.manual_seed(1)
        return getattr(lstm_fused, name)(
            *(I, H, 2),
            bidirectional=self.bidirectional,
            batch_first=self.batch_first,
            dtype=F64,
            **more | ({"proj_size": self.proj} if self.proj else {}),
        )

    @property
    def shape(self):
        if self.form in ("packed", "documents"):
            return (sum(SIZES),)
        if self.form == "single":
            return (T,)
        return (N, T) if self.batch_first else (T, N)

    def inputs(self):
        """x, the initial states, and one state for all rows that resets put in."""
        generator = torch.Generator().manual_seed(2)

        def draw(*shape):
            return torch.randn(*shape, dtype=F64, generator=generator)

        widths = (self.proj or H, H) if has_cell_state(self.cell) else (H,)
        layers = 2 * (1 + self.bidirectional)
        rows = () if self.form == "single" else (N,)
        initial = [draw(layers, *rows, width) for width in widths]
        return draw(*self.shape, I), *initial, *(draw(layers, width) for width in widths)

    def resets(self, seed=0):
        shape = self.shape
        if self.form == "packed":
            shape = (N, T) if self.batch_first else (T, N)
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4

    def call(self, library):
        """f(weights by name, x, *states) -> tuple of outputs."""
        of_resets = self.call_with_resets(library)
        resets = self.resets()
        return lambda weights, *given: of_resets(resets, weights, *given)

    def call_with_resets(self, library):
        module = self.module()
        if library == "reference":
            module = by_reference(module)
        options = {"return_cell_states": True} if self.cells else {}
        if self.checkpoint_every and library != "reference":
            options["checkpoint_every"] = self.checkpoint_every
        if self.form == "lengths":
            options["lengths"] = torch.tensor(LENGTHS)
        if self.form == "documents":
            options["cu_seqlens"] = torch.tensor([0, *LENGTHS]).cumsum(0)
        order = torch.tensor([1, 2, 0])
        packing = torch.tensor(SIZES), order, order.argsort()

        def call(resets, weights, x, *states):
            count = len(states) // 2
            hx, after = (s if count == 2 else s[0] for s in (states[:count], states[count:]))
            if self.form == "packed":
                x = PackedSequence(x, *packing)
            more = options | {"resets": resets, "reset_state": after}
            y, ends, *cells = functional_call(module, weights, (x, hx), more)
            y, *cells = (t.data if self.form == "packed" else t for t in (y, *cells))
            return y, *tree_leaves(ends), *cells

        return call


CALLED = [
    Called("lstm", "dense", bidirectional=True, batch_first=True, cells=True),
    Called("gru", "single"),
    Called("lstm", "packed", batch_first=True, cells=True, proj=2),
    Called("rnn_tanh", "packed", bidirectional=True),
    Called("lstm", "lengths", bidirectional=True, cells=True),
    Called("gru", "documents", bidirectional=True),
    Called("lstm", "documents", cells=True),
    Called("lstm", "dense", checkpoint_every=2),
]
each_called = pytest.mark.parametrize("called", CALLED, ids=str)


def goals_of(name, called):
    return {name, called}


@pytest.mark.covering(goals=goals_of)
@each_called
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transform(name, called):
    assert_close(run(name, called, lstm_fused), run(name, called, "reference"))


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


COMPILED = ("grad of all", "jvp", "per sample", "inner grad then backward")


@pytest.mark.covering(goals=goals_of)
@pytest.mark.usefixtures("fresh_compiler")
@each_called
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_transform(name, called):
    found = run(name, called, lstm_fused, lambda f: torch.compile(f, backend="aot_eager"))
    assert_close(found, run(name, called, "reference"))


@each_called
def test_vmap_of_resets(called):
    """A mask for each example; outputs, and gradients for each example's own."""
    masks = torch.stack([called.resets(seed) for seed in range(3)])
    weights = {k: w.detach() for k, w in called.module().named_parameters()}
    given = called.inputs()

    def gradients(library):
        call = called.call_with_resets(library)

        def loss(weights, mask, *given):
            return total(call(mask, weights, *given))

        return lambda mask: (call(mask, weights, *given), grad(loss)(weights, mask, *given))

    assert_close(vmap(gradients(lstm_fused))(masks), vmap(gradients("reference"))(masks))
