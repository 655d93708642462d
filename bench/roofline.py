"""The machine's own limits, and the time that a workload takes at those limits.

`measure_cpu`, and gpu.py on a GPU, find how fast this machine multiplies, reads each level of its
memory and synchronizes threads. `limit` is a pure function of a workload and such numbers, a dict
as results files hold it:

device              "cpu" or "cuda"
one, team           rates of one thread and of all (on a GPU both are the whole device):
  threads           how many
  peak              operations a second by dtype, a multiply-add is two; a dtype that is missing
                    computes as float32
  levels            caches and memory, nearest first: name; bytes that one thread can keep there,
                    None for any amount; bandwidth, bytes a second that all threads together read,
                    None where it is no limit
barrier, start      seconds of a barrier among all threads, and of setting all to work
launch, exchange    on a GPU, of which start is the time from kernel to kernel in a graph: launch is
                    that time without one, exchange what gpu.measure_exchange found, or None
"""

import math
import re
import sysconfig
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import NamedTuple

import torch

from bench import environment
from bench.cases import DTYPES, GATES, Workload, batch_sizes_of
from bench.compiled import NotMeasured, compiled, compiler
from lstm_fused import _plan

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = [
    *("-O3", "-std=c++17", "-ffp-contract=fast", "-fopenmp", "-fPIC", "-shared"),
    *("-fvisibility=hidden", f"-I{sysconfig.get_path('include')}"),
]
TRIES, SECONDS = 3, 0.05
MEMORY_BYTES = 64 << 20  # of each thread, when the level measured is no cache


class Partition(NamedTuple):
    """How threads share a layer. slices: into how many each direction's weights are cut; copies:
    how many threads read the same slice; together: directions computed at once. forward, backward:
    seconds between two steps of that pass. start: seconds before the first."""

    rates: dict
    slices: int
    copies: int
    together: int
    forward: float = 0.0
    backward: float = 0.0
    start: float = 0.0


def on_lines(points: dict[float, float], x: float) -> float:
    """The value at x on the lines through the points, the outermost of which go on."""
    xs = sorted(points)
    if len(xs) == 1:
        return points[xs[0]]
    after = next((i for i, at in enumerate(xs[1:], 1) if x <= at), len(xs) - 1)
    a, b = xs[after - 1], xs[after]
    return points[a] + (points[b] - points[a]) * (x - a) / (b - a)


def exchange_seconds(measured: list[dict], kind: str, ctas: int, size: float) -> float:
    """Seconds of a step's exchange: between and beyond what gpu.measure_exchange measured."""
    by_ctas: dict[int, dict[float, float]] = {}
    for m in measured:
        if m["kind"] == kind:
            by_ctas.setdefault(m["ctas"], {})[m["bytes"]] = m["ns"]
    if not by_ctas:
        raise NotMeasured(f"no exchange of a {kind} was measured on this device")
    at_size = {n: on_lines(by_bytes, size) for n, by_bytes in by_ctas.items()}
    return max(0.0, on_lines(at_size, ctas)) * 1e-9


def step_exchange(work: Workload, limits: dict, ran: dict) -> float:
    """Seconds on a GPU from a step's results to the next one's operands, in the plan that ran, as
    cuda.last_run() tells it."""
    row = _plan.cuda_row_bytes(ran["dtype"], work.R)
    if ran["pass"] == "backward":
        row = GATES[work.cell] * _plan.cuda_row_bytes(ran["dtype"], work.H)
    operand, ctas = row * min(work.N, ran["tile_rows"]), ran["unit_ctas"]
    if ran["kernel"] in ("grid", "cluster"):
        size = operand if ran["kernel"] == "grid" else operand / ctas
        return exchange_seconds(limits["exchange"], ran["kernel"], ctas, size)
    of_product = 1 + work.directions if ran["kernel"] == "gemm" else 1
    return of_product * (2 if work.proj else 1) * limits["start"]


