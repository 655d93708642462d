"""The limit of a workload, on machines made up so that it can be reckoned by hand."""

import json
import math
import subprocess
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from bench import compiled, exchange, measure, roofline
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


def measured(what, ctas, size, ns):
    return {"what": what, "ctas": ctas, "groups": 1, "apart": 1, "bytes": size, "ns": ns}


EXCHANGE = {
    "device": "Abacus",
    "wrong": 0,
    "measured": [
        *(measured("grid", n, size, 500 + 10 * n + size / 8) for n in (16, 64) for size in (0, 8)),
        measured("grid", 16, 8, 900.0) | {"groups": 2},
        *(measured("cluster", n, size, 100 * n + size) for n in (2, 4) for size in (0, 512)),
        measured("launch", 48, 0, 2000.0),
        measured("graph", 48, 0, 1000.0),
    ],
}


def gpu(**more):
    rates = Rates(1, {"float32": 1e6, "float16": 1e9}, (Level("on chip", None, None),))
    return Roof("cuda", rates, rates, 0.0, 1e-2, 1e-3, **{"exchange": EXCHANGE} | more)


def ran(kernel, way="forward", ctas=0, rows=8, dtype="float32"):
    sizes = {"unit_ctas": ctas, "tile_rows": rows, "row_groups": 1}
    return {"pass": way, "kernel": kernel, "dtype": dtype} | sizes


def test_exchange_between_and_beyond_what_was_measured():
    for ctas, size in ((16, 0), (32, 4), (40, 24), (128, 8)):
        found = exchange.seconds(EXCHANGE, "grid", ctas, size)
        assert found == pytest.approx((500 + 10 * ctas + size / 8) * 1e-9)
    assert exchange.seconds(EXCHANGE, "graph") == pytest.approx(1e-6)
    with pytest.raises(exchange.NotMeasured, match="no cluster"):
        exchange.seconds(EXCHANGE | {"measured": EXCHANGE["measured"][:1]}, "cluster", 2)
    slower = EXCHANGE | {"measured": [m | {"ns": m["ns"] + 1} for m in EXCHANGE["measured"]]}
    assert exchange.best([slower, EXCHANGE]) == EXCHANGE


def test_gpu_is_one_team_that_meets_as_the_plan_does():
    products, start = FLOPS / 1e6, 1e-2
    # A row of h is 5 values, padded to 32 bytes, and there are two rows.
    grid = 10 * (500 + 10 * 32 + 64 / 8) * 1e-9
    assert limit(layer(), gpu(), [ran("grid", ctas=32)]) == pytest.approx(products + grid + start)
    half = limit(layer(dtype="float16"), gpu(), [ran("grid", ctas=32, dtype="float16")])
    assert half == pytest.approx(FLOPS / 1e9 + grid + start)
    cluster = 10 * (400 + 64 / 4) * 1e-9
    found = limit(layer(), gpu(), [ran("cluster", ctas=4)])
    assert found == pytest.approx(products + cluster + start)
    steps = limit(layer(), gpu(), [ran("step")])
    assert steps == pytest.approx(products + 10e-6 + start)
    gemm = limit(layer(), gpu(), [ran("gemm")])
    assert gemm == pytest.approx(products + 2 * 10e-6 + start)


def test_gpu_backward_hands_on_all_gates():
    work = layer(mode="training")
    kernels = [ran("step"), ran("cluster", "backward", ctas=4)]
    meetings = 10 * (1000 + 400 + 4 * 64 / 4) * 1e-9
    assert limit(work, gpu(), kernels) == pytest.approx(3 * FLOPS / 1e6 + meetings + 1e-2)


def test_gpu_rows_have_no_limit_without_an_exchange():
    row = {"workload": asdict(layer()), "providers": {"us": {"kernels": [ran("step")]}}}
    assert roofline.limit_of_row(row, gpu(), "us") == limit(layer(), gpu(), [ran("step")])
    assert roofline.limit_of_row(row, gpu(), "torch.nn") is None
    assert roofline.limit_of_row(row, gpu(exchange=None), "us") is None


def test_a_roof_survives_json():
    roof = gpu()
    assert roofline.from_json(json.loads(json.dumps(asdict(roof)))) == roof
    assert "cluster, 4 CTAs, 512 bytes: 912 ns" in roofline.lines(roof)


@pytest.mark.parametrize("nvcc", [True, False])
def test_gpu_limits_are_measured(fake_cuda, monkeypatch, nvcc, capsys):
    """The whole of it on torch.cuda's interface, played by the CPU."""
    monkeypatch.setattr(roofline, "DEVICE", "cpu")
    monkeypatch.setattr(roofline, "PRODUCT", 64)
    program = "import json; print(json.dumps(" + repr(EXCHANGE) + "))"
    monkeypatch.setattr(exchange, "compiled", lambda *given: given[1][0])
    monkeypatch.setattr(exchange, "nvcc", lambda: "nvcc" if nvcc else None)
    real = subprocess.run
    played = SimpleNamespace(
        run=lambda command, **more: real([sys.executable, "-c", program], **more),
        TimeoutExpired=subprocess.TimeoutExpired,
    )
    monkeypatch.setattr(exchange, "subprocess", played)
    roof = roofline.measure("cuda", 1)
    assert set(roof.team.peak) == {"float16", "bfloat16", "tf32", "float32", "float64"}
    assert roof.launch > 0 and roof.start > 0
    assert [level.name for level in roof.team.levels] == ["on chip", "L2", "memory"]
    assert roof.exchange == (EXCHANGE if nvcc else None)
    assert ("nvcc is not installed" in capsys.readouterr().err) != nvcc
    assert "GB/s" in "\n".join(roofline.lines(roof))


@pytest.mark.skipif(exchange.nvcc() is None, reason="nvcc is not installed")
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_exchange_compiles(capability):
    assert exchange.program(capability).exists()


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
    monkeypatch.setattr(compiled, "BUILD", tmp_path)
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
