"""The CUDA kernels' source compiled for the host: every plan against nn.LSTM and the reference.

The emulated device is small, so that little problems are already shared out: 32 SMs, clusters of 4.
What it cannot show stands in tests/cuda/emulation/fibers.h.
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

import lstm_fused
from lstm_fused import cuda, ops
from lstm_fused.testing import tolerance
from tests.helpers import emulated, oracle
from tests.helpers.compare_modules import LAYER_ERRORS, assert_layer_raises
from tests.helpers.cuda_cases import (
    DESCRIBED,
    KINDS,
    PROJECTED,
    RESIDENT,
    SMALL,
    cases,
    check_layouts,
    expected,
    tf32,
)
from tests.helpers.oracle import Problem, check, expected_outcomes, run_module


@pytest.fixture(autouse=True)
def emulation():
    with emulated.kernels():
        yield


@pytest.mark.parametrize("kind", (None, *KINDS))
def test_described_cells_have_one_plan(kind):
    cuda.set_plan(kind)
    for problem in DESCRIBED[:1]:
        assert_ran(kind, problem, run_module(problem, lstm_fused))


def assert_ran(kind, problem, outcome):
    for pass_name, run in (("forward", outcome.forward_run), ("backward", outcome.backward_run)):
        wanted = (pass_name, str(problem.dtype).removeprefix("torch."), expected(kind, problem))
        assert (run["pass"], run["dtype"], run["kernel"]) == wanted


def goals_of(kind, problem):
    """Each plan with each dtype and cell, and with each problem in some dtype."""
    shape = replace(problem, dtype=torch.float32)
    return {(kind, problem.dtype), (kind, problem.cell), (kind, shape)}


@pytest.mark.covering(goals=goals_of)
@pytest.mark.parametrize(
    ("kind", "problem"),
    [pytest.param(k, p, id=f"{k}-{p}") for k, p in cases(SMALL, PROJECTED, RESIDENT, DESCRIBED)],
)
def test_agrees(kind, problem):
    cuda.set_plan(kind)
    assert_ran(kind, problem, check(problem))


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        *((kind, Problem(5, 19, 6, 100, directions=2, hx=True)) for kind in KINDS),
        ("grid", Problem(2, 3, 4, 400)),  # weights both in registers and in shared memory
        ("gemm", Problem(5, 19, 6, 100, cell="coupled_lstm", directions=2, hx=True)),
    ],
    ids=str,
)
def test_tf32(kind, problem):
    """The error is at most that of TF32's ten bits of mantissa, and larger than float32's."""
    cuda.set_plan(kind)
    with tf32(True):
        found = run_module(problem, lstm_fused)
    assert_ran(kind, problem, found)
    assert found.forward_run["tf32"] == found.backward_run["tf32"] == 1
    exact = expected_outcomes(problem)[1][0].tensors
    for name, truth in exact.items():
        error, largest = tolerance.error_of(found.tensors[name], truth), truth.abs().max().item()
        assert error <= torch.finfo(torch.float16).eps * largest, name
        assert error > torch.finfo(torch.float32).eps * largest, name


def test_layouts_of_x():
    check_layouts("cpu")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_reproducible(kind, dtype):
    problem = Problem(4, 19, 6, 40, dtype, form="unsorted", directions=2, hx=True)
    cuda.set_plan(kind)
    once, again = (run_module(problem, lstm_fused).tensors for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_subset(kind):
    """Frozen tensors and unused outputs do not change the other gradients."""
    cuda.set_plan(kind)
    problem = Problem(4, 5, 6, 40, directions=2, hx=True)
    values = oracle.values_of(problem)

    def gradients(frozen, c_n_too):
        module = problem.module(lstm_fused)
        module.load_state_dict(values.weights)
        leaves = dict(module.named_parameters())
        leaves |= {"x": values.x.clone(), "h0": values.state[0].clone()}
        leaves["c0"] = values.state[1].clone()
        for name, leaf in leaves.items():
            leaf.requires_grad_(name not in frozen)
        y, (h_n, c_n) = module(leaves["x"], (leaves["h0"], leaves["c0"]))
        outputs = [(y, values.cotangents[0]), (h_n, values.cotangents[1])]
        outputs += [(c_n, torch.zeros_like(c_n))] if c_n_too else []
        torch.autograd.backward(*map(list, zip(*outputs, strict=True)))
        return {name: leaf.grad for name, leaf in leaves.items()}

    every = gradients((), c_n_too=True)
    for frozen in (("x", "h0"), ("c0", "weight_ih_l0"), ("h0", "c0", "bias_hh_l0_reverse")):
        for name, grad in gradients(frozen, c_n_too=False).items():
            assert grad is None if name in frozen else torch.equal(grad, every[name]), name


def test_double_backward():
    """Second derivatives come from the reference, recorded on the fused forward pass."""
    module = lstm_fused.LSTM(3, 5, dtype=torch.float64)
    x = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    weights = tuple(module.parameters())

    def run(x, *weights):
        return ops.layer(x, None, (), weights)[0]

    assert torch.autograd.gradgradcheck(run, (x, *weights))


def test_no_rows_and_one_step():
    module = lstm_fused.LSTM(3, 5)
    y, (h_n, c_n) = module(torch.zeros(4, 0, 3, requires_grad=True))
    assert y.shape == (4, 0, 5) and h_n.shape == c_n.shape == (1, 0, 5)
    y.sum().backward()
    assert all(not p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("change, message", LAYER_ERRORS.values(), ids=LAYER_ERRORS)
def test_error_messages(change, message):
    assert_layer_raises(change, message)


def sanitized(*arguments, program="driver", **environment):
    """The driver, or bench's exchange, under the thread sanitizer."""
    emulated.ninja(program)
    command = [str(emulated.FOLDER / program), *arguments]
    env = dict(os.environ, TSAN_OPTIONS="halt_on_error=1 exitcode=66", **environment)
    if shutil.which("setarch"):  # the thread sanitizer does not work with address randomization
        command = ["setarch", os.uname().machine, "-R", *command]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)


@pytest.mark.full
def test_no_races():
    """Fibers in order, then twice in random order; the driver also compares with a plain loop."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = list(pool.map(lambda seed: sanitized(LSTM_FUSED_EMULATION_SEED=seed), "012"))
    for done in runs:
        assert done.returncode == 0, done.stdout + done.stderr
        assert re.search(r"\d\d+ runs, 0 failed", done.stdout)


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "missing"),
    [
        ("step", "block"),
        ("grid", "block"),
        ("grid", "counter"),
        ("cluster", "cluster"),
        ("cluster", "block"),
        ("step", "copies"),
        ("sums", "block"),
    ],
)
def test_missing_barrier_is_detected(kind, missing):
    done = sanitized(kind, LSTM_FUSED_EMULATION_WITHOUT=missing)
    assert done.returncode != 0
    assert "data race" in done.stderr or "failed" in done.stdout and ", 0 failed" not in done.stdout


@pytest.mark.full
def test_exchange_has_no_races():
    done = sanitized(program="exchange")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" 0 wrong") == 9


@pytest.mark.full
@pytest.mark.parametrize("missing", ["counter", "cluster", "copies"])
def test_exchange_detects_missing_barrier(missing):
    assert sanitized(program="exchange", LSTM_FUSED_EMULATION_WITHOUT=missing).returncode != 0
