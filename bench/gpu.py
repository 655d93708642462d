"""The limits of a GPU: products, copies, launches and the exchange between CTAs (exchange.cu)."""

import ctypes
import os
import shutil
import sys
from pathlib import Path

import torch

from bench import environment
from bench.cases import DTYPES
from bench.compiled import NotMeasured, compiled
from bench.isolated import Lost, Worker
from bench.roofline import TRIES
from bench.timing import CudaClock

DEVICE = "cuda"
PRODUCT = 8192  # rows and columns of a product that takes a whole GPU
SOURCE = Path(__file__).with_name("exchange.cu")
CSRC = environment.ROOT / "csrc"
FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-shared", "-Xcompiler=-fPIC"]
EXCHANGES = (
    *(("grid", ctas, kib << 10) for ctas in (16, 32, 48, 64, 128) for kib in (0, 12, 24, 48)),
    *(("cluster", ctas, size) for ctas in (2, 4, 8, 16) for size in (128, 512, 2048)),
)


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")


def exchange_library(capability: tuple[int, int]) -> ctypes.CDLL:
    """exchange.cu for a GPU of this compute capability."""
    if nvcc() is None:
        raise NotMeasured("nvcc is not installed")
    arch = f"{capability[0]}{capability[1]}" + ("a" if capability[0] == 9 else "")
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    headers = (SOURCE.with_suffix(".h"), *sorted((CSRC / "cuda").rglob("*.h")))
    texts = [header.read_text() for header in headers]
    return ctypes.CDLL(compiled(SOURCE, [nvcc(), *FLAGS, f"-I{CSRC}", target], *texts))


def run_exchange() -> list[dict]:
    """Nanoseconds of each exchange that the device can do; see exchange.cu for their meaning."""
    library, measured = exchange_library(torch.cuda.get_device_capability()), []
    library.exchange_failure.restype = ctypes.c_char_p
    for kind, ctas, size in EXCHANGES:
        function = getattr(library, f"{kind}_ns")
        function.restype = ctypes.c_double
        if (ns := function(ctas, size)) >= 0:
            measured.append({"kind": kind, "ctas": ctas, "bytes": size, "ns": round(ns, 1)})
    if not measured:
        raise NotMeasured(f"exchange.cu: {library.exchange_failure().decode()}")
    return measured


def measure_exchange() -> list[dict] | None:
    """None, after saying why, where it cannot be measured; rows have no limit then."""
    try:
        with Worker() as worker:  # a kernel may hang
            return worker.call(run_exchange)
    except Lost as error:
        print(f"without limits of rows: {error}", file=sys.stderr)
        return None


def fastest(step, loops: int) -> float:
    """Seconds of a step, the least of some samples."""
    return min(CudaClock().sample(step, loops) / loops for _ in range(TRIES))


def matmul_peak(dtype: str) -> float:
    """Operations a second of torch's matrix product."""
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    size = PRODUCT // 4 if dtype == "float64" else PRODUCT
    a = torch.randn(size, size, device=DEVICE).to(DTYPES[dtype])
    return 2 * size**3 / fastest(lambda: torch.mm(a, a), 5)


def copies(name: str, size: int | None, each: int) -> dict:
    """A level: bytes a second read and written by a copy of `each` bytes."""
    a = torch.zeros(each, dtype=torch.uint8, device=DEVICE)
    b = torch.empty_like(a)
    bandwidth = 2 * each / fastest(lambda: b.copy_(a), 20)
    return {"name": name, "bytes": size, "bandwidth": bandwidth}


def measure_gpu() -> dict:
    """The whole device as one team. Weights that fit on chip need no reading after the first step.

    The time of an exchange between steps depends on the plan: see roofline.step_exchange.
    """
    properties = torch.cuda.get_device_properties(0)
    on_chip = properties.multi_processor_count * (
        properties.shared_memory_per_multiprocessor + 4 * properties.regs_per_multiprocessor
    )
    cache, tiny = properties.L2_cache_size, torch.zeros(1, device=DEVICE)
    levels = [
        {"name": "on chip", "bytes": on_chip, "bandwidth": None},
        # A quarter and its copy: half of the cache, and much longer than a launch.
        copies("L2", cache // 2, cache // 4),
        copies("memory", None, 16 * cache),
    ]
    rates = {"threads": 1, "peak": {d: matmul_peak(d) for d in DTYPES}, "levels": levels}
    launch = fastest(lambda: tiny.add_(1), 1000)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(100):
            tiny.add_(1)
    found = {"device": "cuda", "one": rates, "team": rates, "barrier": 0.0, "launch": launch}
    start = fastest(graph.replay, 10) / 100
    return found | {"start": start, "exchange": measure_exchange()}
