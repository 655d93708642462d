"""The machine's own limits, and the time that a workload takes at those limits.

`measure` finds how fast this machine multiplies, reads each level of its memory and lets threads
meet, or CTAs exchange what a step hands on (exchange.py). `limit` is a pure function of a workload
and such numbers.
"""

import ctypes
import math
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench import circumstances, exchange
from bench.compiled import NotMeasured, compiled
from bench.timing import CudaClock
from bench.workloads import DTYPES, GATES, Workload, batch_sizes_of
from lstm_fused import _plan

__all__ = ["NotMeasured", "Roof", "best", "from_json", "limit", "lines", "measure"]

SOURCE = Path(__file__).with_suffix(".cpp")
DEVICE = "cuda"
FLAGS = ["-O3", "-std=c++17", "-ffp-contract=fast", "-fopenmp", "-fPIC", "-shared"]
TRIES, SECONDS = 3, 0.05
PRODUCT = 8192  # rows and columns of a product that takes a whole GPU
MEMORY_BYTES = 64 << 20  # of each thread, when the level measured is no cache


@dataclass(frozen=True)
class Level:
    """A cache, or the memory behind all of them.

    bytes: what one thread can keep there, None for any amount.
    bandwidth: bytes a second that all threads together read, None where it is no limit.
    """

    name: str
    bytes: int | None
    bandwidth: float | None


@dataclass(frozen=True)
class Rates:
    """What so many threads reach together. peak: operations a second by dtype, a multiply-add is
    two; a dtype that is missing computes as float32. levels: nearest first."""

    threads: int
    peak: dict[str, float]
    levels: tuple[Level, ...]

    def seconds_of(self, flops: float, dtype: str) -> float:
        return flops / self.peak.get(dtype, self.peak["float32"])

    def level_of(self, size: float) -> Level:
        """Where a thread's `size` bytes lie, read again and again."""
        fits = (v for v in self.levels if v.bytes is None or size <= v.bytes)
        return next(fits, self.levels[-1])

    def seconds_reading(self, size: float, slice_: float) -> float:
        """size: bytes that all threads read; slice_: bytes that each of them comes back to."""
        bandwidth = self.level_of(slice_).bandwidth
        return size / bandwidth if bandwidth else 0.0


@dataclass(frozen=True)
class Roof:
    """One thread alone, all of them (on a GPU both are the whole device), and what it costs to
    meet: barrier, seconds of one among all threads; start, seconds of setting all to work."""

    device: str
    one: Rates
    team: Rates
    barrier: float
    start: float
    launch: float | None = None  # GPU: seconds from one kernel to the next, without a graph
    exchange: dict | None = None  # GPU: what exchange.py measured


@dataclass(frozen=True)
class Way:
    """How threads share a layer. parts: into how many slices each direction's weights are cut;
    copies: how many threads read the same slice; together: directions walked at once. barrier,
    back: seconds between two steps, of forward and of backward."""

    rates: Rates
    parts: int
    copies: int
    together: int
    barrier: float
    back: float
    start: float


def meeting(work: Workload, found: dict, ran: dict) -> float:
    """Seconds on a GPU from a step's results to the next one's operands, in a plan as
    cuda.last_run() tells it; found: what exchange.py measured."""
    row = _plan.cuda_row_bytes(ran["dtype"], work.R)
    if ran["pass"] == "backward":
        row = GATES[work.cell] * _plan.cuda_row_bytes(ran["dtype"], work.H)
    operand = row * min(work.N, ran["tile_rows"])
    if ran["kernel"] == "grid":
        return exchange.seconds(found, "grid", ran["unit_ctas"], operand)
    if ran["kernel"] == "cluster":
        return exchange.seconds(found, "cluster", ran["unit_ctas"], operand / ran["unit_ctas"])
    of_product = 1 + work.directions if ran["kernel"] == "gemm" else 1
    launches = of_product * (2 if work.proj else 1)
    return launches * exchange.seconds(found, "graph")


