"""Threads, processes and poisoned memory: none of them changes what a layer computes."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

import lstm_fused
from lstm_fused import runtime
from lstm_fused.testing.tolerance import allowed, error_of
from tests.helpers.oracle import Problem, run_module, run_reference
from tests.helpers.plan_coverage import DTYPES, isas_for

PROBLEMS = (
    Problem(20, 3, 6, 100),
    Problem(9, 40, 6, 33, hx=True),
    Problem(5, 1, 70, 64, directions=2, hx=True),
    Problem(6, 9, 5, 50, proj=20, layers=2, directions=2),
    Problem(8, 11, 5, 50, form="unsorted", hx=True),
    Problem(8, 6, 5, 40, form="sorted", proj=17, directions=2),
    Problem(2, 2, 5, 40),
    Problem(20, 3, 6, 100, cell="gru"),
    Problem(8, 11, 5, 50, form="unsorted", hx=True, directions=2, cell="gru"),
    Problem(9, 40, 6, 33, hx=True, cell="rnn_tanh"),
    Problem(20, 3, 6, 100, cell="rnn_relu"),
    Problem(9, 40, 6, 33, hx=True, cell="regularized_gru"),
    Problem(9, 11, 6, 50, form="unsorted", directions=2, cell="reset_before_gru"),
    Problem(20, 3, 6, 100, hx=True, cell="mgu"),
    Problem(9, 7, 6, 50, cell="ind_rnn_tanh"),
    Problem(20, 3, 6, 96, hx=True, cell="slstm"),
    Problem(8, 11, 5, 50, form="unsorted", hx=True, directions=2, cell="layer_norm_lstm"),
)


@pytest.fixture(autouse=True)
def two_threads(fixed_defaults):
    torch.set_num_threads(2)


def assert_agree(ours, exact, dtype, torchs=None):
    for name, truth in exact.items():
        largest = truth.abs().max().item() if truth.numel() else 0.0
        error = error_of(torchs[name], truth) if torchs else 0.0
        assert error_of(ours[name], truth) <= allowed(name, dtype, error, largest), name


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_thread_counts(problem):
    exact = run_reference(problem).tensors
    torchs = run_module(problem, torch.nn).tensors
    seen = set()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        ours = run_module(problem, lstm_fused)
        assert_agree(ours.tensors, exact, problem.dtype, torchs)
        for run in (ours.forward_run, ours.backward_run):
            groups = run["direction_groups"] * run["row_groups"] * run["unit_groups"]
            assert groups == run["threads"] <= threads
        seen.add(ours.forward_run["threads"])
    assert 1 in seen


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_are_those_of_the_plan(threads):
    """A large enough problem uses all threads, and the plan says how many."""
    torch.set_num_threads(threads)
    module, x = lstm_fused.LSTM(64, 256), torch.randn(30, 16, 64)
    with torch.no_grad():
        module(x)
    plan = runtime.plan("lstm", torch.float32, 30, 16, 64, 256, 256, 1)
    assert runtime.last_run()["threads"] == plan.threads
    assert plan.threads == 1 if threads == 1 else plan.threads > 1


def outcome(problem):
    """Every output and gradient of lstm_fused."""
    return run_module(problem, lstm_fused).tensors


def assert_same(found, expected):
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_python_threads_at_once():
    expected = {p: outcome(p) for p in PROBLEMS}
    start = threading.Barrier(4)

    def work(k):
        torch.set_num_threads(2)
        start.wait(timeout=60)
        for problem in (*PROBLEMS[k:], *PROBLEMS[:k]) * 3:
            found = run_module(problem, lstm_fused)
            assert_same(found.tensors, expected[problem])
            assert found.backward_run["pass"] == "backward"

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, k) for k in range(4)]:
            done.result(timeout=120)


def test_python_threads_share_a_module():
    module = lstm_fused.LSTM(6, 50, 2, bidirectional=True)
    inputs = [torch.randn(8, n, 6) for n in (1, 3, 16)]

    def gradients(x):
        y, _ = module(x)
        return torch.autograd.grad(y.square().sum(), list(module.parameters()))

    expected = [gradients(x) for x in inputs]
    with ThreadPoolExecutor(3) as pool:
        for k, found in enumerate(pool.map(gradients, inputs * 8)):
            torch.testing.assert_close(found, expected[k % 3])


def test_last_run_is_of_this_thread():
    lstm_fused.LSTM(3, 4)(torch.zeros(9, 2, 3))
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(runtime.last_run).result() == {}
    assert runtime.last_run()["dtype"] == "float32"


def test_isa_changes_while_others_run():
    """Each call runs one ISA from end to end."""
    problem = PROBLEMS[0]
    possible = []
    for isa in runtime.available_isas():
        runtime.set_isa(isa)
        possible.append(outcome(problem)["y"])
    stop = threading.Event()

    def switch():
        while not stop.is_set():
            for isa in runtime.available_isas():
                runtime.set_isa(isa)

    with ThreadPoolExecutor(1) as pool:
        switching = pool.submit(switch)
        try:
            for _ in range(20):
                y = outcome(problem)["y"]
                assert any(torch.equal(y, one) for one in possible)
        finally:
            stop.set()
        switching.result(timeout=60)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_inside_torch_parallelism():
    """torch.jit.fork runs on torch's inter-op pool; backward runs on autograd's own threads."""
    module, x = lstm_fused.LSTM(6, 50), torch.randn(8, 5, 6)
    expected = module(x)[0]
    futures = [torch.jit.fork(lambda: module(x)[0]) for _ in range(8)]
    for future in futures:
        assert torch.equal(torch.jit.wait(future), expected)


BUSY = "while True: pass"


def test_oversubscribed_cores():
    """A barrier that only spins would take a time slice a step here."""
    problem = PROBLEMS[0]
    exact = run_reference(problem).tensors
    torchs = run_module(problem, torch.nn).tensors
    cores = len(os.sched_getaffinity(0))
    background_load = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(cores)]
    try:
        torch.set_num_threads(3 * cores)
        for _ in range(3):
            assert_agree(outcome(problem), exact, problem.dtype, torchs)
        long = replace(problem, T=300)
        assert run_module(long, lstm_fused).tensors["y"].isfinite().all()
    finally:
        for process in background_load:
            process.kill()
            process.wait()


def run_script(script, timeout=60, **environment):
    found = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=dict(os.environ, **environment),
        timeout=timeout,
    )
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-4000:]
    return found.stdout


SETUP = """
import os, sys, torch, lstm_fused
from lstm_fused import runtime
torch.set_num_threads(2)
torch.manual_seed(0)
module, x = lstm_fused.LSTM(64, 256), torch.randn(30, 16, 64)
def work(_=0):
    y, _ = module(x)
    g = torch.autograd.grad(y.square().sum(), module.weight_hh_l0)[0]
    return y.detach(), g
