"""OpenMP: one runtime for torch and lstm_fused, nested regions, thread limits."""

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

import lstm_fused
from lstm_fused import runtime

MAPS = """
import torch, lstm_fused
lstm_fused.LSTM(4, 4)(torch.randn(2, 2, 4))
print(open("/proc/self/maps").read())
"""


def runtimes(maps):
    """The OpenMP runtimes among the files that a process has mapped."""
    return set(re.findall(r"\S*/lib[gi]?omp\d*[-.]\S*", maps))


def test_one_runtime():
    """A second pool of threads would compete with torch's, and not follow its settings.

    In a process of its own: other packages of the tests, scikit-learn for one, bring theirs along.
    """
    command = [sys.executable, "-c", MAPS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(runtimes(done.stdout)) == 1, runtimes(done.stdout)


def test_threads_follow_torch():
    lstm = lstm_fused.LSTM(64, 256).requires_grad_(False)
    x = torch.randn(100, 32, 64)
    seen = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        lstm(x)
        seen.append(runtime.last_run()["threads"])
    assert seen[:2] == [1, 2] and 2 < seen[2] <= 5  # no more than pay


def test_inside_a_parallel_region():
    """Called inside of another OpenMP region, a layer uses the calling thread alone."""
    lstm = lstm_fused.LSTM(20, 100).requires_grad_(False)
    x = torch.randn(33, 30, 20)
    expected = lstm(x)[0]
    torch.set_num_threads(3)
    lstm(x)
    assert runtime.last_run()["threads"] == 3
    results = []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def region(_):
        y = lstm(x)[0]
        results.append((y, runtime.last_run()["threads"]))

    loaded = runtimes(Path("/proc/self/maps").read_text())
    ours = [path for path in loaded if "/torch/" in path] or sorted(loaded)
    ctypes.CDLL(ours[0]).GOMP_parallel(region, None, 3, 0)
    assert [threads for _, threads in results] == [1, 1, 1]
    assert all(torch.equal(y, expected) for y, _ in results)


LIMITED = """
import torch, lstm_fused
from lstm_fused import reference, runtime
lstm = lstm_fused.LSTM(20, 100)
x = torch.randn(33, 30, 20)
torch.set_num_threads(2)
y = lstm(x)[0]
assert runtime.last_run()["threads"] == 1, runtime.last_run()
y.sum().backward()
assert runtime.last_run()["threads"] == 1, runtime.last_run()
# Not nn.LSTM: oneDNN gives wrong numbers under such a limit.
expected = reference.CELLS["lstm"](x, None, (), lstm.all_weights[0])[0]
assert (expected - y).abs().max() < 1e-6
assert lstm.weight_hh_l0.grad.isfinite().all()
"""


def test_openmp_thread_limit():
    """Results are right where OpenMP grants fewer threads than the plan has."""
    run = subprocess.run(
        [sys.executable, "-c", LIMITED],
        env=dict(os.environ, OMP_THREAD_LIMIT="1"),
        timeout=120,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
