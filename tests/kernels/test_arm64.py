"""The kernels for arm64, cross-compiled and run under an emulator."""

import os
import shutil
import subprocess

import pytest
import torch

from lstm_fused import _plan
from tests.kernels.standalone.build import ROOT, build
from tests.kernels.standalone.problems import cases, check_quantized, complaints, read, write

COMPILER, SYMBOLS = "aarch64-linux-gnu-g++", "aarch64-linux-gnu-nm"
EMULATOR = "qemu-aarch64"
LIBRARIES = "/usr/aarch64-linux-gnu"  # Debian's, of the cross compiler
MISSING = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]
# Processors by what they have beyond NEON.
ONLY_NEON, WITHOUT_SVE = "cortex-a53", "max,sve=off"
SVE_OF_256, SVE_OF_512 = (f"max,sve-default-vector-length={length}" for length in (32, 64))

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(
        bool(MISSING), reason=f"Debian's g++-aarch64-linux-gnu, qemu-user: no {MISSING}"
    ),
]


@pytest.fixture(scope="module")
def driver():
    # -O1: the emulator takes less time for the program than the compiler for -O3.
    flags = ["-O1", "-fPIC", "-fopenmp", "-Wno-psabi", "-Werror", "-msve-vector-bits=256"]
    folder = ROOT / "build" / "arm64"
    built = build(folder, [COMPILER], flags)
    assert built.returncode == 0, built.stdout[-4000:] + built.stderr[-4000:]
    return folder / "driver"


def run(driver, cpu, isa, problems=os.devnull, results=os.devnull):
    command = [EMULATOR, "-L", LIBRARIES, "-cpu", cpu, driver, isa, problems, results]
    return subprocess.run(map(str, command), capture_output=True, text=True, timeout=600)


def planned_isas(isa, problem):
    """The ISAs of the code for the forward and the backward pass."""
    p = problem
    dtype = str(p.dtype).removeprefix("torch.")
    sizes = (p.T, p.N, p.I, p.H, p.R, p.directions, p.proj > 0, True)
    return tuple(_plan.plan(dtype, isa, 1, *sizes, backward, p.cell).isa for backward in (0, 1))


@pytest.mark.parametrize(
    ("isa", "cpu"),
    [
        ("neon", ONLY_NEON),
        ("neon_bf16", WITHOUT_SVE),
        ("sve256", SVE_OF_256),
        ("sve256_bf16", SVE_OF_256),
    ],
)
def test_kernels(isa, cpu, driver, tmp_path):
    solved = cases(threads=4)
    if isa.endswith("_bf16"):  # runs the code of the row before for every other dtype
        solved = [case for case in solved if case.problem.dtype is torch.bfloat16]
    with open(tmp_path / "problems", "wb") as file:
        write(solved, file)
    done = run(driver, cpu, isa, tmp_path / "problems", tmp_path / "results")
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "results", "rb") as file:
        results = read(solved, file)
        assert not file.read()
    assert complaints(solved, results) == []
    for case, draws in zip(solved, results, strict=True):
        assert {isas for _, isas in draws} == {planned_isas(isa, case.problem)}, case


@pytest.mark.parametrize(("isa", "cpu"), [("neon", ONLY_NEON), ("sve256_bf16", SVE_OF_256)])
def test_quantized_kernels(isa, cpu, driver, tmp_path):
    check_quantized(
        lambda *paths: run(driver, cpu, isa, *paths), tmp_path / "problems", tmp_path / "results"
    )


@pytest.mark.parametrize("isa", ["neon", "neon_bf16", "sve256", "sve256_bf16"])
def test_isa_code_has_internal_linkage(isa, driver):
    """As in tests/kernels/test_build.py."""
    command = [SYMBOLS, "--demangle", "--extern-only", "--defined-only", f"isa_{isa}.o"]
    done = subprocess.run(command, cwd=driver.parent, capture_output=True, text=True, check=True)
    names = [line for line in done.stdout.splitlines() if "__gxx_personality" not in line]
    assert len(names) == 2 and all(f"kernels_{isa}(" in name for name in names)


@pytest.mark.parametrize(
    ("cpu", "isa"),
    [
        (ONLY_NEON, "neon"),
        (WITHOUT_SVE, "neon_bf16"),
        (SVE_OF_512, "neon_bf16"),
        (SVE_OF_256, "sve256_bf16"),
    ],
)
def test_best_isa(cpu, isa, driver):
    done = run(driver, cpu, "")
    assert (done.returncode, done.stdout) == (0, f"0 problems by {isa}\n"), done.stderr


@pytest.mark.parametrize(
    ("cpu", "isa"), [(ONLY_NEON, "neon_bf16"), (WITHOUT_SVE, "sve256"), (SVE_OF_512, "sve256")]
)
def test_isa_that_the_processor_lacks(cpu, isa, driver):
    done = run(driver, cpu, isa)
    assert done.returncode == 1
    assert f"isa is '{isa}', which this machine cannot run" in done.stderr
