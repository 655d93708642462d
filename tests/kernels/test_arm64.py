"""The kernels for arm64, cross-compiled and run under an emulator."""

import shutil
import subprocess

import pytest

from tests.kernels.standalone.build import ROOT, build
from tests.kernels.standalone.problems import cases, complaints, read, write

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
LIBRARIES = "/usr/aarch64-linux-gnu"  # Debian's, of the cross compiler
MISSING = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]
# Processors by what they have beyond NEON.
ONLY_NEON = "cortex-a53"
SVE_OF_256, SVE_OF_512 = "max,sve256=on,sve512=off", "max,sve512=on,sve-default-vector-length=64"

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(
        bool(MISSING), reason=f"no {' and no '.join(MISSING)}: packages g++-{COMPILER}, qemu-user"
    ),
]


@pytest.fixture(scope="module")
def driver():
    # -O1: the emulator takes less time for the program than the compiler for -O3.
    flags = ["-O1", "-fopenmp", "-Wno-psabi", "-Werror", "-msve-vector-bits=256"]
    folder = ROOT / "build" / "arm64"
    built = build(folder, [COMPILER], flags)
    assert built.returncode == 0, built.stdout[-4000:] + built.stderr[-4000:]
    return folder / "driver"


def emulated(cpu, *command):
    return subprocess.run(
        [EMULATOR, "-L", LIBRARIES, "-cpu", cpu, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize("isa", ["neon", "neon_bf16", "sve256", "sve256_bf16"])
def test_kernels(isa, driver, tmp_path):
    solved, results = cases(threads=4), []
    with open(tmp_path / "problems", "wb") as file:
        write(solved, file)
    cpu = SVE_OF_256 if isa.startswith("sve") else "max" if "bf16" in isa else ONLY_NEON
    done = emulated(cpu, driver, isa, tmp_path / "problems", tmp_path / "results")
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "results", "rb") as file:
        results = read(solved, file)
        assert not file.read()
    assert complaints(solved, results) == []
