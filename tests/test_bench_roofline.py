"""The limit of a workload, on machines made up so that it can be reckoned by hand."""

import math

import pytest
import torch

from bench import measure, roofline
from bench.roofline import Level, Rates, Roof, limit
from bench.timing import Effort
from bench.workloads import Workload

FAST = Level("memory", None, None)  # reading costs nothing


def machine(threads=1, peak=1e6, levels=(FAST,), barrier=0.0, start=0.0):
    """One thread computes peak operations a second; several compute and read as many times more."""

    def rates(n):
        more = [Level(v.name, v.bytes, v.bandwidth and v.bandwidth * n) for v in levels]
        return Rates(n, {"float32": peak * n, "float64": peak * n / 2}, tuple(more))

    return Roof("cpu", rates(1), rates(threads), barrier, start)


def layer(**more):
    return Workload("w", **{"T": 10, "N": 2, "I": 3, "H": 5} | more)


FLOPS = 2 * 10 * 2 * 20 * (3 + 5)


@pytest.mark.parametrize(
    ("more", "factor"),
    [
        ({}, 1),
        ({"mode": "training"}, 3),
        ({"dtype": "float64"}, 2),
        ({"dtype": "float16"}, 1),  # no rate of its own: computed as float32
        ({"cell": "gru"}, 3 / 4),
        ({"cell": "rnn_tanh"}, 1 / 4),
        ({"directions": 2}, 2),
        ({"layers": 2}, 1 + 10 / 8),
        ({"lengths": "half"}, 15 / 20),
    ],
)
def test_products_alone(more, factor):
    assert limit(layer(**more), machine()) == pytest.approx(factor * FLOPS / 1e6)


def test_projection():
    recurrent, inputs = 20 * 2 + 2 * 5, 20 * 3
    assert limit(layer(proj=2), machine()) == pytest.approx(2 * 20 * (recurrent + inputs) / 1e6)


def test_threads_share_rows_without_meeting():
    roof = machine(threads=2, barrier=1.0)
    assert limit(layer(), roof) == pytest.approx(FLOPS / 2e6)
    # Of three rows one thread has two, in the recurrence; a fourth row costs nothing there.
    three, four = limit(layer(N=3, I=1), roof), limit(layer(N=4, I=1), roof)
    assert four - three == pytest.approx(2 * 10 * 1 * 20 / 2e6)


def test_one_row_is_shared_by_units_with_a_barrier_a_step():
    roof = machine(threads=2, barrier=1e-5, start=1e-4)
    assert limit(layer(N=1), roof) == pytest.approx(FLOPS / 4e6 + 10e-5 + 1e-4)
    slow = machine(threads=2, barrier=1.0)
    # One thread walks the steps; the product before them still has two.
    assert limit(layer(N=1), slow) == pytest.approx(2 * 10 * 20 * (5 / 1e6 + 3 / 2e6))


def test_directions_are_shared_without_meeting():
    roof = machine(threads=2, barrier=1.0)
    assert limit(layer(N=1, directions=2), roof) == pytest.approx(FLOPS / 2e6)


def test_weights_are_read_from_the_level_they_lie_in():
    """20 * 5 recurrent weights are 400 bytes, and 640 with the input's."""
    near, far = Level("near", 400, 1e5), Level("far", None, 1e3)
    quick = machine(peak=1e12, levels=(near, far))
    assert limit(layer(), quick) == pytest.approx(240 / 1e3 + 10 * 400 / 1e5)
    # Two threads keep half of them each, and read twice as fast.
    shared = machine(threads=2, peak=1e12, levels=(near, far))
    assert limit(layer(), shared) == pytest.approx(240 / 2e5 + 10 * 400 / 2e5)
    # Training walks the steps twice.
    training = limit(layer(mode="training"), quick) - limit(layer(), quick)
    assert training == pytest.approx(10 * 400 / 1e5)


def test_a_single_step_keeps_all_weights():
    near, far = Level("near", 400, 1e5), Level("far", None, 1e3)
    quick = machine(peak=1e12, levels=(near, far))
    assert limit(layer(T=1), quick) == pytest.approx(640 / 1e3)


def test_gpu_is_one_team():
    rates = Rates(1, {"float32": 1e6, "float16": 1e9}, (Level("on chip", None, None),))
    roof = Roof("cuda", rates, rates, barrier=1e-3, start=1e-2)
    assert limit(layer(), roof) == pytest.approx(FLOPS / 1e6 + 10e-3 + 1e-2)
    half = limit(layer(dtype="float16"), roof)
    assert half == pytest.approx(FLOPS / 1e9 + 10e-3 + 1e-2)


def test_best_takes_the_better_of_each_number():
    low, high = Level("memory", None, 1.0), Level("memory", None, 2.0)
    a = machine(peak=1.0, levels=(high,), barrier=3.0, start=1.0)
    b = machine(peak=2.0, levels=(low,), barrier=2.0, start=4.0)
    found = roofline.best([a, b])
    assert found.team.peak["float32"] == 2.0
    assert found.team.levels[0].bandwidth == 2.0
    assert (found.barrier, found.start) == (2.0, 1.0)
    assert roofline.best([machine()]).team.levels[0].bandwidth is None


def test_this_machine(monkeypatch):
    """That there are plausible numbers, not how large they are."""
    monkeypatch.setattr(roofline, "SECONDS", 0.002)
    monkeypatch.setattr(roofline, "TRIES", 1)
    monkeypatch.setattr(roofline, "MEMORY_BYTES", 1 << 20)
    roof = roofline.measure("cpu", 2)
    for rates in (roof.one, roof.team):
        assert min(rates.peak["float32"], rates.peak["float64"]) > 1e8
        assert all(0 < v.bandwidth < math.inf for v in rates.levels)
        assert rates.levels[-1].bytes is None
    assert roof.barrier > 0 and roof.start > 0
    assert "GFLOP/s" in "\n".join(roofline.lines(roof))


def test_caches(tmp_path):
    for index, fields in enumerate(
        [
            ("1", "Data", "48K", "0"),
            ("1", "Instruction", "32K", "0"),
            ("2", "Unified", "1M", "0"),
            ("3", "Unified", "32768K", "0-1"),
        ]
    ):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        names = ("level", "type", "size", "shared_cpu_list")
        for name, value in zip(names, fields, strict=True):
            (folder / name).write_text(value + "\n")
    sizes = [("L1", 48 << 10, False), ("L2", 1 << 20, False), ("L3", 32 << 20, True)]
    assert roofline.caches(tmp_path) == sizes


def test_no_compiler_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(roofline, "BUILD", tmp_path)
    with pytest.raises(roofline.NotMeasured, match="does not compile"):
        roofline.library()


def test_rows_carry_their_limit():
    work = layer(N=1)
    roof = machine(peak=1e9)
    result = measure.measure(
        "quick", [work], Effort(1, 0.0), measure.chosen(["torch.nn"]), find_roof=lambda: roof
    )
    assert result["roofline"]["team"]["peak"]["float32"] == 1e9
    assert result["rows"][0]["limit"] == pytest.approx(limit(work, roof), rel=1e-3)
    assert torch.get_num_threads() == 1