def partitions(work: Workload, limits: dict, kernels: list[dict]) -> list[Partition]:
    """Every partition that limit() considers; the best one counts."""
    team, barrier, start = limits["team"], limits["barrier"], limits["start"]
    if limits["device"] == "cuda":
        seconds = {ran["pass"]: step_exchange(work, limits, ran) for ran in kernels}
        back = seconds.get("backward", 0.0)
        return [Partition(team, 1, 1, work.directions, seconds["forward"], back, start)]
    found, threads = [Partition(limits["one"], 1, 1, 1)], team["threads"]
    if threads > 1:
        found.append(Partition(team, threads, 1, 1, barrier, barrier, start))
        found.append(Partition(team, 1, threads, 1, start=start))
        if work.directions == 2:
            between = barrier if threads > 3 else 0.0
            found.append(Partition(team, threads // 2, 1, 2, between, between, start))
    return found


def layer_seconds(work: Workload, inputs: int, p: Partition) -> float:
    """One layer with `inputs` input features, in one partition; see limit()."""
    peak = p.rates["peak"].get(work.dtype, p.rates["peak"]["float32"])
    element = torch.finfo(DTYPES[work.dtype]).bits // 8
    recurrent = GATES[work.cell] * work.H * work.R + work.proj * work.H  # weights, a direction
    input_part = GATES[work.cell] * work.H * inputs
    rows = batch_sizes_of(work)

    def computing(n, weights):
        return 2 * n * weights * p.together / peak

    def reading(weights, kept):
        """kept: the weights that a thread comes back to lie in the level where its slice fits."""
        levels, mine = p.rates["levels"], kept * element / p.slices
        fits = (v for v in levels if v["bytes"] is None or mine <= v["bytes"])
        bandwidth = next(fits, levels[-1])["bandwidth"] or math.inf
        return weights * element * p.copies * p.together / bandwidth

    # Where threads have batch rows of their own, the fullest one counts.
    fullest = [math.ceil(n / p.copies) * p.copies for n in rows]
    # A single step reads input and recurrent weights in turn, so that all must be kept.
    read = reading(recurrent, recurrent + (input_part if work.T == 1 else 0))
    steps = sum(max(computing(n, recurrent), read) for n in fullest)
    product, once = computing(sum(rows), input_part), reading(input_part, recurrent + input_part)
    seconds = max(product, once) + steps + len(rows) * p.forward
    if work.training:
        seconds += 2 * product + steps + len(rows) * p.backward + computing(sum(rows), recurrent)
    return seconds * work.directions / p.together + p.start


def limit(work: Workload, limits: dict, kernels: list[dict] = ()) -> float:
    """Seconds that a workload takes at least on a machine with these rates.

    The input part of the gates is one product over all steps, at the peak of multiply-adds, but no
    faster than its weights can be read once. The recurrent part is step after step: each takes its
    product at that peak or the reading of the recurrent weights from the level in which a thread's
    slice of them lies, whichever is longer; then a barrier of all threads, where they share hidden
    units. Activations, the states themselves and what is saved for backward count nothing.

    Training is three times the products: forward, then backward with the same steps, as sequential
    and reading as much, for the states' gradient, and products at the peak for the gradients of
    weights and input.

    Threads may share hidden units, batch rows or directions, or one may work alone: the fastest of
    these counts, for each layer. A GPU's threads are one team, whose exchange between steps is that
    of the plan that ran: `kernels` are its passes, as cuda.last_run() tells them. A launch a step
    counts as it follows another in a graph.
    """
    inputs = [work.I] + [work.R * work.directions] * (work.layers - 1)
    found = partitions(work, limits, kernels)
    return sum(min(layer_seconds(work, k, partition) for partition in found) for k in inputs)


def limit_of_row(row: dict, limits: dict, provider: str) -> float | None:
    """limit() of a row of results and of what the provider ran there; None if that is not known."""
    kernels = row["providers"].get(provider, {}).get("kernels", [])
    if limits["device"] == "cuda" and not (limits["exchange"] and kernels and all(kernels)):
        return None
    try:
        return limit(Workload(**row["workload"]), limits, kernels)
    except NotMeasured:  # an exchange of this plan's kind
        return None


def best(roofs: list, key: str = ""):
    """The better of each number of several measurements: the higher rate, the lesser time.

    What disturbed a measurement does not lower the limit.
    """
    known = [limits for limits in roofs if limits is not None]
    if known and isinstance(known[0], dict):
        return {k: best([r[k] for r in known], key if key == "peak" else k) for k in known[0]}
    if known and isinstance(known[0], list):
        return [best(list(same), key) for same in zip(*known, strict=True)]
    if key in ("peak", "bandwidth"):
        return max(known, default=None)
    return min(known, default=None)  # a time; of the others all are the same


def caches(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> list[tuple[str, int, bool]]:
    """Name, bytes and whether it is shared, of each level that holds data, nearest first."""
    found = {}
    for index in root.glob("index*"):
        names = ("type", "level", "size", "shared_cpu_list")
        kind, level, size, cpus = ((index / name).read_text().strip() for name in names)
        if kind != "Instruction":
            unit = {"K": 1 << 10, "M": 1 << 20}[size[-1]]
            found[level] = (f"L{level}", int(size[:-1]) * unit, bool(re.search("[-,]", cpus)))
    return [found[level] for level in sorted(found)]


def cpu_rates(module, threads: int) -> dict:
    """module: roofline.cpp's."""

    def most(name, *arguments):
        function = getattr(module, name)
        return max(function(*arguments, threads, SECONDS) for _ in range(TRIES))

    def level(name, size, *parts):
        bandwidth = max(most("read_bandwidth", part) for part in parts)
        return {"name": name, "bytes": size, "bandwidth": bandwidth}

    peak = {name: most(f"fma_peak_{name}") for name in ("float32", "float64", "bfloat16")}
    levels = []
    for name, size, shared in caches():
        mine = size // threads if shared else size
        levels.append(level(name, mine, mine // 2, mine * 3 // 4))
    levels.append(level("memory", None, MEMORY_BYTES))
    return {"threads": threads, "peak": {k: v for k, v in peak.items() if v}, "levels": levels}


def measure_cpu(threads: int) -> dict:
    info = Path("/proc/cpuinfo")
    processor = re.findall(r"^flags.*$", info.read_text(), re.M)[:1] if info.exists() else []
    try:
        from pybind11 import get_include
    except ImportError:
        raise NotMeasured("pybind11 is not installed") from None
    command = [*compiler(), f"-march={environment.march()}", *FLAGS, f"-I{get_include()}"]
    path = str(compiled(SOURCE, command, *processor))
    spec = spec_from_file_location("roofline", path, loader=ExtensionFileLoader("roofline", path))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    one = cpu_rates(module, 1)
    found = {"device": "cpu", "one": one, "team": one, "barrier": 0.0, "start": 0.0}
    if threads > 1:
        found["team"] = cpu_rates(module, threads)
        for key, function in (
            ("barrier", module.barrier_seconds),
            ("start", module.fork_join_seconds),
        ):
            found[key] = min(function(threads, 2000) for _ in range(TRIES))
    return found


def lines(limits: dict) -> list[str]:
    """What was measured, for people."""
    found = []
    for rates in (
        (limits["one"], limits["team"]) if limits["team"] != limits["one"] else (limits["team"],)
    ):
        peaks = ", ".join(f"{name} {peak / 1e9:.4g}" for name, peak in rates["peak"].items())
        levels = [v for v in rates["levels"] if v["bandwidth"]]
        reads = ", ".join(f"{v['name']} {v['bandwidth'] / 1e9:.4g}" for v in levels)
        who = "device" if limits["device"] == "cuda" else f"{rates['threads']} thread(s)"
        found += [f"{who}: peak {peaks} GFLOP/s", f"{who}: reads {reads} GB/s"]
    times = ", ".join(
        f"{k} {limits[k] * 1e6:.2f} µs" for k in ("barrier", "start", "launch") if limits.get(k)
    )
    found += [times] if times else []
    for m in limits.get("exchange") or []:
        found.append(f"{m['kind']}, {m['ctas']} CTAs, {m['bytes']} bytes: {m['ns']:.0f} ns")
    return found