def ways(work: Workload, roof: Roof, kernels: list[dict]) -> list[Way]:
    """Every way that limit() considers; the best one counts."""
    team = roof.team
    if roof.device == "cuda":
        meet = {ran["pass"]: meeting(work, roof.exchange, ran) for ran in kernels}
        forward = meet["forward"]
        back = meet.get("backward", forward)
        return [Way(team, 1, 1, work.directions, forward, back, roof.start)]
    found = [Way(roof.one, 1, 1, 1, 0.0, 0.0, 0.0)]
    if team.threads > 1:
        found.append(Way(team, team.threads, 1, 1, roof.barrier, roof.barrier, roof.start))
        found.append(Way(team, 1, team.threads, 1, 0.0, 0.0, roof.start))
        if work.directions == 2:
            parts = team.threads // 2
            barrier = roof.barrier if parts > 1 else 0.0
            found.append(Way(team, parts, 1, 2, barrier, barrier, roof.start))
    return found


def layer_seconds(work: Workload, inputs: int, way: Way) -> float:
    """One layer with `inputs` input features, in one way of sharing it; see limit()."""
    rates, dtype = way.rates, work.dtype
    element = torch.finfo(DTYPES[dtype]).bits // 8
    recurrent = GATES[work.cell] * work.H * work.R + work.proj * work.H  # weights, a direction
    input_part = GATES[work.cell] * work.H * inputs
    rows = batch_sizes_of(work)

    def seconds_of(n, weights):
        """A product of n rows; where threads have rows of their own, the fullest one counts."""
        fullest = math.ceil(n / way.copies) * way.copies
        return rates.seconds_of(2 * fullest * weights, dtype)

    def reading(weights, kept):
        return rates.seconds_reading(
            weights * element * way.copies * way.together, kept * element / way.parts
        )

    # A single step reads input and recurrent weights in turn, so that all must be kept.
    kept = recurrent + (input_part if work.T == 1 else 0)
    steps = sum(
        max(seconds_of(n, recurrent) * way.together, reading(recurrent, kept)) for n in rows
    )
    total = sum(rows)
    product = rates.seconds_of(2 * total * input_part, dtype) * way.together
    once = reading(input_part, recurrent + input_part)
    seconds = max(product, once) + steps + len(rows) * way.barrier
    if work.training:
        gradient = rates.seconds_of(2 * total * recurrent, dtype) * way.together
        seconds += 2 * product + steps + len(rows) * way.back + gradient
    return seconds * work.directions / way.together + way.start


def limit(work: Workload, roof: Roof, kernels: list[dict] = ()) -> float:
    """Seconds that a workload takes at least on a machine with these rates.

    The input part of the gates is one product over all steps, at the peak of multiply-adds, but no
    faster than its weights can be read once. The recurrent part is step after step: each takes its
    product at that peak or the reading of the recurrent weights from the level in which a thread's
    slice of them lies, whichever is longer; then all threads meet, where they share hidden units.
    Activations, the states themselves and what is saved for backward count nothing.

    Training is three times the products: forward, then backward with the same steps, as sequential
    and reading as much, for the states' gradient, and products at the peak for the gradients of
    weights and input.

    Threads may share hidden units, batch rows or directions, or one may work alone: the fastest of
    these counts, for each layer.

    A GPU's threads are one team, whose meeting is that of the plan that ran: `kernels` are its
    passes, as cuda.last_run() tells them. What the CTAs meet for, each other's results, they get
    within the time that was measured; a launch a step counts as it follows another in a graph.
    """
    inputs = [work.I] + [work.R * work.directions] * (work.layers - 1)
    found = ways(work, roof, kernels)
    return sum(min(layer_seconds(work, k, way) for way in found) for k in inputs)


def limit_of_row(row: dict, roof: Roof, provider: str) -> float | None:
    """limit() of a row of results and of what the provider ran there; None if that is not known."""
    kernels = row["providers"].get(provider, {}).get("kernels", [])
    if roof.device == "cuda" and not (roof.exchange and kernels and all(kernels)):
        return None
    try:
        return limit(Workload(**row["workload"]), roof, kernels)
    except NotMeasured:  # an exchange of this plan's kind
        return None


