"""Every path of the CPU kernels runs and agrees: cases are chosen by what the plan says of them."""

from itertools import product

import pytest
import torch

import lstm_fused
from lstm_fused import runtime
from tests.helpers import described
from tests.helpers.oracle import CELLS, Problem, check, may_project, run_module
from tests.helpers.plan_coverage import DTYPES, assert_ran, isas_for, planned

THREADS = (
    1,
    2,
    5,
)  # 5: no divisor, and more than the rows, directions or unit blocks of some problems
SHAPES = tuple(
    product((1, 2, 5, 33, 70), (1, 3, 5, 20, 40), ((25, 20), (20, 40), (33, 100), (24, 260)))
)
PATH_CELLS = (*CELLS, *described.EACH_KIND)
EXPECTED = {
    "forward persistent": {"alone", "directions", "rows", "units", "directions+rows"},
    "backward persistent": {"alone", "directions", "rows", "units", "directions+units"},
    "forward direct": {"alone", "directions", "units"},
}


def candidates(cell, dtype):
    """Small problems first, each with how many threads it is run on."""
    found = []
    for (T, N, (I, H)), directions, proj, hx in product(  # noqa: E741
        SHAPES, (1, 2), (0, 1) if may_project(cell) else (0,), (False, True)
    ):
        problem = Problem(
            T,
            N,
            I,
            H,
            dtype,
            directions=directions,
            proj=proj and H // 2,
            hx=hx,
            form=form_of(T, N),
            cell=cell,
        )
        found += [(problem, threads) for threads in THREADS]
    return sorted(found, key=lambda case: cost(case[0]) * case[1])


def cost(problem):
    """Proportional to the multiplications of a problem."""
    p = problem
    return p.T * p.N * (p.H + p.I) ** 2


def form_of(T, N):
    """Packed for some, so that every partition runs dense and packed data."""
    return "unsorted" if N > 1 and (T + N) % 2 else "dense"


def sharing(plan):
    """The dimensions that the plan splits among threads."""
    groups = ("direction_groups", "directions"), ("row_groups", "rows"), ("unit_groups", "units")
    return "+".join(word for key, word in groups if getattr(plan, key) > 1) or "alone"


def path_of(problem, plan, pass_name):
    """The properties of a plan and problem on which the kernel branches."""
    ahead = "none" if not plan.hoist_steps else "some" if plan.hoist_steps < problem.T else "all"
    return (
        f"{pass_name} {plan.kernel}",
        sharing(plan),
        ahead,
        problem.packed,
        problem.proj > 0,
    )


def paths_of(problem, isa, threads):
    return {
        path_of(problem, planned(problem, isa, threads, pass_name == "backward"), pass_name)
        for pass_name in ("forward", "backward")
    }


def chosen():
    """The smallest problems that take every path, for each cell, dtype and ISA."""
    cases = []
    for cell, dtype in product(PATH_CELLS, DTYPES):
        for isa in isas_for(dtype):
            seen = set()
            for problem, threads in candidates(cell, dtype):
                paths = paths_of(problem, isa, threads)
                if paths - seen:
                    seen |= paths
                    cases.append((problem, threads, isa))
    return sorted(cases, key=lambda case: (cost(case[0]), str(case)))


CASES = chosen()


def goals_of(problem, threads, isa):
    """Each path; each partition and share of hoisted steps on each ISA; each partition with each
    dtype and cell; each kernel with all three."""
    dtype, cell, goals = problem.dtype, problem.cell, set()
    for path in paths_of(problem, isa, threads):
        kernel, partition = path[0], path[:2]
        goals |= {path, (path[:3], isa), (partition, dtype), (partition, cell)}
        goals.add((kernel, isa, dtype, cell))
    return goals


@pytest.mark.covering(goals=goals_of)
@pytest.mark.parametrize(
    ("problem", "threads", "isa"), [pytest.param(*c, id="-".join(map(str, c))) for c in CASES]
)
def test_kernel_path(problem, threads, isa):
    torch.set_num_threads(threads)
    runtime.set_isa(isa)
    assert_ran(problem, isa, check(problem))


def test_every_partition_is_planned():
    """The cases reach every kind of partition, for each cell that multiplies its hidden state, each
    dtype and ISA."""
    recurrent = [cell for cell in PATH_CELLS if described.columns_of(cell, 32, 32)]
    for cell, dtype in product(recurrent, DTYPES):
        for isa in isas_for(dtype):
            reached = set()
            for problem, threads, case_isa in CASES:
                if (problem.cell, problem.dtype, case_isa) == (cell, dtype, isa):
                    reached |= {path[:2] for path in paths_of(problem, isa, threads)}
            for kernel, kinds in EXPECTED.items():
                if kernel == "forward direct" and cell in described.CELLS:
                    continue
                found = {kind for name, kind in reached if name == kernel}
                assert kinds <= found, (cell, dtype, isa, kernel)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize(
    "problem",
    [
        Problem(33, 3, 20, 100),
        Problem(20, 40, 20, 33, form="unsorted", layers=2, directions=2, hx=True),
        Problem(1, 1, 64, 260, hx=True),
        Problem(20, 40, 20, 33, torch.bfloat16),
        Problem(33, 3, 20, 100, cell="gru"),
        Problem(20, 40, 20, 33, form="unsorted", layers=2, hx=True, cell="rnn_tanh"),
        *(Problem(20, 9, 20, 96, form="unsorted", cell=cell) for cell in described.EACH_KIND),
    ],
    ids=str,
)
def test_bitwise_reproducible(problem, threads):
    torch.set_num_threads(threads)
    once, again = (run_module(problem, lstm_fused).tensors for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)
