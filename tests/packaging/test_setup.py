"""setup.py: what it builds for, and what it says where something is missing."""

import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
SETUP = SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py"), run_name="setup"))


def program(folder, name, does):
    """An executable shell script in front of the PATH."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{does}\n")
    path.chmod(0o755)
    return path


def test_gencode():
    assert SETUP.gencode("8.0;9.0a") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
    ]
    assert SETUP.gencode("12.0+PTX")[1] == "-gencode=arch=compute_120,code=compute_120"
    assert SETUP.gencode("8.6 8.9") == SETUP.gencode("8.6;8.9")
    with pytest.raises(SystemExit, match="'Hopper', which is not like 9.0"):
        SETUP.gencode("Hopper")


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        ("8.6\n9.0\n8.6", "8.6;9.0a"),
        ("8.7", "8.6"),  # older code of the same major capability
        ("12.1", "12.0+PTX"),
        ("7.5", SETUP.SHORT_LIST),  # too old for the kernels
        ("No devices were found", SETUP.SHORT_LIST),
    ],
)
def test_architectures_are_those_of_the_gpus(present, expected, tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    program(tmp_path, "nvidia-smi", f"printf '%s\\n' '{present}'")
    assert SETUP.architectures() == expected
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "10.0")
    assert SETUP.architectures() == "10.0"


def test_environment_chooses_nvcc(tmp_path, monkeypatch):
    chosen = SETUP.nvcc_to_use
    assert chosen("", "nvcc") == chosen("1", "nvcc") == "nvcc"
    assert chosen("0", "nvcc") is chosen("", None) is None
    with pytest.raises(SystemExit, match="there is no nvcc"):
        chosen("1", None)
    with pytest.raises(SystemExit, match="'yes' but must be 0, 1 or not set"):
        chosen("yes", "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert SETUP.find_nvcc() is None  # no other toolkit than that one
    (tmp_path / "bin").mkdir()
    nvcc = program(tmp_path / "bin", "nvcc", "")
    assert SETUP.find_nvcc() == str(nvcc)


def test_a_build_with_cuda_has_a_local_version(tmp_path):
    """In a process of its own, as pip asks for metadata."""
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin", "nvcc", "echo 'Cuda compilation tools, release 13.0, V13.0.88'")
    code = f"import runpy, sys; print(runpy.run_path({str(ROOT / 'setup.py')!r})['version']())"
    for cuda, command, expected in (
        ("1", "bdist_wheel", f"{SETUP.VERSION}+cu130"),
        ("1", "sdist", SETUP.VERSION),
        ("0", "bdist_wheel", SETUP.VERSION),
    ):
        environment = dict(os.environ, CUDA_HOME=str(tmp_path), LSTM_FUSED_CUDA=cuda)
        done = subprocess.run(
            [sys.executable, "-c", code, command], env=environment, capture_output=True, text=True
        )
        assert done.stdout.strip() == expected, done.stderr


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("ninja", "ninja is not installed. `pip install ninja`"),
        ("compiler", "no C++ compiler nonesuch-g"),
        ("C++20", "nonesuch-old does not compile C++20. Install g++ 11"),
        ("Python.h", "Python.h is missing. Debian and Ubuntu: `apt install python3-dev`"),
        ("system", "only Linux is supported, and macOS untried; not Plan 9."),
    ],
)
def test_what_is_missing_is_said_before_compiling(missing, says, tmp_path, monkeypatch):
    SETUP.require_tools()  # nothing is
    program(tmp_path, "nonesuch-old", "exit 1")
    if missing == "ninja":
        monkeypatch.setattr("shutil.which", lambda name: None if name == "ninja" else name)
    elif missing == "Python.h":
        monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    elif missing == "system":
        monkeypatch.setattr("platform.system", lambda: "Plan 9")
    else:
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setenv("CXX", "nonesuch-old" if missing == "C++20" else "nonesuch-g++")
    with pytest.raises(SystemExit) as raised:
        SETUP.require_tools()
    message = str(raised.value)
    assert message.startswith("lstm_fused cannot be built: ") and says in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("package", "text", "says"),
    [
        ("torch", "raise ImportError", "torch is not installed. `pip install 'torch>=2.10'`"),
        (
            "setuptools",
            "raise ImportError",
            "setuptools is not installed. `pip install 'setuptools",
        ),
        ("torch", "__version__ = '2.9.1+cpu'", "torch 2.9.1+cpu is too old. `pip install 'torch>="),
        ("setuptools", "__version__ = '65.5.0'", "setuptools 65.5.0 is too old."),
    ],
)
def test_a_package_that_does_not_serve_is_one_line(package, text, says, tmp_path):
    (tmp_path / f"{package}.py").write_text(f"{text}\n")
    done = subprocess.run(
        [sys.executable, str(ROOT / "setup.py"), "--version"],
        env=dict(os.environ, PYTHONPATH=str(tmp_path)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"lstm_fused cannot be built: {says}")
    assert done.stderr.count("\n") == 1
