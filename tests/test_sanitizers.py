"""Address and undefined-behaviour sanitizers over every kernel, outside Python (tests/sanitize)."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_kernels_under_sanitizers():
    ninja = [sys.executable, "-m", "ninja", "-C", str(ROOT / "tests" / "sanitize")]
    build = subprocess.run(ninja, capture_output=True, text=True)
    assert build.returncode == 0, build.stdout[-4000:] + build.stderr[-4000:]
    # libgomp keeps its threads' memory until the process is gone: no leak check.
    environment = dict(os.environ, ASAN_OPTIONS="detect_leaks=0", OMP_NUM_THREADS="2")
    run = subprocess.run(
        [str(ROOT / "build" / "sanitize" / "driver")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
    assert ", 0 failed" in run.stdout