def best(roofs: list[Roof]) -> Roof:
    """The better of each number: what disturbed a measurement does not lower the limit."""

    def rates(found):
        levels = [
            replace(same[0], bandwidth=max(v.bandwidth or 0.0 for v in same) or None)
            for same in zip(*(r.levels for r in found), strict=True)
        ]
        peak = {name: max(r.peak[name] for r in found) for name in found[0].peak}
        return Rates(found[0].threads, peak, tuple(levels))

    return replace(
        roofs[0],
        one=rates([r.one for r in roofs]),
        team=rates([r.team for r in roofs]),
        barrier=min(r.barrier for r in roofs),
        start=min(r.start for r in roofs),
        exchange=exchange.best(found)
        if (found := [r.exchange for r in roofs if r.exchange])
        else None,
    )


def from_json(found: dict) -> Roof:
    """The inverse of dataclasses.asdict."""

    def rates(one):
        levels = tuple(Level(**level) for level in one["levels"])
        return Rates(one["threads"], one["peak"], levels)

    return Roof(**found | {"one": rates(found["one"]), "team": rates(found["team"])})


def library() -> ctypes.CDLL:
    """roofline.cpp for this very processor, compiled where it is not yet."""
    model = Path("/proc/cpuinfo")
    processor = re.findall(r"^flags.*$", model.read_text(), re.M)[:1] if model.exists() else []
    compiler = os.environ.get("CXX", "g++").split()
    command = [*compiler, f"-march={circumstances.march()}", *FLAGS]
    path = compiled(SOURCE, command, ".so", *processor)
    loaded = ctypes.CDLL(str(path))
    for name in ("float32", "float64", "bfloat16"):
        getattr(loaded, f"fma_peak_{name}").argtypes = [ctypes.c_int, ctypes.c_double]
        getattr(loaded, f"fma_peak_{name}").restype = ctypes.c_double
    loaded.read_bandwidth.argtypes = [ctypes.c_int64, ctypes.c_int, ctypes.c_double]
    for name in ("barrier_seconds", "fork_join_seconds"):
        getattr(loaded, name).argtypes = [ctypes.c_int, ctypes.c_int]
    for name in ("read_bandwidth", "barrier_seconds", "fork_join_seconds"):
        getattr(loaded, name).restype = ctypes.c_double
    return loaded


def caches(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> list[tuple[str, int, bool]]:
    """Name, bytes and whether it is shared, of each level that holds data, nearest first."""
    found = {}
    for index in root.glob("index*"):
        if (index / "type").read_text().strip() == "Instruction":
            continue
        level = int((index / "level").read_text())
        size = (index / "size").read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20}[size[-1]]
        shared = re.search(r"[-,]", (index / "shared_cpu_list").read_text()) is not None
        found[level] = (f"L{level}", int(size[:-1]) * unit, shared)
    return [found[level] for level in sorted(found)]


