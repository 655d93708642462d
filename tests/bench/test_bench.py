"""What is measured and by whom: workloads, their oracle, providers, the gate and the clock."""

import pytest
import torch

from bench import measure, providers, runs, timing
from bench.cases import (
    CELLS,
    DTYPES,
    LAYERS,
    MODES,
    SET_PROVIDERS,
    SET_RATIOS,
    SETS,
    XLSTM,
    Workload,
    batch_sizes_of,
    lengths_of,
    parse,
    regime,
)
from bench.timing import Sampling
from lstm_fused import runtime
from lstm_fused.testing import parity, tolerance

SAMPLING = Sampling(rounds=2, seconds=0.0)
SMALL = Workload("small", T=3, N=2, I=3, H=4, mode="training")
PAIR = ["torch.nn", "lstm_fused"]


@pytest.mark.parametrize("rows", SETS.values(), ids=SETS)
def test_rows_are_well_formed(rows):
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        assert row.dtype in DTYPES and row.mode in MODES
        assert row.cell in (*CELLS, *LAYERS, XLSTM)
        assert row.T == 1 or row.mode != "step"
        assert row.goals.keys() <= providers.PROVIDERS.keys()
        assert {key.partition(" on ")[0] for key in row.step_us} <= providers.PROVIDERS.keys()
        assert min(row.T, row.N, row.I, row.H) >= 1
        assert regime(row)


def test_a_set_names_providers_that_there_are():
    """And a ratio of its table is of two that it measures."""
    for name, chosen in SET_PROVIDERS.items():
        assert set(chosen) <= providers.PROVIDERS.keys() and name in SETS
        pairs = SET_RATIOS.get(name, ())
        assert {each for pair in pairs for each in pair} <= {"torch.nn", *chosen}
    assert SET_RATIOS.keys() <= SET_PROVIDERS.keys()


def test_names_say_what_is_measured():
    name = "bfloat16 packed 2 layers both directions dropout no bias T7 B3 I5 H4 training"
    found = parse(name, name, group="g")
    options = {"dtype": "bfloat16", "lengths": "half", "layers": 2, "directions": 2, "bias": False}
    sizes = {"T": 7, "N": 3, "I": 5, "H": 4, "dropout": 0.5, "mode": "training", "group": "g"}
    assert found == Workload(name, **sizes | options)
    assert parse("GRU", "GRU projection 2 H4 step").cell == "gru"
    assert parse("", "projection 2 H4").proj == 2


def test_gpu_rows_take_turns_over_the_groups():
    """A run that is cut early has rows of every group, in both modes."""
    rows = SETS["gpu"][1:]
    groups = {row.group for row in rows}
    assert {row.group for row in rows[: 2 * len(groups)]} == groups
    assert {row.mode for row in rows[::2]} == {"forward"}
    assert {row.mode for row in rows[1::2]} == {"training"}


def test_lengths():
    work = Workload("packed", T=10, N=3, I=1, H=1, lengths="half")
    assert lengths_of(work) == [10, 8, 5]
    assert batch_sizes_of(work) == [3] * 5 + [2] * 3 + [1] * 2
    assert batch_sizes_of(Workload("full", T=2, N=3, I=1, H=1)) == [3, 3]


SHAPES = [
    SMALL,
    Workload("packed", T=5, N=3, I=3, H=4, lengths="half", mode="training"),
    Workload("stacked", T=3, N=2, I=3, H=5, layers=2, directions=2, proj=2),
    Workload("carried", T=1, N=2, I=3, H=5, mode="step"),
    Workload("double", T=3, N=2, I=3, H=4, dtype="float64", bias=False),
    Workload("batch_first", T=3, N=2, I=3, H=4, batch_first=True, mode="training"),
    Workload("dropout", T=3, N=2, I=3, H=8, layers=2, dropout=0.5, mode="training"),
    Workload("gru", T=3, N=2, I=3, H=4, cell="gru", mode="training"),
    Workload("directions", T=4, N=3, I=5, H=6, directions=2),
    Workload("gru lengths", T=4, N=3, I=5, H=6, lengths="half", cell="gru", bias=False),
    Workload("rnn step", T=1, N=3, I=5, H=6, cell="rnn_tanh", mode="step"),
    Workload("rows", T=4, N=3, I=5, H=6, batch_first=True),
    Workload("layers", T=4, N=3, I=5, H=6, layers=2, directions=2),
    Workload("gru layers", T=4, N=3, I=5, H=6, layers=3, cell="gru", lengths="half"),
    Workload("layers step", T=1, N=3, I=5, H=6, layers=2, mode="step"),
    Workload("loop", T=3, N=2, I=3, H=4, mode="loop"),
    Workload("gru loop", T=3, N=2, I=3, H=4, cell="gru", mode="loop", bias=False),
]


