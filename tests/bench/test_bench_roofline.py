"""The limit of a workload, on machines made up so that it can be reckoned by hand."""

import math
from dataclasses import asdict

import pytest

from bench import gpu, roofline, run
from bench.cases import Workload
from bench.roofline import limit


def level(name, size, bandwidth):
    return {"name": name, "bytes": size, "bandwidth": bandwidth}


FAST = level("memory", None, None)  # reading costs nothing


def machine(threads=1, peak=1e6, levels=(FAST,), barrier=0.0, start=0.0):
    """One thread computes peak operations a second; several compute and read as many times more."""

    def rates(n):
        more = [v | {"bandwidth": v["bandwidth"] and v["bandwidth"] * n} for v in levels]
        peaks = {"float32": peak * n, "float64": peak * n / 2}
        return {"threads": n, "peak": peaks, "levels": more}

    times = {"barrier": barrier, "start": start}
    return {"device": "cpu", "one": rates(1), "team": rates(threads)} | times


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


def test_threads_share_rows_without_a_barrier():
    limits = machine(threads=2, barrier=1.0)
    assert limit(layer(), limits) == pytest.approx(FLOPS / 2e6)
    # Of three rows one thread has two, in the recurrence; a fourth row costs nothing there.
    three, four = limit(layer(N=3, I=1), limits), limit(layer(N=4, I=1), limits)
    assert four - three == pytest.approx(2 * 10 * 1 * 20 / 2e6)


def test_one_row_is_shared_by_units_with_a_barrier_a_step():
    limits = machine(threads=2, barrier=1e-5, start=1e-4)
    assert limit(layer(N=1), limits) == pytest.approx(FLOPS / 4e6 + 10e-5 + 1e-4)
    slow = machine(threads=2, barrier=1.0)
    # One thread runs the steps; the product before them still has two.
    assert limit(layer(N=1), slow) == pytest.approx(2 * 10 * 20 * (5 / 1e6 + 3 / 2e6))


def test_directions_are_shared_without_a_barrier():
    limits = machine(threads=2, barrier=1.0)
    assert limit(layer(N=1, directions=2), limits) == pytest.approx(FLOPS / 2e6)


def test_weights_are_read_from_the_level_they_lie_in():
    """20 * 5 recurrent weights are 400 bytes, and 640 with the input's."""
    near, far = level("near", 400, 1e5), level("far", None, 1e3)
    quick = machine(peak=1e12, levels=(near, far))
    assert limit(layer(), quick) == pytest.approx(240 / 1e3 + 10 * 400 / 1e5)
    # Two threads keep half of them each, and read twice as fast.
    shared = machine(threads=2, peak=1e12, levels=(near, far))
    assert limit(layer(), shared) == pytest.approx(240 / 2e5 + 10 * 400 / 2e5)
    # Training runs the steps twice.
    training = limit(layer(mode="training"), quick) - limit(layer(), quick)
    assert training == pytest.approx(10 * 400 / 1e5)


def test_a_single_step_keeps_all_weights():
    near, far = level("near", 400, 1e5), level("far", None, 1e3)
    quick = machine(peak=1e12, levels=(near, far))
    assert limit(layer(T=1), quick) == pytest.approx(640 / 1e3)


def exchanged(kind, ctas, size, ns):
    return {"kind": kind, "ctas": ctas, "bytes": size, "ns": ns}


EXCHANGE = [
    *(exchanged("grid", n, size, 500 + 10 * n + size / 8) for n in (16, 64) for size in (0, 8)),
    *(exchanged("cluster", n, size, 100 * n + size) for n in (2, 4) for size in (0, 512)),
]


def on_gpu(**more):
    peak = {"float32": 1e6, "float16": 1e9}
    rates = {"threads": 1, "peak": peak, "levels": [level("on chip", None, None)]}
    times = {"barrier": 0.0, "start": 1e-6, "launch": 1e-3}
    return {"device": "cuda", "one": rates, "team": rates, "exchange": EXCHANGE} | times | more


def ran(kernel, pass_name="forward", ctas=0, rows=8, dtype="float32"):
    sizes = {"unit_ctas": ctas, "tile_rows": rows, "row_groups": 1}
    return {"pass": pass_name, "kernel": kernel, "dtype": dtype} | sizes


def test_exchange_between_and_beyond_what_was_measured():
    for ctas, size in ((16, 0), (32, 4), (40, 24), (128, 8)):
        found = roofline.exchange_seconds(EXCHANGE, "grid", ctas, size)
        assert found == pytest.approx((500 + 10 * ctas + size / 8) * 1e-9)
    with pytest.raises(roofline.NotMeasured, match="cluster"):
        roofline.exchange_seconds(EXCHANGE[:1], "cluster", 2, 0)


@pytest.mark.parametrize(
    ("kernel", "ctas", "step"),
    [
        # A row of h is 5 values, padded to 32 bytes, and there are two rows.
        ("grid", 32, 500e-9 + 10e-9 * 32 + 64 / 8 * 1e-9),
        ("cluster", 4, 400e-9 + 64 / 4 * 1e-9),
        ("step", 0, 1e-6),
        ("gemm", 0, 2e-6),
    ],
)
def test_a_gpu_is_one_team_with_the_exchange_of_the_plan(kernel, ctas, step):
    found = limit(layer(), on_gpu(), [ran(kernel, ctas=ctas)])
    assert found == pytest.approx(FLOPS / 1e6 + 10 * step + 1e-6)
    half = limit(layer(dtype="float16"), on_gpu(), [ran(kernel, ctas=ctas, dtype="float16")])
    assert half == pytest.approx(FLOPS / 1e9 + 10 * step + 1e-6)


