"""Parity of outputs, states and gradients with torch.nn and the float64 reference."""

from dataclasses import replace

import pytest
import torch

import lstm_fused
from lstm_fused import runtime
from tests.helpers import described, oracle
from tests.helpers.oracle import (
    EVERY_CELL,
    Problem,
    check,
    expected_outcomes,
    may_project,
    run_module,
    run_reference,
    signs_of,
    violations,
)
from tests.helpers.pairwise import pairs_of, pairwise
from tests.helpers.plan_coverage import DEVICES, DTYPES, assert_ran, isas_for

FACTORS = {
    "T": (1, 2, 33),
    "N": (1, 3, 64),
    "I": (1, 7, 16, 17, 100, 256),
    "H": (1, 7, 16, 17, 100, 256),
    "layers": (1, 2),
    "directions": (1, 2),
    "bias": (True, False),
    "proj": (True, False),
    "batch_first": (False, True),
    "form": ("dense", "sorted", "unsorted"),
    "hx": (True, False),
}
PROJ = {1: 0, 7: 3, 16: 1, 17: 16, 32: 5, 96: 32, 100: 33, 256: 100}  # of H; there is none below 1

OTHER_CELLS = tuple(c for c in EVERY_CELL if c != "lstm")
# Of cells that torch.nn does not have, which are judged by a loop in Python. 96: two heads.
SMALL = {"I": (1, 7, 17, 100), "H": (1, 7, 17, 32, 96, 100)}

EVERYTHING = {"layers": 3, "directions": 2, "proj": 5, "hx": True}
CORNERS = (
    Problem(5, 1, 7, 9, form="single"),
    Problem(5, 1, 7, 9, form="single", **EVERYTHING),
    Problem(5, 1, 7, 9, form="single", batch_first=True, bias=False),
    Problem(9, 5, 6, 11, **EVERYTHING),
    Problem(9, 5, 6, 11, form="unsorted", **EVERYTHING),
    # Every remainder of a tile of rows, and of the rows shared out to threads.
    *(Problem(3, rows, 5, 18) for rows in (2, 4, 5, 6, 7, 8, 11, 12, 13)),
    *(Problem(7, rows, 5, 18, form="unsorted") for rows in (2, 5, 6, 7, 13)),
    # Long in one direction only.
    Problem(400, 1, 3, 20),
    Problem(2, 700, 3, 20),
    Problem(2, 2, 2000, 5),
    Problem(2, 2, 3, 600),
    Problem(6, 8, 64, 1024),
    Problem(2, 3, 4, 300, proj=299),
    # Sums over very many rows.
    Problem(300, 64, 3, 16),
    Problem(300, 64, 3, 16, form="unsorted", proj=4),
)


def problems():
    found = []
    for seed, dtype in enumerate(DTYPES):
        for row in pairwise(FACTORS, seed):
            proj = PROJ[row["H"]] if row["proj"] else 0
            found.append(Problem(dtype=dtype, **row | {"proj": proj}))
        found += [replace(p, dtype=dtype) for p in CORNERS]
    for seed, cell in enumerate(OTHER_CELLS):
        sizes = SMALL if cell in described.CELLS else {}
        rows = pairwise(FACTORS | sizes | {"dtype": DTYPES}, 10 + seed)
        for row in rows:
            proj = PROJ[row["H"]] if row["proj"] and may_project(cell) and sizes else 0
            if not described.is_invariant(cell, row["I"], proj or row["H"]):
                found.append(Problem(cell=cell, **row | {"proj": proj}))
        if not sizes:
            found += [replace(p, cell=cell, proj=0) for p in CORNERS]
    return [replace(p, device=device) for device in DEVICES for p in found]


def cases():
    """ISA innermost, so that the expected results of a problem are computed once."""
    for p in problems():
        marks = [] if p.device == "cpu" else [getattr(pytest.mark, p.device)]
        for isa in isas_for(p.dtype, p.device):
            yield pytest.param(p, isa, id=f"{p}-{isa}", marks=marks)


def goals_of(problem, isa):
    """Each pair of a problem's factors, ISA included; each corner with each ISA."""
    p = problem
    kernel = {"cell": p.cell, "dtype": p.dtype, "isa": isa, "device": p.device}
    corner = replace(p, cell="lstm", dtype=torch.float32, device="cpu")
    if corner in CORNERS or replace(corner, proj=EVERYTHING["proj"]) in CORNERS:
        return pairs_of(kernel) | {(corner.T, corner.N, corner.H, corner.form, isa)}
    row = {name: getattr(p, name) for name in FACTORS} | {"proj": p.proj > 0} | kernel
    return pairs_of(row)


@pytest.mark.covering(goals=goals_of)
@pytest.mark.parametrize(("problem", "isa"), list(cases()))
def test_agrees(problem, isa):
    runtime.set_isa(isa)
    assert_ran(problem, isa, check(problem))


def test_wrong_relu_branch_is_detected(monkeypatch):
    """A wrong branch of relu far from 0 is an error: of the backward pass alone, and of both."""
    problem = Problem(9, 5, 6, 11, torch.bfloat16, 2, 2, cell="rnn_relu", form="unsorted", hx=True)
    found = [run_module(problem, lstm_fused, k).tensors for k in range(problem.draws)]
    assert violations(found, problem) == []
    preacts, signs = (
        expected_outcomes(problem)[1][0].preacts,
        signs_of(problem, lstm_fused, 0, found[0]["y"]),
    )
    step = max(range(len(preacts[0])), key=lambda k: preacts[0][k].max())
    signs[0][step] &= preacts[0][step] < preacts[0][step].max()
    wrong = run_reference(problem, 0, signs).tensors
    found[0] |= {k: t.to(problem.dtype) for k, t in wrong.items() if k.startswith("d_")}
    assert [line for line in violations(found, problem) if line.startswith("d_weight_ih_l0: off")]
    monkeypatch.setattr(
        oracle,
        "signs_of",
        lambda p, library, k, y: (
            signs if library is lstm_fused and k == 0 else signs_of(p, library, k, y)
        ),
    )
    assert [line.partition(":")[0] for line in violations(found, problem)] == ["relu_preact_l0"]


def test_design_covers_every_pair():
    rows = pairwise(FACTORS)
    covered = set().union(*map(pairs_of, rows))
    sizes = [len(values) for values in FACTORS.values()]
    assert len(covered) == (sum(sizes) ** 2 - sum(n * n for n in sizes)) // 2
    assert rows == pairwise(FACTORS)
    assert len(rows) < 50
