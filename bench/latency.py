"""How long single calls of a stream take, beside arithmetic alone: percentiles and histogram.

Streams and arithmetic take turns in blocks of calls, so that what else the machine does affects all
of them. What delays the arithmetic, which reads and writes no memory, the machine does.
"""

import contextlib
import gc
import os
import sys
import time
from array import array
from collections.abc import Callable, Iterable

import torch

from bench import isolated
from bench.cases import C_STREAM, INT8_STREAM, STREAM, parse
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
                stamps = stamps_of(step, min(BLOCK, calls - begin))
                found[name].append(stamps.diff())
                # Other programs have their turn now. Linux takes it from a thread with real-time
                # priority that runs for 0.95 of a second: 50 ms, within a call.
                time.sleep((stamps[-1] - stamps[0]).item() * 1e-9 / 8)
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


@contextlib.contextmanager
def real_time_priority():
    """With real-time priority, as audio threads have it; yields whether that was allowed."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError:
        yield False
        return
    try:
        yield True
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def measure_shape(shape: str, names: Iterable[str], calls: int) -> dict:
    """By provider, and for ARITHMETIC that takes as long as the first of them, a summary.

    It leaves this process, which is to end, with one thread on one processor.
    """
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    case = build_case(parse(shape, shape))
    with torch.no_grad():
        steps = {name: PROVIDERS[name].build(case).step for name in names}
        first = summary(stamps_of(next(iter(steps.values())), WARM_UP).diff())["p50"]
        steps[ARITHMETIC] = Arithmetic(first)
        with real_time_priority() as allowed:
            found = latencies(steps, calls)
    summaries = {name: summary(each) for name, each in found.items()}
    return {"name": shape, "calls": calls, "real_time": allowed, "providers": summaries}


def measure(names: list[str], calls: int = CALLS) -> list[dict]:
    """For each of SHAPES a dict of name, calls, whether with real-time priority, and providers.

    names: of providers, of which the streams are measured.
    """
    chosen = [name for name in (C_STREAM, STREAM, INT8_STREAM) if name in names]
    found = []
    for shape in SHAPES if chosen else ():
        print(f"latency: {shape}", file=sys.stderr)
        with Worker() as worker:
            try:
                found.append(worker.call(measure_shape, shape, chosen, calls))
            except Lost as lost:
                print(f"  not measured: {lost}", file=sys.stderr)
    return found