first = work()
def right(found):
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(found, first))
assert runtime.last_run()["threads"] > 1, runtime.last_run()
"""

# A child compares small slices only: torch's own parallel loops hang after a fork.
FORK = """
def same(y):
    return torch.allclose(y[:2], first[0][:2], rtol=1e-4, atol=1e-4)
for _ in range(3):
    child = os.fork()
    if child == 0:
        with torch.no_grad():
            ok = same(module(x)[0]) and runtime.last_run()["threads"] == 1
            if os.fork() == 0:
                os._exit(0 if same(module(x)[0]) else 1)
        ok = ok and os.wait()[1] == 0
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert right(work()) and runtime.last_run()["threads"] > 1
"""

FORKED_POOL = """
import multiprocessing
def forward(_):
    with torch.no_grad():
        return torch.allclose(module(x)[0][:2], first[0][:2], rtol=1e-4, atol=1e-4)
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert all(pool.map(forward, range(6)))
assert right(work())
"""

LOADER = """
from torch.utils.data import DataLoader, Dataset
class Encoded(Dataset):
    def __len__(self):
        return 6
    def __getitem__(self, k):
        with torch.no_grad():
            return module(x)[0].sum()
found = [batch for batch in DataLoader(Encoded(), batch_size=2, num_workers=2)]
assert torch.allclose(torch.cat(found), first[0].sum().expand(6), rtol=1e-4)
assert right(work())
"""

FORK_BEFORE_USE = """
import torch, lstm_fused, os
from lstm_fused import runtime
torch.set_num_threads(2)
child = os.fork()
if child == 0:
    module, x = lstm_fused.LSTM(64, 256), torch.randn(30, 16, 64)
    module(x)[0].sum().backward()
    os._exit(0 if module.weight_hh_l0.grad.isfinite().all() else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.parametrize(
    "script",
    [SETUP + FORK, SETUP + FORKED_POOL, SETUP + LOADER, FORK_BEFORE_USE],
    ids=["fork", "pool", "DataLoader", "fork before use"],
)
def test_fork(script):
    run_script(script)


POISONED = replace(PROBLEMS[0], T=5, N=7, I=9, H=21)
POISON_SHAPES = (
    POISONED,
    replace(POISONED, T=1, N=1, I=1, H=1),
    replace(POISONED, T=3, N=2),
    replace(POISONED, N=33, I=70, H=16, hx=True),
    replace(POISONED, directions=2, layers=2, hx=True),
    replace(POISONED, proj=5, directions=2),
    replace(POISONED, form="unsorted", hx=True),
    replace(POISONED, form="sorted", proj=20, directions=2, bias=False),
    replace(POISONED, form="unsorted", hx=True, directions=2, cell="gru"),
    replace(POISONED, N=33, hx=True, cell="rnn_tanh"),
)


def poison_cases():
    for problem in POISON_SHAPES:
        for dtype in DTYPES:
            for isa in isas_for(dtype):
                yield replace(problem, dtype=dtype), isa


def check_poisoned():
    """In a process of its own: every output compared, so that a NaN anywhere fails."""
    for problem, isa in poison_cases():
        exact = run_reference(problem).tensors
        torchs = run_module(problem, torch.nn).tensors
        runtime.set_isa(isa)
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            ours = outcome(problem)
            assert_agree(ours, exact, problem.dtype, torchs)


def test_poisoned_memory():
    script = "from tests.kernels.test_threads import check_poisoned; check_poisoned()"
    run_script(script, LSTM_FUSED_POISON="1")
