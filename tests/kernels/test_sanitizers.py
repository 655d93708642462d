"""Every CPU kernel under the address and undefined-behaviour sanitizers, without Python."""

import os
import subprocess

import pytest

from tests.kernels.sanitize.build import DRIVER, build


@pytest.mark.full
def test_kernels_under_sanitizers():
    built = build()
    assert built.returncode == 0, built.stdout[-4000:] + built.stderr[-4000:]
    # libgomp keeps its threads' memory until the process is gone: no leak check.
    environment = dict(os.environ, ASAN_OPTIONS="detect_leaks=0", OMP_NUM_THREADS="2")
    run = subprocess.run(
        [str(DRIVER)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
    assert ", 0 failed" in run.stdout