@pytest.mark.parametrize("work", SHAPES, ids=lambda work: work.name)
def test_providers_agree_with_the_oracle(work):
    """The oracle is torch.nn in float64, and every provider of this machine passes the gate."""
    case = runs.build_case(work)
    exact, found = runs.exact_results(case), providers.torch_nn(case).results()
    assert exact.keys() == found.keys()
    assert ("d_x" in found) == work.training
    for name, value in found.items():
        assert exact[name].dtype == torch.float64
        torch.testing.assert_close(value.double(), exact[name], rtol=1e-5, atol=1e-5)
    names = [name for name, p in providers.PROVIDERS.items() if p.default]
    entries = measure.measure_row(work, names, None)
    passed = [name for name, entry in entries.items() if "parity" in entry]
    assert all(entry.keys() <= {"absent", "parity"} for entry in entries.values()), entries
    onnx = {"carried", "directions", "gru lengths", "rnn step", "rows"}
    onnx |= {"layers", "gru layers", "layers step"}
    peers = ["ONNX Runtime", "OpenVINO"] if work.name in onnx else []
    assert passed == [*PAIR, *peers, *(["torch.nn cell"] if work.name == "carried" else [])]


@pytest.mark.parametrize("cell", LAYERS)
def test_layers_of_other_cells(cell):
    """Beside their Python loop and a plain layer; a loop over them is not compiled."""
    work = Workload(cell, T=3, N=2, I=16, H=16, cell=cell, mode="training")
    entries = measure.measure_row(work, ["torch.nn", *SET_PROVIDERS["cells"]], None)
    verdicts = {"torch.nn": "parity", "lstm_fused": "parity", "plain layer": "unjudged"}
    verdicts["torch.compile"] = "absent"
    assert {name: next(iter(entry)) for name, entry in entries.items()} == verdicts, entries


def test_layer_of_xlstm():
    pytest.importorskip("xlstm")
    work = Workload("small", T=2, N=2, I=16, H=16, cell=XLSTM, mode="training")
    entries = measure.measure_row(work, ["torch.nn", "lstm_fused", "plain layer"], None)
    verdicts = {name: next(iter(entry)) for name, entry in entries.items()}
    assert verdicts == {"torch.nn": "parity", "lstm_fused": "parity", "plain layer": "absent"}


ROUNDED = {name: p for name, p in providers.PROVIDERS.items() if p.rounded}
INT8_SHAPES = [  # int8, bfloat16; the peers where they have such a layer
    Workload("forward", T=9, N=2, I=20, H=24),
    Workload("step", T=1, N=2, I=20, H=24, mode="step"),
    Workload("packed", T=9, N=3, I=20, H=24, lengths="half"),
    Workload("gru", T=9, N=2, I=20, H=24, cell="gru", layers=2),
    Workload("projection", T=9, N=2, I=20, H=24, proj=8),
]


