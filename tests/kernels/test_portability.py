"""The sources by other compilers and for other systems."""

import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
from functools import partial
from pathlib import Path

import pytest
import torch

from lstm_fused import runtime
from tests.kernels.standalone.build import CLANG, ROOT, build
from tests.kernels.standalone.problems import cases, check_quantized, complaints, read, write

CSRC = ROOT / "csrc"
# Names that belong to one family of compilers, and headers of one system. nvcc compiles csrc/cuda
# and the .cu files.
OF_COMPILERS = re.compile(
    r"__attribute__|__builtin|__GNUC__|__clang__|\basm\s*[(v]|\b_Pragma\b|#\s*pragma\s+(?!once|omp)\w+"
)
OF_SYSTEMS = re.compile(r"#\s*include\s*<(sys/|asm/|linux/|sched|unistd|pthread|strings|windows)")
OF_PROCESSORS = re.compile(r"#\s*include\s*<(\w*mmintrin|immintrin|cpuid|arm_\w+)\.h>")


def files_with(pattern):
    files = [p for p in CSRC.rglob("*") if p.suffix in (".h", ".cpp") and "cuda" not in p.parts]
    assert len(files) > 50
    return {str(p.relative_to(CSRC)) for p in files if pattern.search(p.read_text())}


def test_names_of_compilers_and_systems():
    assert files_with(OF_COMPILERS) == {"compiler.h"}
    assert files_with(OF_SYSTEMS) == {"cpu/system.cpp", "cpu/topology.cpp"}
    assert files_with(OF_PROCESSORS) == {"compiler.h", "cpu/simd_arm64.h", "cpu/simd_x86_64.h"}


def zig():
    """The command for zig, which brings clang and the headers of other systems; or None."""
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang"]
    return [shutil.which("zig")] if shutil.which("zig") else None


NEED_CLANG = pytest.mark.skipif(CLANG is None, reason="no clang++ 14 or newer")
NEED_ZIG = pytest.mark.skipif(zig() is None, reason="no zig: pip install ziglang")


def run_driver(*command):
    return subprocess.run(map(str, command), capture_output=True, text=True)


def check(built):
    assert built.returncode == 0, built.stdout[-4000:] + built.stderr[-4000:]


@pytest.mark.full
@NEED_CLANG
def test_kernels_by_clang_without_openmp(tmp_path):
    """Each ISA that this machine has, on one thread."""
    folder = ROOT / "build" / "clang"
    check(build(folder, [CLANG], ["-O0", "-Wall", "-Werror", "-Wno-psabi"]))
    solved = cases(threads=1)
    with open(tmp_path / "problems", "wb") as file:
        write(solved, file)
    for isa in runtime.available_isas():
        done = run_driver(folder / "driver", isa, tmp_path / "problems", tmp_path / "results")
        assert done.returncode == 0, done.stderr
        with open(tmp_path / "results", "rb") as file:
            assert complaints(solved, read(solved, file)) == []
        run = partial(run_driver, folder / "driver", isa)
        check_quantized(run, tmp_path / "quantized", tmp_path / "results")


@pytest.mark.full
@NEED_CLANG
@pytest.mark.parametrize("source", sorted((CSRC / "torch").glob("*.cpp")), ids=lambda p: p.name)
def test_operators_by_clang(source):
    torch_headers = Path(torch.__file__).parent / "include"
    headers = [torch_headers, torch_headers / "torch/csrc/api/include"]
    headers.append(Path(sysconfig.get_path("include")))
    options = ["-std=c++20", "-fsyntax-only", "-Wall", "-Werror"]
    options += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030A0000"]
    options += [f"-isystem{path}" for path in headers]
    done = subprocess.run([CLANG, *options, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.full
@NEED_ZIG
@pytest.mark.parametrize("target", ["x86_64-windows-gnu", "aarch64-macos"])
def test_other_systems(target):
    """Compiled, and neither linked nor run."""
    compiler = [*zig(), "c++", "-target", target]
    flags = ["-O0", "-fno-sanitize=undefined", "-Wall", "-Werror", "-Wno-psabi"]
    check(build(ROOT / "build" / "zig" / target, compiler, flags, driver=None))
