"""Tests of what depends on the processor, as another processor would run them.

oneDNN and our kernels choose their instructions when they are loaded: a process of its own holds
both to those of a lesser machine, AVX2 where there is AVX-512, and less where there is not.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lstm_fused import ops

ROOT = Path(__file__).parent.parent
TESTS = {
    "autocast": ("tests/test_autocast.py", "not emulated"),
    "plans": ("tests/test_build.py", "plan or isa_from or set_isa"),
    "cells": ("tests/test_cells.py", "(autocast or accurate) and cpu"),
}


def lesser():
    """The instruction sets of a lesser machine: ours, and oneDNN's."""
    if "avx512" in ops.available_isas():
        return "avx2", "AVX2"
    return "baseline", "SSE41"


@pytest.mark.parametrize("name", TESTS)
def test_on_a_lesser_machine(name):
    file, which = TESTS[name]
    ours, onednn = lesser()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", which],
        cwd=ROOT,
        env=os.environ | {"LSTM_FUSED_ISA": ours, "ONEDNN_MAX_CPU_ISA": onednn},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