@pytest.mark.parametrize("work", INT8_SHAPES, ids=lambda work: work.name)
def test_errors_of_rounded_weights_are_shown(work):
    """They are larger than float32's, which would be wrong, and not so large as another row's.

    Without VNNI, as on processors with AVX2 alone, the 16-bit sums of ONNX Runtime's int8 products
    overflow.
    """
    case = runs.build_case(work)
    names = [n for n, p in ROUNDED.items() if "stream" not in n]
    entries = measure.measure_row(work, ["torch.nn", *names], None)
    have = [n for n, p in ROUNDED.items() if n in names and not p.unsupported_reason(work, "cpu")]
    assert {"lstm_fused int8", "lstm_fused bfloat16 weights"} <= set(have)
    assert ("ONNX Runtime int8" in have) == (work.cell == "lstm" and not work.proj)
    for name in names:
        assert entries[name].keys() == ({"rounded"} if name in have else {"absent"}), entries[name]
    exact = runs.exact_results(case)
    overflows = "avx512_vnni" not in runtime.available_isas()
    for name in have:
        most = 0.5 if overflows and name == "ONNX Runtime int8" else 0.03
        assert 1e-5 < entries[name]["rounded"]["relative"] < most
        strict = parity.compare(
            providers.PROVIDERS[name].build(case).results(),
            providers.torch_nn(case).results(),
            exact,
        )
        assert not parity.worst(strict).ok


def test_results_of_another_row_are_no_rounding(monkeypatch):
    scaled = lambda case: ScaledBy(-1.0, case)  # noqa: E731
    monkeypatch.setitem(providers.PROVIDERS, "peer", providers.Provider(scaled, rounded=True))
    entries = measure.measure_row(SMALL, ["torch.nn", "peer"], None)
    assert entries["peer"]["wrong"]["error"] == pytest.approx(2.0)
    monkeypatch.setitem(
        providers.PROVIDERS,
        "peer",
        providers.Provider(lambda case: ScaledBy(float("nan"), case), rounded=True),
    )
    assert "wrong" in measure.measure_row(SMALL, ["torch.nn", "peer"], None)["peer"]


@pytest.mark.parametrize("name", [*PAIR, "torch.nn cell", "ONNX Runtime", "OpenVINO"])
def test_steps_carry_their_state(name):
    """And results start over from the case's own."""
    case = runs.build_case(Workload("carried", T=1, N=1, I=2, H=3, mode="step"))
    exact = runs.exact_results(case)
    with torch.no_grad():
        run = providers.PROVIDERS[name].build(case)
        outputs = [torch.as_tensor(run.step()[-1][0]).clone() for _ in range(2)]
        assert not torch.equal(*outputs)
        for tensor, value in run.results().items():
            torch.testing.assert_close(value.double(), exact[tensor], rtol=1e-5, atol=1e-5)


STEPS = [
    Workload("step", T=1, N=2, I=20, H=24, mode="step"),
    Workload("gru", T=1, N=2, I=20, H=24, mode="step", cell="gru", layers=2),
]


@pytest.mark.parametrize("work", STEPS, ids=lambda work: work.name)
def test_streams_are_steps_too(work):
    """They pass the gate, carry their state in the C loop too, and start over from the case's."""
    names = ["lstm_fused stream", "lstm_fused C stream", "lstm_fused int8 stream"]
    entries = measure.measure_row(work, ["torch.nn", *names], SAMPLING)
    for name, kind in zip(names, ("parity", "parity", "rounded"), strict=True):
        assert entries[name].keys() == {kind, "timing"}, entries[name]
    case = runs.build_case(work)
    reference, ends = runs.ModuleRun(case.fused(), case), None
    with torch.no_grad():
        for _ in range(5):
            _, ends = reference.step()
        for name in names[:2]:
            run = providers.PROVIDERS[name].build(case)
            first = run.results()
            timing.repeat(run.step, 4)
            state = run.stream.state if work.cell == "lstm" else (run.stream.state,)
            ends = ends if isinstance(ends, tuple) else (ends,)
            assert all(map(torch.equal, state, ends))
            again = run.results()
            assert all(torch.equal(first[tensor], again[tensor]) for tensor in first)


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("name", ["torch.nn graph", "lstm_fused graph"])
def test_a_graph_is_the_same_step_each_time(fake_cuda, name, mode):
    """Its replay writes all results and gradients, and adds to none."""
    case = runs.build_case(Workload("captured", T=3, N=2, I=3, H=4, mode=mode))
    run, exact = providers.PROVIDERS[name].build(case), runs.exact_results(case)
    assert len(run.kernels()) == (name == "lstm_fused graph")
    for _ in range(3):
        with torch.no_grad():
            grads = [leaf.grad for leaf in run.leaves.values() if leaf.grad is not None]
            for tensor in (run.out[0], *grads):
                tensor.fill_(float("nan"))
        found = run.results()
        assert found.keys() == exact.keys()
        for tensor, value in found.items():
            torch.testing.assert_close(value.double(), exact[tensor], rtol=1e-5, atol=1e-5)


