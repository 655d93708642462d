"""Tests whose results depend on the processor, run with fewer instruction sets than it has.

oneDNN and our kernels choose their instructions when they are loaded. The tests therefore run in a
process whose environment restricts both: to AVX2 where there is AVX-512, else to the baseline.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lstm_fused import runtime

ROOT = Path(__file__).parents[2]
TESTS = {
    "autocast": ("tests/transforms/test_autocast.py", "not emulated"),
    "plans": ("tests/kernels/test_build.py", "plan or isa_from or set_isa"),
    "cells": ("tests/modules/test_cells.py", "(autocast or accurate) and cpu"),
    "layers in 16 bits": (
        "tests/kernels/test_layer_parity.py",
        "float16 and both and L2 and not 256",
    ),
}
SEEN = """
from lstm_fused import autocast, runtime
print(runtime.plan("lstm", "float32", 9, 2, 3, 4, 4, 1).isa, *autocast.onednn())
"""


def restricted():
    """Environment values for fewer instruction sets: of lstm_fused, oneDNN and torch."""
    if "avx512" in runtime.available_isas():
        return "avx2", "AVX2", "avx2"
    return "baseline", "SSE41", "default"


def run_restricted(*arguments):
    """The output of python with these arguments and fewer instruction sets."""
    names = "LSTM_FUSED_ISA", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | dict(zip(names, restricted(), strict=True)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_isa_is_restricted():
    """The kernels use the restricted ISA, and oneDNN supports float32 alone."""
    seen = run_restricted("-c", SEEN).split()
    assert seen == [restricted()[0], str(torch.backends.mkldnn.is_available()), "False", "False"]


@pytest.mark.parametrize("name", TESTS)
def test_on_restricted_isa(name):
    file, which = TESTS[name]
    if "layer" in file:  # these name the ISA they run
        which += f" and {restricted()[0]}"
    run_restricted("-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", which)
