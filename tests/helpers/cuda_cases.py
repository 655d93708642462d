"""Problems for the CUDA kernels: small ones for emulation and devices, large ones for devices."""

from dataclasses import replace
from itertools import product

import torch

import lstm_fused
from lstm_fused import cuda
from tests.helpers import described
from tests.helpers.oracle import Problem
from tests.helpers.plan_coverage import DTYPES

KINDS = cuda.KINDS
STEPWISE = ("step", "gemm")  # plans for every dtype and projections
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
RESIDENT = (Problem(2, 40, 3, 300),)
PROJECTED = (
    Problem(5, 19, 6, 40, proj=11, directions=2, hx=True),
    Problem(6, 19, 6, 33, proj=17, directions=2, form="unsorted", hx=True),
    Problem(4, 3, 6, 20, proj=19, bias=False),
)
# Described cells have the gemm plan alone.
DESCRIBED = (
    *(
        Problem(5, 19, 6, 40, cell=cell, form="unsorted", directions=2, hx=True)
        for cell in described.CELLS
    ),
    Problem(4, 9, 6, 96, cell="slstm", directions=2, bias=False),  # two heads, in whole blocks
    Problem(3, 5, 4, 35, cell="slstm", layers=2, batch_first=True),
    # Cells that normalize: more units than a CTA has threads, and one unit.
    Problem(3, 4, 5, 300, cell="layer_norm_lstm", hx=True),
    Problem(3, 4, 5, 257, cell="layer_norm_lstm_carried", form="sorted"),
    Problem(3, 4, 5, 530, cell="layer_norm_gru", directions=2),
    Problem(4, 9, 6, 33, cell="layer_norm_lstm", proj=17, directions=2, hx=True),
    Problem(5, 19, 6, 40, cell="peephole_lstm", proj=11, form="unsorted", hx=True),
    Problem(4, 9, 6, 33, cell="coupled_lstm", proj=17, bias=False),
    Problem(3, 5, 4, 70, cell="sru", layers=2, batch_first=True),
    Problem(1, 3, 4, 40, cell="min_gru", hx=True),
)
LARGE = (
    Problem(20, 16, 64, 256, directions=2, hx=True),
    Problem(20, 33, 64, 512, form="unsorted", hx=True),
    Problem(12, 20, 100, 800),
    Problem(12, 16, 64, 1024, directions=2),
    Problem(6, 300, 64, 640),
    Problem(4, 5, 64, 1900),
)


# Memory layouts of x (T, N, I).
LAYOUTS = {
    "batch first": lambda T, N, I: torch.randn(N, T, I).transpose(0, 1),  # noqa: E741
    "every other row": lambda T, N, I: torch.randn(T, 2 * N, I)[:, ::2],  # noqa: E741
    "every other step": lambda T, N, I: torch.randn(2 * T, N, I)[::2],  # noqa: E741
    "columns of more": lambda T, N, I: torch.randn(T, N, I + 3)[..., :I],  # noqa: E741
    "columns first": lambda T, N, I: torch.randn(I, T, N).movedim(0, 2),  # noqa: E741
    "one row again and again": lambda T, N, I: torch.randn(T, 1, I).expand(T, N, I),  # noqa: E741
    "one step again and again": lambda T, N, I: torch.randn(N, I).expand(T, N, I),  # noqa: E741
}


def check_layouts(device):
    """Results are bitwise the same for every memory layout of x, copied by the operator or not."""
    for name, draw in LAYOUTS.items():
        for T, N in ((3, 5), (1, 5), (3, 1)):
            with torch.device(device):
                x = draw(T, N, 6)
            layer = lstm_fused.LSTM(6, 9, device=device)
            outputs = []
            for given in (x, x.contiguous()):
                leaf = given.detach().requires_grad_()
                y, _ = layer(leaf)
                outputs.append((y, *torch.autograd.grad(y.sum(), [leaf, *layer.parameters()])))
            assert all(map(torch.equal, *outputs)), (name, T, N)


def tf32(allowed, cudnn=True):
    """A context in which recurrent layers may use TF32 or not, and torch.nn's cuDNN or not.

    A plain assignment raises once any test has imported torch.testing._internal.
    """
    return torch.backends.cudnn.flags(enabled=cudnn, allow_tf32=allowed)


def cases(small, projected=(), resident=(), own=()):
    """(kind, problem) for every dtype that has the plan; own: of described cells.

    Kinds are innermost, so that the expected outcomes of a problem are computed once.
    """
    some = *product(projected, STEPWISE), *product(resident, ("grid",)), *product(own, ("gemm",))
    for dtype in DTYPES:
        for problem, kind in (*product(small, KINDS), *some):
            if kind in STEPWISE or dtype is not torch.float64:
                yield kind, replace(problem, dtype=dtype)


def expected(kind, problem):
    """The plan that runs when `kind` is forced and fits the device."""
    if problem.cell in described.CELLS:
        return "gemm"
    any_plan = problem.dtype is not torch.float64 and not problem.proj
    return kind if any_plan or kind in STEPWISE else "step"