def test_a_plan_is_measured_where_it_fits(monkeypatch):
    plans = []
    monkeypatch.setattr(providers.cuda, "set_plan", plans.append)
    monkeypatch.setattr(providers.cuda, "last_run", lambda: {"kernel": "grid"})
    case = runs.build_case(SMALL)
    run = providers.PROVIDERS["lstm_fused grid"].build(case)
    run.step()
    assert len(run.kernels()) == 2 and plans == ["grid", "fused"] * 3
    monkeypatch.setattr(providers.Provider, "unsupported_reason", lambda *_: None)
    entries = measure.measure_row(SMALL, ["torch.nn", "lstm_fused step"], None)
    assert entries["lstm_fused step"] == {"absent": "grid runs in its place"}


def test_floor_and_factor():
    exact = {"y": torch.tensor([1.0, -2.0], dtype=torch.float64)}
    baseline = {"y": torch.tensor([1.0, -2.0 + 2**-20])}
    allowed = 2 * 2**-20 + tolerance.FLOOR[torch.float32]["y"] * torch.finfo(torch.float32).eps * 2
    (verdict,) = parity.compare(baseline, baseline, exact)
    assert verdict.allowed == pytest.approx(allowed)
    assert verdict.ok
    assert not parity.compare({"y": baseline["y"] + 2 * allowed}, baseline, exact)[0].ok
    lost = {"y": baseline["y"] * float("nan")}
    assert not parity.compare(lost, lost, exact)[0].ok


def refuses(case):
    raise RuntimeError("not today\nnor tomorrow")


def off_by(amount):
    class Wrong(runs.ModuleRun):
        def results(self):
            found = super().results()
            return found | {"d_x": found["d_x"] + amount}

    return lambda case: Wrong(case.module, case)


class ScaledBy(runs.ModuleRun):
    def __init__(self, factor, case):
        super().__init__(case.module, case)
        self.factor = factor

    def results(self):
        return {name: t * self.factor for name, t in super().results().items()}


@pytest.mark.parametrize("amount", [float("nan"), 1e-3])
def test_only_right_providers_get_a_time(monkeypatch, amount):
    more = {"lstm_fused": off_by(amount), "peer": refuses}
    for name, build in more.items():
        monkeypatch.setitem(providers.PROVIDERS, name, providers.Provider(build))
    entries = measure.measure_row(SMALL, [*PAIR, "peer"], SAMPLING)
    assert "timing" not in entries["lstm_fused"]
    assert entries["lstm_fused"]["wrong"]["tensor"] == "d_x"
    assert entries["peer"] == {"failed": "RuntimeError: not today"}
    assert {"parity", "timing"} == entries["torch.nn"].keys()


def test_unknown_cells_are_left_out(monkeypatch):
    monkeypatch.setitem(CELLS, "unknown", "Unknown")
    work = Workload("new", T=2, N=1, I=2, H=2, cell="unknown")
    assert providers.unsupported_reason(work, "cpu") == "lstm_fused has no Unknown yet"


class FakeClock:
    """A clock whose steps take what it is told, and that keeps the order of samples."""

    def __init__(self, seconds):
        self.seconds, self.order, self.settled = seconds, [], 0

    def settle(self):
        self.settled += 1

    def sample(self, step, loops):
        name = step()
        self.order.append((name, loops))
        return self.seconds[name] * loops


