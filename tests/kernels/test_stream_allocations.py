"""A step of a stream allocates nothing: counted in a process of its own, by a preloaded library."""

import ctypes
import os
import platform
import subprocess
import sys
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch

import lstm_fused
from tests.kernels.standalone.build import ROOT

SOURCE = Path(__file__).parent / "allocations" / "counter.cpp"
STEPS = 1000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="counts what glibc allocates")
def test_no_allocations(tmp_path):
    counter = tmp_path / "counter.so"
    compiler = os.environ.get("CXX", "g++")
    flags = ["-std=c++20", "-O2", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, str(SOURCE), "-o", str(counter)], check=True)
    script = "from tests.kernels.test_stream_allocations import count; count()"
    environment = os.environ | {"LD_PRELOAD": str(counter)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def models():
    torch.manual_seed(0)
    yield lstm_fused.LSTM(64, 64)
    yield lstm_fused.LSTM(40, 64, num_layers=2, proj_size=16)
    yield lstm_fused.GRU(64, 100, num_layers=3)
    yield lstm_fused.GRU(16, 16, dtype=torch.bfloat16)
    yield lstm_fused.RNN(20, 300)
    yield lstm_fused.GRUCell(20, 30)
    yield lstm_fused.LSTM(256, 512)  # lets the interpreter's lock go
    for dtype in (torch.int8, torch.bfloat16):
        yield lstm_fused.quantize_(lstm_fused.LSTM(64, 64, num_layers=2), dtype)


def count():
    """Assert it, with the counter preloaded."""
    torch.set_num_threads(1)
    library = ctypes.CDLL(None)
    library.allocations.restype = ctypes.c_long
    from_c = library.allocations_of_steps
    from_c.restype, from_c.argtypes = ctypes.c_long, [ctypes.c_void_p] * 4 + [ctypes.c_int]

    def counted(run, steps):
        before = library.allocations()
        for _ in range(steps):
            run()
        return library.allocations() - before

    for module in models():
        for rows in (1, 3, 12):
            stream = lstm_fused.stream(deepcopy(module), batch=rows)
            dtype = torch.float32 if module.weights_dtype else next(module.parameters()).dtype
            x = torch.randn(rows, module.input_size).to(dtype)
            y = stream(x)
            for out in (y, None):
                run = partial(stream, x, out=out)
                counted(run, 10)  # what happens once
                found = counted(run, STEPS) - counted(run, 0)
                assert found >= STEPS if out is None else found == 0, (module, rows, found)
            step, handle = stream.c_step()
            found = from_c(step, handle, x.data_ptr(), y.data_ptr(), STEPS)
            assert found == 0, (module, rows, found)