def test_gpu_backward_exchanges_all_gates():
    kernels = [ran("step"), ran("cluster", "backward", ctas=4)]
    exchange = 10 * (1000 + 400 + 4 * 64 / 4) * 1e-9
    found = limit(layer(mode="training"), on_gpu(), kernels)
    assert found == pytest.approx(3 * FLOPS / 1e6 + exchange + 1e-6)


def test_gpu_rows_have_no_limit_without_an_exchange():
    row = {"workload": asdict(layer()), "providers": {"us": {"kernels": [ran("step")]}}}
    assert roofline.limit_of_row(row, on_gpu(), "us") == limit(layer(), on_gpu(), [ran("step")])
    assert roofline.limit_of_row(row, on_gpu(), "torch.nn") is None
    assert roofline.limit_of_row(row, on_gpu(exchange=None), "us") is None


class FakeLibrary:
    """exchange.cu's functions on a GPU without clusters."""

    def __init__(self):
        self.grid_ns, self.cluster_ns = (lambda ctas, size: 500.0 + ctas), (lambda *_: -1.0)
        self.exchange_failure = lambda: b"no clusters"


@pytest.mark.parametrize("nvcc", [True, False])
def test_gpu_limits_are_measured(fake_cuda, monkeypatch, nvcc, capsys):
    """The whole of it on torch.cuda's interface, played by the CPU."""

    class Worker:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def call(self, function):
            try:
                return function()
            except roofline.NotMeasured as error:
                raise gpu.Lost(str(error), None) from None

    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "PRODUCT", 64)
    monkeypatch.setattr(gpu, "Worker", Worker)
    monkeypatch.setattr(gpu.ctypes, "CDLL", lambda path: FakeLibrary())
    monkeypatch.setattr(gpu, "compiled", lambda *given: "exchange.so")
    monkeypatch.setattr(gpu, "nvcc", lambda: "nvcc" if nvcc else None)
    limits = gpu.measure_gpu()
    assert set(limits["team"]["peak"]) == {"float16", "bfloat16", "tf32", "float32", "float64"}
    assert limits["launch"] > 0 and limits["start"] > 0
    assert [v["name"] for v in limits["team"]["levels"]] == ["on chip", "L2", "memory"]
    assert ("nvcc is not installed" in capsys.readouterr().err) != nvcc
    assert (limits["exchange"] is None) != nvcc
    lines = "\n".join(roofline.lines(limits))
    assert "GB/s" in lines and ("grid, 16 CTAs, 0 bytes: 516 ns" in lines) == nvcc
    assert "cluster" not in lines


@pytest.mark.skipif(gpu.nvcc() is None, reason="nvcc is not installed")
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_exchange_compiles(capability):
    library = gpu.exchange_library(capability)
    assert library.grid_ns and library.cluster_ns and library.exchange_failure


def test_best_takes_the_better_of_each_number():
    a = machine(peak=1.0, levels=(level("memory", None, 2.0),), barrier=3.0, start=1.0)
    b = machine(peak=2.0, levels=(level("memory", None, 1.0),), barrier=2.0, start=4.0)
    better = {"barrier": 2.0, "start": 1.0}
    assert roofline.best([a, b]) == machine(peak=2.0, levels=(level("memory", None, 2.0),)) | better
    slower = on_gpu(exchange=[m | {"ns": m["ns"] + 1} for m in EXCHANGE])
    assert roofline.best([slower, on_gpu()]) == on_gpu()
    assert roofline.best([on_gpu(exchange=None), on_gpu()]) == on_gpu()
    assert roofline.best([machine()]) == machine()


def test_this_machine(monkeypatch):
    """That there are plausible numbers, not how large they are."""
    monkeypatch.setattr(roofline, "SECONDS", 0.002)
    monkeypatch.setattr(roofline, "TRIES", 1)
    monkeypatch.setattr(roofline, "MEMORY_BYTES", 1 << 20)
    limits = roofline.measure_cpu(2)
    for rates in (limits["one"], limits["team"]):
        assert min(rates["peak"]["float32"], rates["peak"]["float64"]) > 1e8
        assert all(0 < v["bandwidth"] < math.inf for v in rates["levels"])
        assert rates["levels"][-1]["bytes"] is None
    assert limits["barrier"] > 0 and limits["start"] > 0
    assert "GFLOP/s" in "\n".join(roofline.lines(limits))


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
    monkeypatch.setattr("bench.compiled.BUILD", tmp_path)
    with pytest.raises(roofline.NotMeasured, match="does not compile"):
        roofline.measure_cpu(1)


def test_rows_carry_their_limit():
    work, limits = layer(N=1), machine(peak=1e9)
    row = {"workload": asdict(work), "providers": {"torch.nn": {}}}
    result = run.finished({"rows": [row], "providers": ["torch.nn"]}, [limits])
    assert result["roofline"] == limits
    assert result["rows"][0]["limit"] == pytest.approx(limit(work, limits), rel=1e-3)
