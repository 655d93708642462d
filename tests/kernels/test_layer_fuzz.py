"""Random problems on random numbers of threads, checked as in test_layer_parity."""

import pytest
import torch

from lstm_fused import runtime
from tests.helpers import described
from tests.helpers.oracle import EVERY_CELL, Problem, check, may_project
from tests.helpers.plan_coverage import DTYPES, assert_ran, isas_for

pytest.importorskip("hypothesis")

from hypothesis import assume, given
from hypothesis import strategies as st


@st.composite
def any_problem(draw):
    hidden = draw(st.integers(1, 70))
    cell = draw(st.sampled_from(EVERY_CELL))
    return Problem(
        cell=cell,
        T=draw(st.integers(1, 12)),
        N=draw(st.integers(1, 20)),
        I=draw(st.integers(1, 70)),
        H=hidden,
        dtype=draw(st.sampled_from(DTYPES)),
        layers=draw(st.integers(1, 3)),
        directions=draw(st.integers(1, 2)),
        bias=draw(st.booleans()),
        proj=draw(st.integers(0, hidden - 1 if may_project(cell) else 0)),
        batch_first=draw(st.booleans()),
        form=draw(st.sampled_from(("dense", "sorted", "unsorted"))),
        hx=draw(st.booleans()),
    )


@pytest.mark.full
@given(problem=any_problem(), data=st.data(), threads=st.integers(1, 5))
def test_random_problems(problem, data, threads):
    assume(not described.is_invariant(problem.cell, problem.I, problem.R))
    isa = data.draw(st.sampled_from(isas_for(problem.dtype)))
    torch.set_num_threads(threads)
    runtime.set_isa(isa)
    assert_ran(problem, isa, check(problem))
