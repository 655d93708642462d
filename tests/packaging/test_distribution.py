"""The source distribution holds the repository, and a wheel built from it elsewhere works."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import lstm_fused
from tests.kernels.standalone.build import FEW_CELLS

ROOT = Path(__file__).parents[2]
# Of the repository and not of the distribution: what only it needs.
LEFT_OUT = (".ci/", ".gitignore")
BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""
USE = """
import pathlib, torch, lstm_fused
assert pathlib.Path(lstm_fused.__file__).is_relative_to({installed!r})
x, ours, theirs = torch.randn(5, 3, 4), lstm_fused.LSTM(4, 7), torch.nn.LSTM(4, 7)
ours.load_state_dict(theirs.state_dict())
torch.testing.assert_close(ours(x)[0], theirs(x)[0])
assert lstm_fused.runtime.last_run()["kernel"]
cell = '''
#include "described.h"
struct Leaky : DescribedCell {{
  static constexpr int kGates = 1, kPreacts = 1, kCells = 1;
  template <class V>
  static constexpr V forward(const V* preact, const V*, const V*, const V* prev, V* next) {{
    return next[0] = 0.5 * (prev[0] + tanh(preact[0]));
  }}
}};
'''
assert lstm_fused.compile_cell(cell)(4, 7)(x)[0].shape == (5, 3, 7)
"""


def built(what, folder, source):
    """The distribution's path; what: build_sdist or build_wheel. What compiles long is left out:
    optimisation, and most of the described cells."""
    compiler = folder / "c++"
    compiler.write_text(f'#!/bin/sh\nexec c++ "$@" -O0 {FEW_CELLS}\n')
    compiler.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, what, str(folder)],
        cwd=source,
        env=dict(os.environ, LSTM_FUSED_CUDA="0", CXX=str(compiler)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    return built("build_sdist", tmp_path_factory.mktemp("sdist"), ROOT)


def repository():
    """The files of the repository: git's list, or in an unpacked distribution its own."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}
    listed = (ROOT / "lstm_fused.egg-info" / "SOURCES.txt").read_text().splitlines()
    return set(listed)


def test_sdist_holds_the_repository(sdist):
    with tarfile.open(sdist) as archive:
        names = (Path(member.name) for member in archive if member.isfile())
        held = {"/".join(name.parts[1:]) for name in names}
    wanted = {name for name in repository() if not name.startswith(LEFT_OUT)}
    assert len(wanted) > 100
    assert wanted - held == set()
    assert held - wanted <= {"PKG-INFO", "setup.cfg"} | {n for n in held if ".egg-info/" in n}


@pytest.mark.full  # compiles the CPU kernels once more
def test_wheel_from_sdist(sdist, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "source")
    (source,) = (tmp_path / "source").iterdir()
    wheel = built("build_wheel", tmp_path, source)
    # One for every Python from 3.10 on: CPython's stable ABI.
    assert wheel.name.startswith(f"lstm_fused-{lstm_fused.__version__}-cp310-abi3-")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    packages = {p.relative_to(installed).parts[0] for p in installed.rglob("*") if p.is_file()}
    assert {p for p in packages if not p.endswith(".dist-info")} == {"lstm_fused"}
    libraries = {p.name for p in (installed / "lstm_fused").glob("*.so")}
    assert libraries == {"_C.abi3.so", "_plan.abi3.so"}
    for name in ("testing/oracle.py", "py.typed", "_C.pyi"):
        assert (installed / "lstm_fused" / name).exists()
    audit = [sys.executable, "-m", "abi3audit", "--strict", str(wheel)]
    subprocess.run(audit, check=True, capture_output=True, text=True)
    done = subprocess.run(
        [sys.executable, "-c", USE.format(installed=str(installed))],
        cwd=tmp_path,
        env=dict(os.environ, PYTHONPATH=str(installed), TORCH_EXTENSIONS_DIR=str(tmp_path)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
