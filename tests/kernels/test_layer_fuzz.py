"""Random problems on random numbers of threads, checked as in test_layer_parity."""

import pytest
import torch

from lstm_fused import runtime
from tests.helpers.oracle import CELLS, Problem, check, has_cell_state
from tests.helpers.plan_coverage import DTYPES, assert_ran, isas_for

pytest.importorskip("hypothesis")

from hypothesis import given
from hypothesis import strategies as st


@st.composite
def any_problem(draw):
    hidden = draw(st.integers(1, 70))
    cell = draw(st.sampled_from(tuple(CELLS)))
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
        proj=draw(st.integers(0, hidden - 1 if has_cell_state(cell) else 0)),
        batch_first=draw(st.booleans()),
        form=draw(st.sampled_from(("dense", "sorted", "unsorted"))),
        hx=draw(st.booleans()),
    )


@pytest.mark.full
@given(problem=any_problem(), data=st.data(), threads=st.integers(1, 5))
def test_random_problems(problem, data, threads):
    isa = data.draw(st.sampled_from(isas_for(problem.dtype)))
    torch.set_num_threads(threads)
    runtime.set_isa(isa)
    assert_ran(problem, isa, check(problem))