def cpu_rates(loaded: ctypes.CDLL, threads: int) -> Rates:
    def most(function, *arguments):
        return max(function(*arguments, SECONDS) for _ in range(TRIES))

    peak = {}
    for name in ("float32", "float64", "bfloat16"):
        if found := most(getattr(loaded, f"fma_peak_{name}"), threads):
            peak[name] = found
    levels = []
    for name, size, shared in caches():
        mine = size // threads if shared else size
        sizes = (mine // 2, mine * 3 // 4)
        reached = max(most(loaded.read_bandwidth, part, threads) for part in sizes)
        levels.append(Level(name, mine, reached))
    reached = most(loaded.read_bandwidth, MEMORY_BYTES, threads)
    return Rates(threads, peak, (*levels, Level("memory", None, reached)))


def measure_cpu(threads: int) -> Roof:
    loaded = library()
    one = cpu_rates(loaded, 1)
    if threads == 1:
        return Roof("cpu", one, one, 0.0, 0.0)
    team = cpu_rates(loaded, threads)
    barrier = min(loaded.barrier_seconds(threads, 2000) for _ in range(TRIES))
    start = min(loaded.fork_join_seconds(threads, 2000) for _ in range(TRIES))
    return Roof("cpu", one, team, barrier, start)


def matmul_peak(dtype: str) -> float:
    """Operations a second of torch's matrix product."""
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    size = PRODUCT // 4 if dtype == "float64" else PRODUCT
    a = torch.randn(size, size, device=DEVICE).to(DTYPES[dtype])
    seconds = min(CudaClock().sample(lambda: torch.mm(a, a), 5) / 5 for _ in range(TRIES))
    return 2 * size**3 / seconds


def copy_bandwidth(size: int) -> float:
    """Bytes a second read and written by a copy of `size` bytes."""
    a = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    b = torch.empty_like(a)
    seconds = min(CudaClock().sample(lambda: b.copy_(a), 20) / 20 for _ in range(TRIES))
    return 2 * size / seconds


def launch_seconds() -> tuple[float, float]:
    """From one tiny kernel to the next, launched one by one and replayed from a graph."""
    a = torch.zeros(1, device=DEVICE)
    alone = min(CudaClock().sample(lambda: a.add_(1), 1000) / 1000 for _ in range(TRIES))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(100):
            a.add_(1)
    replayed = min(CudaClock().sample(graph.replay, 10) / 1000 for _ in range(TRIES))
    return alone, replayed


def measured_exchange() -> dict | None:
    """None, after saying why, where it cannot be measured; rows have no limit then."""
    try:
        return exchange.measure()
    except NotMeasured as error:
        print(f"without limits of rows: {error}", file=sys.stderr)
        return None


def measure_gpu() -> Roof:
    """The whole device as one team. Weights that fit on chip need no reading after the first step.

    What CTAs take to meet depends on the plan: see meeting().
    """
    properties = torch.cuda.get_device_properties(0)
    dtypes = ("float16", "bfloat16", "tf32", "float32", "float64")
    peak = {dtype: matmul_peak(dtype) for dtype in dtypes}
    on_chip = properties.multi_processor_count * (
        properties.shared_memory_per_multiprocessor + 4 * properties.regs_per_multiprocessor
    )
    cache = properties.L2_cache_size
    levels = (
        Level("on chip", on_chip, None),
        # A quarter and its copy: half of the cache, and long beside a launch.
        Level("L2", cache // 2, copy_bandwidth(cache // 4)),
        Level("memory", None, copy_bandwidth(16 * cache)),
    )
    rates = Rates(1, peak, levels)
    launch, replayed = launch_seconds()
    return Roof("cuda", rates, rates, 0.0, replayed, launch, measured_exchange())


def measure(device: str, threads: int) -> Roof:
    """This machine's rates, a few seconds of work; NotMeasured says why there are none."""
    return measure_gpu() if device == "cuda" else measure_cpu(threads)


def lines(roof: Roof) -> list[str]:
    """What was measured, for people."""
    found = []
    for rates in (roof.one, roof.team) if roof.team != roof.one else (roof.team,):
        peaks = ", ".join(f"{name} {peak / 1e9:.4g}" for name, peak in rates.peak.items())
        who = "device" if roof.device == "cuda" else f"{rates.threads} thread(s)"
        found.append(f"{who}: peak {peaks} GFLOP/s")
        levels = ", ".join(f"{v.name} {v.bandwidth / 1e9:.4g}" for v in rates.levels if v.bandwidth)
        found.append(f"{who}: reads {levels} GB/s")
    if roof.device == "cuda":
        replayed, launch = (f"{seconds * 1e6:.2f} µs" for seconds in (roof.start, roof.launch))
        found.append(f"from kernel to kernel {launch}, in a graph {replayed}")
        return found + (exchange.lines(roof.exchange) if roof.exchange else [])
    found.append(f"barrier {roof.barrier * 1e6:.2f} µs, start {roof.start * 1e6:.2f} µs")
    return found
