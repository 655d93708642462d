"""How long single calls of a stream take, beside arithmetic alone: percentiles and histogram.

Streams and arithmetic take turns in blocks of calls, so that what else the machine does affects all
of them. What delays the arithmetic, which reads and writes no memory, the machine does.
"""

import gc
import os
import sys
import time
from array import array
from collections.abc import Callable, Iterable

import torch

from bench import isolated
from bench.cases import C_STREAM, INT8_STREAM, STREAM, parse
from bench.compiled import NotMeasured
from bench.isolated import Lost, Worker
from bench.providers import PROVIDERS
from bench.runs import build_case
from bench.streams import Arithmetic

ARITHMETIC = "arithmetic alone"
SHAPES = ("T1 B1 H64 step", "GRU T1 2 layers B1 H128 step")
CALLS, BLOCK, WARM_UP = 1_000_000, 10_000, 1_000
SHARES = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999, "p99.99": 0.9999, "max": 1.0}
BINS = 16  # of the histogram, to each doubling; bin k begins at 2 ** (k / BINS) nanoseconds


def stamps_of(step: Callable, calls: int) -> torch.Tensor:
    """The clock in nanoseconds before the first call and after each, (calls + 1,)."""
    if own := getattr(step, "stamps", None):
        return own(calls)
    found, clock = array("q", bytes(8 * (calls + 1))), time.perf_counter_ns
    found[0] = clock()
    for k in range(1, calls + 1):
        step()
        found[k] = clock()
    return torch.frombuffer(found, dtype=torch.int64)


def latencies(steps: dict[str, Callable], calls: int) -> dict[str, torch.Tensor]:
    """Nanoseconds of each call by the step's name, (calls,); in blocks, the steps in turn."""
    found = {name: [] for name in steps}
    gc.collect()
    gc.disable()
    try:
        for begin in range(0, calls, BLOCK):
            for name, step in steps.items():
                isolated.trying(name)
                stamps_of(step, WARM_UP)
                found[name].append(stamps_of(step, min(BLOCK, calls - begin)).diff())
    finally:
        gc.enable()
    return {name: torch.cat(blocks) for name, blocks in found.items()}


def summary(nanoseconds: torch.Tensor) -> dict:
    """Seconds at each of SHARES, and the counts of the histogram's bins from the first one on."""
    order = nanoseconds.sort().values
    last = len(order) - 1
    found = {key: order[round(share * last)].item() * 1e-9 for key, share in SHARES.items()}
    bins = (order.clamp_min(1).double().log2() * BINS).floor().long()
    first = bins[0].item()
    return found | {"first_bin": first, "counts": (bins - first).bincount().tolist()}


def measure_shape(shape: str, names: Iterable[str], calls: int) -> dict[str, dict]:
    """By provider, and for ARITHMETIC that takes as long as the first of them, a summary."""
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})  # of this process, which is isolated
    torch.set_num_threads(1)
    case = build_case(parse(shape, shape))
    with torch.no_grad():
        runs = {
            name: PROVIDERS[name].build(case) for name in names
        }  # a step may be all that is kept
        steps = {name: run.step for name, run in runs.items()}
        first = summary(stamps_of(next(iter(steps.values())), WARM_UP).diff())["p50"]
        steps[ARITHMETIC] = Arithmetic(first)
        return {name: summary(each) for name, each in latencies(steps, calls).items()}


def measure(names: list[str], calls: int = CALLS) -> list[dict]:
    """One thread, pinned to a processor: for each of SHAPES a dict of name, calls and providers.

    names: of providers, of which the streams are measured.
    """
    chosen = [name for name in (C_STREAM, STREAM, INT8_STREAM) if name in names]
    found = []
    for shape in SHAPES if chosen else ():
        print(f"latency: {shape}", file=sys.stderr)
        with Worker() as worker:
            try:
                entries = worker.call(measure_shape, shape, chosen, calls)
            except (Lost, NotMeasured) as lost:
                print(f"  not measured: {lost}", file=sys.stderr)
                continue
        found.append({"name": shape, "calls": calls, "providers": entries})
    return found
