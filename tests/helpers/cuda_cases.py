"""Problems for the CUDA kernels: small ones for emulation too, large ones for a device alone."""

from dataclasses import replace
from functools import partial
from itertools import product

import torch

from lstm_fused import cuda
from tests.helpers.oracle import Problem
from tests.helpers.plan_coverage import DTYPES

KINDS = cuda.KINDS
IN_STEPS = ("step", "gemm")  # plans for every dtype and projections
SMALL = (
    Problem(5, 19, 6, 40, hx=True),  # ragged tiles of units and rows
    Problem(6, 21, 5, 100, form="unsorted", directions=2, hx=True),
    Problem(4, 9, 6, 48, form="sorted", directions=2, bias=False),
    Problem(3, 5, 4, 140, layers=2, batch_first=True),  # more chunks of k than the ring has stages
    # More tiles of rows than groups of CTAs, on the emulated device.
    Problem(3, 200, 2, 40, directions=2),
    Problem(1, 3, 4, 40, hx=True),
    *(
        Problem(5, 19, 6, 40, cell=cell, form="unsorted", directions=2, hx=True)
        for cell in ("gru", "rnn_tanh", "rnn_relu")
    ),
)
# Weights of 16 bits both in registers and in shared memory, and several tiles of rows in turn.
HELD = (Problem(2, 40, 3, 300),)
PROJECTED = (
    Problem(5, 19, 6, 40, proj=11, directions=2, hx=True),
    Problem(6, 19, 6, 33, proj=17, directions=2, form="unsorted", hx=True),
    Problem(4, 3, 6, 20, proj=19, bias=False),
)
LARGE = (
    Problem(20, 16, 64, 256, directions=2, hx=True),
    Problem(20, 33, 64, 512, form="unsorted", hx=True),
    Problem(12, 20, 100, 800),
    Problem(12, 16, 64, 1024, directions=2),
    Problem(6, 300, 64, 640),
    Problem(4, 5, 64, 1900),
)


# How a matrix (rows, columns) may lie in memory.
LAYOUTS = {
    "rows": lambda draw, rows, columns: draw(rows, columns),
    "columns": lambda draw, rows, columns: draw(columns, rows).t(),
    "rows of more": lambda draw, rows, columns: draw(rows, 3, columns)[:, 1],
    "columns of more": lambda draw, rows, columns: draw(columns, 2, rows)[:, 1].t(),
    "neither": lambda draw, rows, columns: draw(rows, columns, 2)[..., 1],
    "one row again and again": lambda draw, rows, columns: draw(columns).expand(rows, columns),
}


def check_products(dtype, device):
    """The product by cuBLAS, of every layout and some sizes, with TF32 and without."""
    draw = partial(torch.randn, dtype=dtype, device=device)
    tiny = torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).eps
    for (left, of_a), (right, of_b) in product(LAYOUTS.items(), LAYOUTS.items()):
        for n, k, m in ((5, 40, 7), (1, 9, 4), (6, 1, 1), (1, 33, 1)):
            a, b = of_a(draw, n, k), of_b(draw, k, m)
            exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
            for allowed in (False, True):
                found = cuda.kernels.product(a, b, allowed)
                assert found.dtype is torch.promote_types(dtype, torch.float32), (left, right)
                narrow = allowed and dtype is torch.float32
                limit = torch.finfo(torch.float16).eps if narrow else (k + 1) * tiny
                error = (found - exact).abs()
                assert (error <= limit * size).all(), (left, right, n, k, m)
                assert not narrow or k < 9 or error.max() > tiny * size.max(), (left, right, n)


def tf32(allowed, cudnn=True):
    """A context in which recurrent layers may use TF32 or not, and torch.nn's cuDNN or not.

    A plain assignment is refused once any test has imported torch.testing._internal.
    """
    return torch.backends.cudnn.flags(enabled=cudnn, allow_tf32=allowed)


def cases(small, projected=(), held=()):
    """(kind, problem) for every dtype that has the plan; kinds in turn, their judges are one."""
    some = *product(projected, IN_STEPS), *product(held, ("grid",))
    for dtype in DTYPES:
        for problem, kind in (*product(small, KINDS), *some):
            if kind in IN_STEPS or dtype is not torch.float64:
                yield kind, replace(problem, dtype=dtype)


def expected(kind, problem):
    """The plan that runs when `kind` is forced and the device has room for it."""
    any_plan = problem.dtype is not torch.float64 and not problem.proj
    return kind if any_plan or kind in IN_STEPS else "step"
