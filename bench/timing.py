"""Samples of several runs, interleaved so that a slow second of the machine hits all of them."""

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch

NOISY_SPAN = 0.15  # a span from p10 to p90 above this part of the median is marked as noisy
FEWEST_ROUNDS = 5


@dataclass(frozen=True)
class Sampling:
    """How long a row is measured.

    rounds: samples of each provider at most. seconds: what a sample lasts at least. row_seconds:
    what a row may take before its rounds are cut, to five at the fewest. attempts: how often a row
    is measured in the hope that no provider's samples are noisy. set_seconds: what all rows of a
    set may take before each gets fewer samples; none is left out.
    """

    rounds: int
    seconds: float
    row_seconds: float = 10.0
    attempts: int = 1
    set_seconds: float = math.inf

    def within(self, seconds: float) -> "Sampling":
        """For a row that has so long. Half of it goes to what is not sampled: the case, its oracle,
        captures."""
        sampling = seconds / 2
        attempts = self.attempts if sampling >= self.attempts * self.row_seconds else 1
        return replace(self, row_seconds=min(self.row_seconds, sampling), attempts=attempts)

    def rounds_for(self, seconds_a_round: float) -> int:
        """As many rounds as the row has time for."""
        affordable = int(self.row_seconds / max(seconds_a_round, 1e-9))
        return min(self.rounds, max(FEWEST_ROUNDS, affordable))


@dataclass(frozen=True)
class Timing:
    """Seconds a step, over `n` samples of `loops` steps each."""

    median: float
    p10: float
    p90: float
    n: int
    loops: int
    noisy: bool = False

    @property
    def spread(self) -> float:
        """Half the span from p10 to p90, as a part of the median."""
        return (self.p90 - self.p10) / 2 / self.median


def summary(samples: list[float], loops: int) -> Timing:
    each = sorted(s / loops for s in samples)
    tenths = statistics.quantiles(each, n=10, method="inclusive") if len(each) > 1 else each * 9
    median, p10, p90 = (float(f"{t:.4g}") for t in (statistics.median(each), tenths[0], tenths[-1]))
    return Timing(median, p10, p90, len(each), loops, p90 - p10 > NOISY_SPAN * median)


def repeat(step: Callable, count: int) -> None:
    """Calls a step so often, by its own `repeat(count)` if it has one: a loop in C."""
    if own := getattr(step, "repeat", None):
        own(count)
        return
    for _ in range(count):
        step()


class WallClock:
    """Times steps that are done when they return."""

    # Workers that spin for their next task (OpenMP's, ONNX Runtime's) would take the processor from
    # the next provider: a sample begins when they have gone to sleep.
    poll = 0.002
    longest_wait = 0.25

    def settle(self) -> None:
        """Wait until this process uses no processor any more."""
        end = time.perf_counter() + self.longest_wait
        used = time.process_time()
        while time.perf_counter() < end:
            time.sleep(self.poll)
            before, used = used, time.process_time()
            if used - before < self.poll / 4:
                return

    def sample(self, step: Callable, loops: int) -> float:
        """Seconds that `loops` steps take, after one that is not counted."""
        step()
        begin = time.perf_counter()
        repeat(step, loops)
        return time.perf_counter() - begin


class CudaClock:
    """Times what steps enqueue on the current stream, by CUDA events."""

    def settle(self) -> None:
        torch.cuda.synchronize()

    def sample(self, step: Callable, loops: int) -> float:
        """Seconds from the first step's work to the end of the last one's, after one uncounted."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        step()
        torch.cuda.synchronize()
        begin.record()
        for _ in range(loops):
            step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def clock_for(device: str):
    return CudaClock() if device == "cuda" else WallClock()


def loops_for(step: Callable, seconds: float, clock) -> tuple[int, float]:
    """How many steps make a sample of that length, and how long the last trial, a warm-up, took."""
    loops = 1
    while (taken := clock.sample(step, loops)) < seconds:
        loops = max(2 * loops, int(loops * seconds / max(taken, 1e-9)))
    return loops, taken


def interleaved(steps: dict[str, Callable], sampling: Sampling, clock, trying) -> dict[str, Timing]:
    """Samples A B A B ...; trying is told which sample comes next."""
    loops, a_round = {}, 0.0
    for name, step in steps.items():
        trying(name)
        clock.settle()
        loops[name], taken = loops_for(step, sampling.seconds, clock)
        a_round += taken * (1 + 1 / loops[name])
    samples = {name: [] for name in steps}
    gc.collect()
    gc.disable()
    try:
        for _ in range(sampling.rounds_for(a_round)):
            for name, step in steps.items():
                trying(name)
                clock.settle()
                samples[name].append(clock.sample(step, loops[name]))
    finally:
        gc.enable()
    return {name: summary(samples[name], loops[name]) for name in steps}


def quietest(attempt: Callable[[], dict[str, Timing]], sampling: Sampling) -> dict[str, Timing]:
    """The first attempt without a noisy provider, else the one whose widest spread is least.

    All providers' times are of the same attempt, so that the choice favours none of them. A further
    one begins only within the time that all attempts were meant to take.
    """
    found, end = [], time.monotonic() + sampling.attempts * sampling.row_seconds
    while len(found) < sampling.attempts and (not found or time.monotonic() < end):
        found.append(attempt())
        if not any(t.noisy for t in found[-1].values()):
            return found[-1]
    return min(found, key=lambda timings: max(t.spread for t in timings.values()))


def time_steps(steps: dict[str, Callable], sampling, device, trying=lambda name: None, clock=None):
    """By name the timing of each step, a dict, as results files hold it."""
    clock = clock or clock_for(device)
    found = quietest(lambda: interleaved(steps, sampling, clock, trying), sampling)
    return {name: asdict(timing) for name, timing in found.items()}
