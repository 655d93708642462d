"""The CUDA library as built: its symbols, its registers, and loading where torch has no CUDA."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest
import torch

from lstm_fused import cuda, runtime
from tests.kernels.test_build import NEED_NM, SHIM, TORCH, UNSTABLE, symbols

ROOT = Path(__file__).parents[2]
LIBRARY = cuda._LIBRARY if cuda._LIBRARY.exists() else None
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
NEED_NVCC = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
NEED_LIBRARY = pytest.mark.skipif(LIBRARY is None, reason="built without nvcc")
ARCHS = ("80", "90a")
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


@pytest.mark.full  # `make test` builds with LSTM_FUSED_CUDA=0
@NEED_NVCC
def test_built_with_nvcc():
    assert LIBRARY is not None and runtime.build_info()["cuda"]


@pytest.mark.full
@NEED_LIBRARY
@NEED_NM
def test_uses_the_stable_interface_only():
    undefined = [name for _, name in symbols(LIBRARY, "--dynamic", "--undefined-only")]
    assert not [name for name in undefined if UNSTABLE.search(name)]
    torchs = [name for name in undefined if TORCH.search(name)]
    assert torchs and all(SHIM.match(name) for name in torchs)
    # The CUDA runtime is linked statically: the library depends on no version of it.
    assert not [name for name in undefined if name.startswith("cuda")]


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_stays_unloaded_without_cuda():
    assert not cuda.available()
    assert not hasattr(torch.ops.lstm_fused, "cuda_force_plan")
    assert cuda.unsupported_reason(torch.device("cuda", 0)) == "torch has no CUDA"


def report(source, arch, folder):
    """(exit code, what ptxas says of the registers of each kernel) of one file."""
    if said := built_report(source, arch):
        return 0, said
    options = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-cubin", "-Xptxas", "-v"]
    cubin = folder / f"{source.stem}-{arch}"
    target = [f"-gencode=arch=compute_{arch},code=sm_{arch}", "-o", str(cubin)]
    done = subprocess.run([NVCC, *options, *target, str(source)], capture_output=True, text=True)
    return done.returncode, done.stderr


def built_report(source, arch):
    """What ptxas said when the library was built, or None: for other architectures, or before."""
    log = ROOT / "build" / "temp" / "cuda" / f"{source.stem}.o.log"
    if LIBRARY is None or not log.exists():
        return None
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cu")]
    if max(p.stat().st_mtime for p in sources) > log.stat().st_mtime:
        return None
    kernels = re.split(r"(?=ptxas info +: Compiling entry function)", log.read_text())
    return "".join(k for k in kernels if f"' for 'sm_{arch}'\n" in k)


@pytest.fixture(scope="module")
def reports(request, tmp_path_factory):
    """Futures of report, by its arguments, for the tests that were selected; as many at a time as
    there are processors."""
    folder = tmp_path_factory.mktemp("cubins")
    selected = [item.callspec.params for item in request.session.items if is_report(item)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            (p["source"], p["arch"]): pool.submit(report, p["source"], p["arch"], folder)
            for p in selected
        }


def is_report(item):
    return getattr(item, "originalname", None) == test_no_spills.__name__


def compilations():
    """Each source for each architecture; all but the one that compiles fastest are `full`."""
    for source, arch in product(SOURCES, ARCHS):
        marks = () if (source.stem, arch) == ("float64", "80") else pytest.mark.full
        yield pytest.param(source, arch, id=f"{source.stem}-{arch}", marks=marks)


@NEED_NVCC
@pytest.mark.parametrize(("source", "arch"), list(compilations()))
def test_no_spills(source, arch, reports):
    """No kernel keeps registers in local memory, and each fits its SM as the plan says."""
    code, said = reports[source, arch].result()
    assert code == 0, said
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", said)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
    assert len(spills) == len(registers) >= 4
    assert set(spills) == {("0", "0")}, said
    assert max(registers) <= 255


def test_kernels_include_no_torch():
    headers = re.compile(r"#\s*include\s*[<\"](torch|ATen|c10|pybind11|Python|\.\./torch)")
    folder = ROOT / "csrc" / "cuda"
    found = {f.name for f in folder.rglob("*.*") if headers.search(f.read_text())}
    assert not found
