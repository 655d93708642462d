"""gpu_check.py names files that exist, documents its parts, and ends within half an hour."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.cuda.gpu_check import FAULT, KERNELS, LIMITS, PARITY, judge
from tests.cuda.gpu_check import __doc__ as said

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "cuda.md"
NAMED = [*KERNELS, *(file for group in PARITY for file in group)]

# Collection on a machine with a CUDA device and only torch, ninja, pybind11 and pytest.
COLLECT = """
import sys
sys.path[:0] = ["."]
sys.modules |= dict.fromkeys(
    ["expecttest", "hypothesis", "matplotlib", "numpy", "onnx", "onnxruntime", "rich", "sklearn",
     "statsmodels", "xdist"]
)
from tests.helpers import plan_coverage
plan_coverage.DEVICES = ("cpu", "cuda")
import pytest
sys.exit(pytest.main(["-m", "cuda", "--collect-only", "-p", "no:cacheprovider", "tests"]))
"""


def test_collects_without_optional_packages():
    """Collection works without them, and every file with a test marked cuda is named."""
    done = subprocess.run(
        [sys.executable, "-c", COLLECT],
        cwd=ROOT,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.findall(r"^(tests/\w+/test_\w+\.py)", done.stdout, re.MULTILINE)
    assert set(found) == set(NAMED) - {"tests/modules/test_torch_suite.py"}
    assert len(NAMED) == len(set(NAMED)) and all((ROOT / name).exists() for name in NAMED)


def test_parts_fit_in_half_an_hour():
    assert max(LIMITS.values()) <= 560 and sum(LIMITS.values()) <= 1800


def test_documented_order_of_parts():
    assert f"in this order: {', '.join(LIMITS)}." in said
    listed = re.findall(
        r"^\d\. `python tests/cuda/gpu_check.py ([\w ]+)`", DOCS.read_text(), re.MULTILINE
    )
    assert " ".join(listed).split() == list(LIMITS)


def test_fault_is_told_from_wrong_numbers(capsys):
    """Wrong numbers are noted and the next problem runs; after a fault nothing does."""

    def fail():
        raise AssertionError("y differs")

    runs = [("first", fail), ("second", lambda: "fine")]
    assert judge(runs, fault=lambda: None) == 1
    said = capsys.readouterr().out
    assert said == "WRONG  first: AssertionError: y differs\nok     second: fine\n"
    assert judge(runs, fault=lambda: "CUDA error: an illegal memory access") == FAULT
    said = capsys.readouterr().out
    assert said.endswith("FAULT  first: CUDA error: an illegal memory access\n")
    assert judge(runs[1:]) == 0
