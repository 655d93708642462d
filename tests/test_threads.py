"""More than one thread at once, nested parallelism, and fork: right answers and no hang."""

import ctypes
import re
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from oracle import Problem, judges, misses, run_module

import lstm_fused
from lstm_fused import ops

PROBLEMS = (
    Problem(33, 3, 20, 100, hx=True),
    Problem(20, 40, 20, 70, form="unsorted", directions=2, proj=7),
    Problem(1, 1, 64, 260, hx=True),
    Problem(9, 6, 33, 65, torch.float64, layers=2),
    Problem(9, 6, 33, 65, torch.bfloat16, directions=2),
)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_python_threads_at_once(count, threads):
    """Forward and backward from several Python threads, each with a team of its own."""
    torch.set_num_threads(threads)
    for problem in PROBLEMS:
        assert problem.draws == 1
        judges(problem)
    together = threading.Barrier(count)

    def work(first):
        torch.set_num_threads(threads)
        together.wait(timeout=60)
        lines = []
        for k in range(10):
            problem = PROBLEMS[(first + k) % len(PROBLEMS)]
            lines += misses([run_module(problem, lstm_fused.LSTM).tensors], problem)
        return lines

    with ThreadPoolExecutor(count) as pool:
        lines = [line for lines in pool.map(work, range(count), timeout=240) for line in lines]
    assert not lines


def test_last_run_belongs_to_the_thread():
    lstm = lstm_fused.LSTM(3, 5)
    lstm(torch.zeros(9, 2, 3))
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(ops.last_run).result() == {}
        pool.submit(lstm.double(), torch.zeros(9, 2, 3, dtype=torch.float64)).result()
        assert pool.submit(ops.last_run).result()["dtype"] == "float64"
    assert ops.last_run()["dtype"] == "float32"


def openmp_in_use():
    """The OpenMP runtime that this process has loaded for torch and for us."""
    maps = Path("/proc/self/maps").read_text()
    found = set(re.findall(r"\S*lib(?:g|i)omp\S*", maps))
    assert len(found) == 1, f"two OpenMP runtimes compete: {found}"
    return ctypes.CDLL(found.pop())


def test_inside_a_parallel_region():
    """Called by the threads of somebody else's region, a layer uses the one thread it is on."""
    lstm = lstm_fused.LSTM(20, 100).requires_grad_(False)
    x = torch.randn(33, 3, 20)
    torch.set_num_threads(1)
    expected = lstm(x)[0]
    results = []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def region(_):
        y = lstm(x)[0]
        results.append((y, ops.last_run()["threads"]))

    openmp_in_use().GOMP_parallel(region, None, 3, 0)
    assert [threads for _, threads in results] == [1, 1, 1]
    assert all(torch.equal(y, expected) for y, _ in results)


def test_threads_follow_torch():
    lstm = lstm_fused.LSTM(64, 256).requires_grad_(False)
    x = torch.randn(9, 1, 64)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        lstm(x)
        assert ops.last_run()["threads"] == threads


def run_script(script, timeout=120):
    """The script in a Python of its own, so that a hang or a crash is a failure and no more."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        timeout=timeout,
        capture_output=True,
        text=True,
    )


def test_fork_after_use():
    """A forked child has no OpenMP pool: it computes on one thread; the parent goes on as before."""
    run = run_script("""
        import os, sys, torch, lstm_fused
        from lstm_fused import ops
        torch.set_num_threads(2)
        lstm = lstm_fused.LSTM(20, 100)
        x = torch.randn(33, 3, 20)
        with torch.no_grad():
            expected = lstm(x)[0]
        assert ops.last_run()["threads"] == 2, ops.last_run()
        child = os.fork()
        y = lstm(x)[0]
        y.backward(torch.ones_like(y))
        assert ops.last_run()["pass"] == "backward"
        assert ops.last_run()["threads"] == (2 if child else 1), ops.last_run()
        # Small tensors only: torch's own loops would wait for the pool that a child does not have.
        assert (y - expected).abs().max() < 1e-6 and lstm.bias_hh_l0.grad.isfinite().all()
        if not child:
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        print("done")
    """)
    assert run.stdout == "done\n", run.stderr


def test_fork_by_multiprocessing():
    run = run_script("""
        import multiprocessing, torch, lstm_fused
        torch.set_num_threads(2)
        lstm = lstm_fused.LSTM(20, 100).requires_grad_(False)
        x = torch.randn(33, 3, 20)
        expected = lstm(x)[0]
        def work(k):
            return bool((lstm(x)[0] - expected).abs().max() < 1e-6)
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map(work, range(8)) == [True] * 8
        assert torch.equal(lstm(x)[0], expected)
        print("done")
    """)
    assert run.stdout == "done\n", run.stderr


def test_openmp_grants_fewer_threads():
    """With a limit on OpenMP's threads the team is smaller than asked for, and the result right."""
    run = run_script("""
        import os
        os.environ["OMP_THREAD_LIMIT"] = "1"
        import torch, lstm_fused
        from lstm_fused import ops, reference
        lstm = lstm_fused.LSTM(20, 100).requires_grad_(False)
        x = torch.randn(33, 3, 20)
        torch.set_num_threads(2)
        limited = lstm(x)[0]
        assert ops.last_run()["threads"] == 1, ops.last_run()
        # Not nn.LSTM: oneDNN gives wrong numbers under such a limit.
        expected = reference.lstm_layer(x, None, (), lstm.all_weights[0])[0]
        assert (expected - limited).abs().max() < 1e-6
        print("done")
    """)
    assert run.stdout == "done\n", run.stderr
