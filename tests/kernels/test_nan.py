"""NaN and infinity: kernels propagate them as torch.nn does, and read no uninitialised memory."""

from dataclasses import replace
from itertools import product

import pytest
import torch

import lstm_fused
from lstm_fused import ops, runtime
from tests.helpers import described
from tests.helpers.compare_modules import states_of
from tests.helpers.oracle import (
    CELLS,
    EVERY_CELL,
    Problem,
    has_cell_state,
    may_project,
    run_module,
    values_of,
)
from tests.helpers.plan_coverage import DTYPES, isas_for

SMALL = Problem(5, 4, 6, 21, hx=True)
PROBLEMS = {
    "dense": SMALL,
    "direct": Problem(2, 3, 6, 21, hx=True),
    "packed": Problem(5, 4, 6, 21, hx=True, form="unsorted", directions=2),
    "projection": Problem(5, 4, 6, 21, hx=True, proj=9),
    "rows": Problem(5, 20, 6, 21, hx=True),
}
# {name of a tensor: index of the element that is set to one of the values below}; rows of weights
# are taken modulo their number.
PLACES = {
    "x first step": ("x", (0, 1, 2)),
    "x later step": ("x", (1, 0, 0)),
    "h0": ("h0", (0, 2, 3)),
    "c0": ("c0", (0, 2, -1)),
    "w_ih": ("weight_ih_l0", (25, 3)),
    "w_hh": ("weight_hh_l0", (-1, 0)),
    "b_ih": ("bias_ih_l0", (30,)),
    "dy": ("dy", 0),
    "dc_n": ("dc_n", (0, 1, 2)),
}
VALUES = {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf")}


def test_poison_is_on():
    """Output memory is NaN before a kernel writes it."""
    assert torch.ops.lstm_fused.poisoning()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saved_tensors_are_fully_written(dtype):
    """Tensors saved for backward are written completely, padding of the last block included."""
    for isa, hidden, cell in product(isas_for(dtype), (1, 5, 16, 21), EVERY_CELL):
        runtime.set_isa(isa)
        x = torch.ones(3, 2, 6, dtype=dtype)
        module = Problem(3, 2, 6, hidden, dtype, cell=cell).module(lstm_fused)
        weights = described.whole(cell, [w.detach() for w in module.parameters()], 1, x)
        _, _, _, gates, cells = torch.ops.lstm_fused.recurrent_forward(
            x, None, None, [], weights, ops.CELLS[cell]["id"], 1, False, 1
        )
        assert gates.isfinite().all() and cells.isfinite().all()


def with_value(problem, name, index, value):
    """The problem's own tensors, one element of which is changed until the end of the test."""
    values = values_of(problem, 0)
    named = {"x": values.x, **values.weights}
    named |= zip(("h0", "c0"), values.state, strict=False)
    named |= zip(("dy", "dh_n", "dc_n"), values.cotangents, strict=False)
    if name == "x" and problem.packed:  # a row that has every step
        index = (index[0], int(values.lengths.argmax()), index[2])
    if name in values.weights:
        index = (index[0] % len(named[name]), *index[1:])
    named[name][index] = value


def kinds(t):
    """0 for a finite number, 1 for NaN, 2 and 3 for the infinities."""
    return t.isnan().int() + 2 * t.isposinf().int() + 3 * t.isneginf().int()


@pytest.fixture
def put_value():
    yield with_value
    values_of.cache_clear()


def each_place():
    """A problem of each cell, a place that it has, and a value."""
    for cell, (name, problem), value in product(EVERY_CELL, PROBLEMS.items(), VALUES):
        # Of infinities torch's own formulas make NaN here and there.
        if (problem.proj and not may_project(cell)) or (cell not in CELLS and value != "nan"):
            continue
        of_cell = replace(problem, cell=cell)
        # What has no part in the cell.
        empty = [name for name, w in of_cell.module().named_parameters() if not w.numel()]
        empty += ["h0"] if empty and not ops.CELLS[cell]["keeps_hidden"] else []
        for place, (tensor, _) in PLACES.items():
            if tensor in empty or (tensor in ("c0", "dc_n") and not has_cell_state(cell)):
                continue
            yield pytest.param(of_cell, place, value, id=f"{value} {cell} {name} {place}")


def goals_of(problem, place, value):
    """All of the cells of torch.nn."""
    if problem.cell in CELLS:
        return {(problem, place, value)}
    return {(problem.cell, place), (problem.cell, problem)}


@pytest.mark.covering(goals=goals_of)
@pytest.mark.parametrize("problem, place, value", list(each_place()))
def test_nan_propagation(problem, place, value, put_value):
    """A NaN reaches the same rows, units and gradients as in torch.nn, and no others.

    An infinite dy of a GRU is inf - inf, NaN, in torch's formula, where ours may keep it infinite.
    """
    put_value(problem, *PLACES[place], VALUES[value])
    expected = {k: kinds(t) for k, t in run_module(problem, torch.nn).tensors.items()}
    kept = problem.cell == "gru" and place == "dy"
    if value == "nan":
        assert any(t.any() for t in expected.values())
    differ = []
    for isa in isas_for(problem.dtype):
        runtime.set_isa(isa)
        found = run_module(problem, lstm_fused).tensors
        for name, theirs in expected.items():
            ours = kinds(found[name])
            if ((ours != theirs) & ~(kept & (theirs == 1) & (ours > 1))).any():
                differ.append((isa, name))
    assert differ == []


@pytest.mark.parametrize("cell", EVERY_CELL)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_does_not_spread_between_rows(dtype, cell):
    """In every dtype and ISA: the row that has it, from the step that has it on."""
    for isa, rows in product(isas_for(dtype), (2, 7)):
        runtime.set_isa(isa)
        module = Problem(6, rows, 6, 21, dtype, cell=cell).module(lstm_fused)
        module.requires_grad_(False)
        x = torch.randn(6, rows, 6).to(dtype)
        x[3, 1, 5] = float("nan")
        y, ends = module(x)
        where = torch.zeros(6, rows, dtype=torch.bool)
        where[3:, 1] = True
        assert torch.equal(y.isnan(), where[..., None].expand_as(y))
        for end in states_of(ends):
            assert torch.equal(end.isnan(), where[-1][None, :, None].expand_as(end))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saturation_is_exact(dtype):
    """Pre-activations beyond every exponent give gates of exactly 0 and 1."""
    for isa in isas_for(dtype):
        runtime.set_isa(isa)
        module = lstm_fused.LSTM(1, 1, bias=False, dtype=dtype).requires_grad_(False)
        module.weight_hh_l0.zero_()
        large = torch.finfo(dtype).max ** 0.5
        module.weight_ih_l0[:] = torch.tensor([[large], [-large], [large], [large]], dtype=dtype)
        x = torch.full((6, 1, 1), large, dtype=dtype)
        y, (_, c_n) = module(x)
        assert c_n.item() == 1  # i = 1, f = 0, g = 1
        expected = torch.tanh(torch.ones((), dtype=torch.float64)).item()
        assert abs(y[-1].item() - expected) <= 2 * torch.finfo(dtype).eps
