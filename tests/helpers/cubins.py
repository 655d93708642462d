"""The machine code of the CUDA kernels: of the library as built, or compiled anew with nvcc."""

import re
import shutil
import subprocess
from functools import lru_cache
from itertools import product
from pathlib import Path

from lstm_fused import cuda

ROOT = Path(__file__).parents[2]
LIBRARY = cuda._LIBRARY if cuda._LIBRARY.exists() else None
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
ARCHS = ("80", "90a")
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
PERSISTENT = ("bfloat16", "float16", "float32", "tf32")  # the files with kernels of all steps
QUICKEST = ("float32", "80")  # to compile, of these


def pairs(names=None):
    """(source, architecture) of the files of these names, or of all."""
    return product([s for s in SOURCES if names is None or s.stem in names], ARCHS)


@lru_cache
def nvcc_release():
    """Such as "13.0"."""
    said = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", said)[1]


def machine_code(source, arch, folder):
    """(exit code, what ptxas says of each kernel's registers, the file with the code)."""
    if said := built_report(source, arch):
        return 0, said, object_of(source)
    options = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-cubin", "-Xptxas", "-v"]
    cubin = folder / f"{source.stem}-{arch}"
    target = [f"-gencode=arch=compute_{arch},code=sm_{arch}", "-o", str(cubin)]
    done = subprocess.run([NVCC, *options, *target, str(source)], capture_output=True, text=True)
    return done.returncode, done.stderr, cubin


def object_of(source):
    return ROOT / "build" / "temp" / "cuda" / f"{source.stem}.o"


def built_report(source, arch):
    """What ptxas said when the library was built, or None: for other architectures, or before."""
    log = object_of(source).with_suffix(".o.log")
    if LIBRARY is None or not log.exists():
        return None
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cu")]
    if max(p.stat().st_mtime for p in sources) > log.stat().st_mtime:
        return None
    kernels = re.split(r"(?=ptxas info +: Compiling entry function)", log.read_text())
    return "".join(k for k in kernels if f"' for 'sm_{arch}'\n" in k)
