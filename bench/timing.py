"""Samples of several runs, interleaved so that a slow second of the machine hits all of them."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

# A row whose p10 to p90 span is more than this part of its median is marked as noisy.
NOISY_SPAN = 0.15


@dataclass(frozen=True)
class Timing:
    """Seconds a step, over `n` samples of `loops` steps each."""

    median: float
    p10: float
    p90: float
    n: int
    loops: int

    @property
    def noisy(self) -> bool:
        return self.p90 - self.p10 > NOISY_SPAN * self.median


def sample(step: Callable, loops: int) -> float:
    """Seconds that `loops` steps take."""
    begin = time.perf_counter()
    for _ in range(loops):
        step()
    return time.perf_counter() - begin


def loops_for(step: Callable, seconds: float) -> int:
    """How many steps make a sample of that length; what it runs also serves as warm-up."""
    loops = 1
    while (taken := sample(step, loops)) < seconds:
        loops = max(2 * loops, int(loops * seconds / max(taken, 1e-9)))
    return loops


def summary(samples: list[float], loops: int) -> Timing:
    each = sorted(s / loops for s in samples)
    tenths = statistics.quantiles(each, n=10, method="inclusive") if len(each) > 1 else each * 9
    median, p10, p90 = (float(f"{t:.4g}") for t in (statistics.median(each), tenths[0], tenths[-1]))
    return Timing(median, p10, p90, len(each), loops)


def interleaved(
    steps: dict[str, Callable], rounds: int, seconds: float, after_round: Callable = lambda: None
) -> dict[str, Timing]:
    """Samples A B A B ...; each at least about `seconds` long."""
    loops = {name: loops_for(step, seconds) for name, step in steps.items()}
    samples = {name: [] for name in steps}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, step in steps.items():
                samples[name].append(sample(step, loops[name]))
            after_round()
    finally:
        gc.enable()
    return {name: summary(samples[name], loops[name]) for name in steps}
