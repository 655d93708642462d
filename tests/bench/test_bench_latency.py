"""Single calls: the loops that time them, percentiles, the histogram, table and picture."""

import ctypes
import time

import pytest
import torch

from bench import charts, isolated, latency, report, streams
from tests.bench.test_bench_report import result, row


class InC:
    """In place of a stream: its step in C adds x to y and returns `failed`."""

    def __init__(self, failed=0):
        self.calls = 0

        @ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 3)
        def step(handle, x, y):
            self.calls += 1
            ctypes.c_float.from_address(y).value += ctypes.c_float.from_address(x).value + handle
            return failed

        self.step = step

    def c_step(self):
        return ctypes.cast(self.step, ctypes.c_void_p).value, 2


def test_a_step_in_c_is_called_with_its_handle_and_tensors():
    stream, x, y = InC(), torch.ones(1, 1), torch.zeros(1, 1)
    step = streams.CStep(stream, x, y)
    step()
    step.repeat(3)
    stamps = step.stamps(5)
    assert stream.calls == 9 and y.item() == 9 * (1 + 2)
    assert stamps.shape == (6,) and (stamps.diff() > 0).all()
    with pytest.raises(RuntimeError, match="4 steps in C computed nothing"):
        streams.CStep(InC(failed=1), x, y).repeat(4)


def test_stamps_are_nanoseconds():
    found = latency.stamps_of(lambda: time.sleep(2e-3), 3).diff()
    assert found.shape == (3,) and (found >= 2_000_000).all()


def test_arithmetic_takes_as_long_as_it_is_told():
    short, long = (streams.Arithmetic(s) for s in (2e-6, 2e-3))
    assert long.loops > 100 * short.loops > 0


def test_every_call_counts():
    """Blocks of all steps take turns; the first calls of a block warm up."""
    calls, lengths = [], [latency.BLOCK, latency.BLOCK, 5]
    steps = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    found = latency.latencies(steps, sum(lengths))
    assert {name: len(each) for name, each in found.items()} == dict.fromkeys("ab", sum(lengths))
    expected = [name * (latency.WARM_UP + n) for n in lengths for name in "ab"]
    assert "".join(calls) == "".join(expected)


def test_summary():
    """Of 10 000 calls of 1 µs, 150 of 4 µs and one of 1 ms."""
    found = latency.summary(torch.tensor([1_000] * 9_849 + [4_000] * 150 + [1_000_000]))
    assert found["p50"] == pytest.approx(1e-6)
    assert found["p99"] == found["p99.9"] == pytest.approx(4e-6)
    assert found["max"] == pytest.approx(1e-3)
    counts, first = found["counts"], found["first_bin"]
    assert sum(counts) == 10_000 and (counts[0], counts[-1]) == (9_849, 1)
    edges = [2 ** ((first + k) / latency.BINS) for k in (0, 1)]
    assert edges[0] <= 1_000 < edges[1]
    assert counts[2 * latency.BINS] == 150  # two doublings on


def test_a_shape_is_measured():
    """In a process of its own, whose priority and processor it changes."""
    names = [latency.C_STREAM, latency.STREAM, latency.INT8_STREAM]
    with isolated.Worker() as worker:
        found = worker.call(latency.measure_shape, "GRU T1 2 layers B1 H8 step", names, 200)
    assert found["calls"] == 200 and isinstance(found["real_time"], bool)
    assert list(found["providers"]) == [*names, latency.ARITHMETIC]
    for each in found["providers"].values():
        assert sum(each["counts"]) == 200 and 0 < each["p50"] <= each["p99.99"] <= each["max"]
    assert latency.measure(["torch.nn"]) == []


def of(*nanoseconds):
    return latency.summary(torch.tensor(nanoseconds))


def test_single_calls_are_shown(tmp_path):
    even, tail = of(*[1_000] * 99_999), of(*[1_000] * 99_000, *[2_000] * 999)
    providers = {"lstm_fused stream": even, "lstm_fused C stream": tail}
    providers[latency.ARITHMETIC] = tail
    shape = {"name": "T1 B1 H64 step", "calls": 99_999, "real_time": True, "providers": providers}
    found = result(row(), latency=[shape])
    text = report.markdown(found)
    assert "| **T1 B1 H64 step** " in text
    assert "Single calls: 99,999 of each on one processor, with real-time priority." in text
    assert " 1 µs | " in text and " 2.00x |" in text
    missed = "p99.99 of lstm_fused C stream is 2 of 1.5 medians, of arithmetic alone 2"
    goals = ["Goals reached: 1 of 2.", f"- T1 B1 H64 step: {missed}"]
    assert report.goals_text(found).splitlines() == goals
    charts.draw(found, tmp_path / "made.json")
    drawn = (tmp_path / "made-latency.svg").read_text()
    assert charts.latency_digest(found) in drawn and drawn == charts.latency_chart(found)
    shape["providers"] = {**providers, "lstm_fused stream": tail}
    assert charts.latency_digest(found) not in drawn
    assert "Single calls" not in report.markdown(result(row()))