def test_samples_are_interleaved_and_long_enough():
    clock = FakeClock({"A": 1.0, "B": 0.001})
    steps = {name: (lambda name=name: name) for name in "AB"}
    tried = []
    sampling = Sampling(rounds=3, seconds=0.1, row_seconds=100.0)
    found = timing.interleaved(steps, sampling, clock, tried.append)
    assert "".join(name for name, _ in clock.order[-6:]) == "ABABAB"
    assert clock.settled == 2 + 6 and "".join(tried) == "AB" * 4
    assert found["A"].n == found["B"].n == 3
    assert (found["A"].median, found["A"].loops) == (1.0, 1)
    assert found["B"].loops * found["B"].median >= 0.1


def test_a_step_may_have_a_loop_of_its_own():
    calls = []

    class Step:
        def __call__(self):
            calls.append(1)

        def repeat(self, count):
            calls.append(count)

    timing.WallClock().sample(Step(), 7)
    assert calls == [1, 7]


def test_little_time_means_fewer_samples_before_fewer_rows():
    sampling = Sampling(rounds=31, seconds=0.1, row_seconds=10.0, attempts=3)
    rounds = [sampling.rounds_for(seconds) for seconds in (0.2, 1.0, 60.0)]
    assert rounds == [31, 10, timing.FEWEST_ROUNDS]
    assert sampling.within(100.0) == sampling
    assert sampling.within(30.0) == Sampling(31, 0.1, row_seconds=10.0, attempts=1)
    late = sampling.within(-1.0)
    assert late.attempts == 1 and late.rounds_for(0.2) == timing.FEWEST_ROUNDS


def test_median_and_tenths():
    summary = timing.summary([2.0, 4.0, 6.0], loops=2)
    assert (summary.median, summary.p10, summary.p90) == (2.0, 1.2, 2.8)
    assert summary.spread == pytest.approx(0.4)
    assert summary.noisy
    assert not timing.summary([2.0, 2.0, 2.1], loops=2).noisy


def test_the_quietest_attempt_counts():
    quiet, noisy, noisier = (
        timing.Timing(1.0, 1.0 - d, 1.0 + d, 9, 1, d > 0.1) for d in (0.01, 0.2, 0.3)
    )
    for attempts, expected, used in (
        ([{"A": noisy, "B": quiet}, {"A": quiet, "B": quiet}, {"A": quiet}], 1, 2),
        ([{"A": noisier}, {"A": noisy}, {"A": noisier}], 1, 3),
    ):
        left = iter(attempts)
        sampling = Sampling(rounds=2, seconds=0.0, attempts=3)
        assert timing.quietest(lambda left=left: next(left), sampling) is attempts[expected]
        assert len(list(left)) == 3 - used


def test_no_further_attempt_begins_late(monkeypatch):
    now, noisy = [0.0], timing.Timing(1.0, 0.5, 1.5, 9, 1, True)
    monkeypatch.setattr(timing.time, "monotonic", lambda: now[0])

    def attempt():
        now[0] += 4.0
        return {"A": noisy}

    timing.quietest(attempt, Sampling(rounds=2, seconds=0.0, row_seconds=3.0, attempts=3))
    assert now == [12.0]  # begun at 0, 4 and 8 of nine seconds
    timing.quietest(attempt, Sampling(rounds=2, seconds=0.0, row_seconds=1.0, attempts=3))
    assert now == [16.0]


def test_samples_wait_for_threads_that_spin(monkeypatch):
    now, used = [0.0], [0.0]

    def sleep(seconds):
        now[0] += seconds
        used[0] += seconds if now[0] < 0.02 else 0.0  # workers spin for 20 ms

    monkeypatch.setattr(timing.time, "sleep", sleep)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing.time, "process_time", lambda: used[0])
    timing.WallClock().settle()
    assert 0.02 <= now[0] <= 0.03


def test_events_time_a_gpu(fake_cuda, monkeypatch):
    clock, now = timing.clock_for("cuda"), [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def step():
        now[0] += 0.002

    assert timing.loops_for(step, 0.01, clock) == (pytest.approx(5), pytest.approx(0.01))
