"""What is measured and by whom: workloads, problems, providers, the gate and the clock's turns."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

pytest.importorskip("rich")

from rich.console import Console

from bench import __main__ as cli
from bench import (
    apart,
    circumstances,
    machine,
    measure,
    problem,
    progress,
    providers,
    report,
    timing,
)
from bench.sets import SETS
from bench.timing import Effort
from bench.workloads import CELLS, DTYPES, MODES, Workload, batch_sizes_of, lengths_of, regime
from lstm_fused.testing import parity, tolerance

EFFORT = Effort(rounds=2, seconds=0.0)
SMALL = Workload("small", T=3, N=2, I=3, H=4, mode="training", goals={"torch.nn": 1.0})
PAIR = measure.chosen(["torch.nn", "lstm_fused"])


def measured(*works, **more):
    return measure.measure("quick", list(works), EFFORT, more.pop("providers", PAIR), **more)


@pytest.mark.parametrize("rows", SETS.values(), ids=SETS)
def test_rows_are_well_formed(rows):
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        assert row.dtype in DTYPES
        assert row.mode in MODES
        assert row.cell in CELLS
        assert row.lengths in ("full", "half")
        assert row.T == 1 or row.mode != "step"
        assert row.goals.keys() <= providers.PROVIDERS.keys()
        assert min(row.T, row.N, row.I, row.H) >= 1
        assert regime(row)


def test_sweep_stays_in_its_ranges():
    for row in SETS["sweep"]:
        assert row.T <= 400 and row.N <= 40 and 30 <= row.H <= 1100
        assert row.goals == {"torch.nn": 1.0}
    for axis in "TNH":
        assert len({getattr(row, axis) for row in SETS["sweep"]}) > 10


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
    Workload("turned", T=3, N=2, I=3, H=4, batch_first=True, mode="training"),
    Workload("dropped", T=3, N=2, I=3, H=8, layers=2, dropout=0.5, mode="training"),
]


@pytest.mark.parametrize("work", SHAPES, ids=lambda work: work.name)
def test_oracle_is_torch_nn_in_float64(work):
    task = problem.build(work)
    exact = problem.oracle(task)
    found = providers.torch_nn(task).results()
    assert exact.keys() == found.keys()
    assert ("d_x" in found) == work.training
    for name, value in found.items():
        assert exact[name].dtype == torch.float64
        torch.testing.assert_close(value.double(), exact[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("work", SHAPES, ids=lambda work: work.name)
def test_every_provider_of_this_machine_is_right(work):
    task = problem.build(work)
    exact = problem.oracle(task)
    baseline = {}
    ran = []
    for name, provider in measure.chosen().items():
        entry = {}
        if measure.admit(name, provider, task, exact, baseline, entry):
            ran.append(name)
        assert entry.keys() <= {"absent", "parity"}, entry
    assert ran[:2] == ["torch.nn", "lstm_fused"]
    assert ("torch.nn cell" in ran) == (work.mode == "step")


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("mode", ["forward", "step"])
def test_onnx_runtime_computes_the_same(mode, directions):
    T = 1 if mode == "step" else 4
    work = Workload("onnx", T=T, N=3, I=5, H=6, directions=directions, mode=mode)
    assert providers.PROVIDERS["ONNX Runtime"].why_not(work, "cpu") is None
    task = problem.build(work)
    exact = problem.oracle(task)
    run = providers.PROVIDERS["ONNX Runtime"].build(task)
    for _ in range(2):  # the carried state starts over
        found = run.results()
        run.step()
        assert found.keys() == exact.keys()
        for name, value in found.items():
            torch.testing.assert_close(value.double(), exact[name], rtol=1e-5, atol=1e-5)


def test_steps_carry_their_state():
    task = problem.build(Workload("carried", T=1, N=1, I=2, H=3, mode="step"))
    with torch.no_grad():
        for name in ("torch.nn", "lstm_fused", "torch.nn cell"):
            run = providers.PROVIDERS[name].build(task)
            run.step()
            first = run.state[0].clone()
            run.step()
            assert not torch.equal(first, run.state[0])


def test_absent_cells_are_said_so(monkeypatch):
    monkeypatch.setitem(CELLS, "unheard", "Unheard")
    result = measured(Workload("new", T=2, N=1, I=2, H=2, cell="unheard"), SMALL)
    assert result["rows"][0]["absent"] == "lstm_fused has no Unheard yet"
    text = report.markdown(result)
    assert "| new |" not in text
    assert "Left out: lstm_fused has no Unheard yet." in text


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


def wrong_by(amount):
    class Wrong(providers.ModuleRun):
        def results(self):
            found = super().results()
            found["d_x"] = found["d_x"] + amount
            return found

    return PAIR | {"lstm_fused": providers.Provider(lambda task: Wrong(task.module, task))}


@pytest.mark.parametrize("amount", [float("nan"), 1e-3])
def test_a_wrong_provider_gets_no_time(amount):
    result = measured(SMALL, providers=wrong_by(amount))
    (row,) = result["rows"]
    entry = row["providers"]["lstm_fused"]
    assert "timing" not in entry
    assert entry["wrong"]["tensor"] == "d_x"
    assert report.is_ours_wrong(row)
    heading, [(_, [line])] = report.cells(result)
    assert line[heading.index("lstm_fused")].startswith("wrong: d_x off by")
    assert line[heading.index("over torch.nn")] == "(goal 1x, missed)"
    assert "timing" in row["providers"]["torch.nn"]


def test_a_provider_that_raises_costs_its_own_time_only():
    def refuse(task):
        raise RuntimeError("not today\nnor tomorrow")

    result = measured(SMALL, providers=PAIR | {"peer": providers.Provider(refuse)})
    entries = result["rows"][0]["providers"]
    assert not report.is_ours_wrong(result["rows"][0])
    assert entries["peer"] == {"failed": "RuntimeError: not today"}
    assert "timing" in entries["lstm_fused"]


def test_json(tmp_path, monkeypatch):
    monkeypatch.setitem(cli.SETS, "quick", (SMALL,))
    monkeypatch.setitem(cli.EFFORTS, "quick", EFFORT)
    out = tmp_path / "made" / "result.json"
    threads = torch.get_num_threads()
    assert cli.main(["--set", "quick", "--threads", "1", "--json", str(out)]) == 0
    torch.set_num_threads(threads)
    result = json.loads(out.read_text())
    assert result["machine"]["isa"] and result["machine"]["threads"] == 1
    assert result["machine"]["versions"]["onnxruntime"]
    assert result["providers"] == ["torch.nn", "lstm_fused"]  # the others have no training row
    entry = result["rows"][0]["providers"]["lstm_fused"]
    assert {"median", "p10", "p90", "n", "loops", "noisy"} <= entry["timing"].keys()
    assert entry["parity"]["error"] <= entry["parity"]["allowed"]
    assert [run["pass"] for run in entry["kernels"]] == ["forward", "backward"]
    heading, [(_, [line])] = report.cells(report.load(out))
    assert "x (goal 1x" in line[heading.index("over torch.nn")]


def test_what_was_measured_survives_ctrl_c(tmp_path, monkeypatch, capsys):
    interrupts = Workload("never", T=3, N=2, I=3, H=4)
    real = measure.measure_row

    def row(work, *args, **more):
        if work is interrupts:
            raise KeyboardInterrupt
        return real(work, *args, **more)

    monkeypatch.setattr(measure, "measure_row", row)
    monkeypatch.setitem(cli.SETS, "quick", (SMALL, interrupts))
    monkeypatch.setitem(cli.EFFORTS, "quick", EFFORT)
    out = tmp_path / "part.json"
    threads = torch.get_num_threads()
    assert cli.main(["--set", "quick", "--threads", "1", "--json", str(out)]) == 130
    torch.set_num_threads(threads)
    result = report.load(out)
    assert [r["workload"]["name"] for r in result["rows"]] == ["small"]
    assert result["interrupted"]
    printed = capsys.readouterr().out
    assert "small" in printed
    assert "Interrupted: later rows are missing." in report.caption(result)


def test_times_apart_are_of_another_process(tmp_path):
    parts = []
    times = apart.timer(keep_memory=True)(PAIR, SMALL, EFFORT, "cpu", parts.append)
    assert times.keys() == PAIR.keys() and parts[-1] == 1.0
    assert all(entry["timing"]["n"] == 2 for entry in times.values())
    assert [run["pass"] for run in times["lstm_fused"]["kernels"]] == ["forward", "backward"]
    result = measured(SMALL, times_apart=lambda names, *rest: {n: times[n] for n in names})
    assert all({"parity", "timing"} <= e.keys() for e in result["rows"][0]["providers"].values())


def test_a_process_that_dies_is_a_fact_about_its_row():
    (entry,) = apart.timer()(["nobody"], SMALL, EFFORT, "cpu", lambda part: None).values()
    assert entry == {"failed": "the process that measured it ended with exit code 1"}


def test_memory_that_is_kept_is_asked_for_in_the_environment(monkeypatch):
    asked = []
    monkeypatch.setattr(apart, "ask", lambda task, environment, part: asked.append(environment))
    for keep in (False, True):
        apart.timer(keep)([], SMALL, EFFORT, "cpu", None)
    assert [apart.KEEP.items() <= dict(env).items() for env in asked] == [False, True]


class FakeClock:
    """A clock whose steps take what it is told, and that keeps the order of samples."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.order = []
        self.settled = 0

    def settle(self):
        self.settled += 1

    def sample(self, step, loops):
        name = step()
        self.order.append((name, loops))
        return self.seconds[name] * loops


def test_samples_are_interleaved_and_long_enough():
    clock = FakeClock({"A": 1.0, "B": 0.001})
    steps = {name: (lambda name=name: name) for name in "AB"}
    done = []
    effort = Effort(rounds=3, seconds=0.1, row_seconds=100.0)
    found = timing.interleaved(steps, effort, clock, lambda k, of: done.append((k, of)))
    assert "".join(name for name, _ in clock.order[-6:]) == "ABABAB"
    assert clock.settled == 2 + 6
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert found["A"].n == found["B"].n == 3
    assert (found["A"].median, found["A"].loops) == (1.0, 1)
    assert found["B"].loops * found["B"].median >= 0.1


def test_a_long_row_gets_fewer_rounds():
    effort = Effort(rounds=31, seconds=0.1, row_seconds=10.0)
    assert timing.rounds_for(effort, 0.2) == 31
    assert timing.rounds_for(effort, 1.0) == 10
    assert timing.rounds_for(effort, 60.0) == timing.FEWEST_ROUNDS


def test_median_and_tenths():
    summary = timing.summary([2.0, 4.0, 6.0], loops=2)
    assert (summary.median, summary.p10, summary.p90) == (2.0, 1.2, 2.8)
    assert summary.spread == pytest.approx(0.4)
    assert summary.noisy
    assert not timing.summary([2.0, 2.0, 2.1], loops=2).noisy


def test_the_quietest_attempt_counts():
    quiet, loud, louder = (timing.Timing(1.0, 1.0 - d, 1.0 + d, 9, 1) for d in (0.01, 0.2, 0.3))
    for attempts, expected, used in (
        ([{"A": loud, "B": quiet}, {"A": quiet, "B": quiet}, {"A": quiet}], 1, 2),
        ([{"A": louder}, {"A": loud}, {"A": louder}], 1, 3),
    ):
        left = iter(attempts)
        assert timing.quietest(lambda left=left: next(left), 3) is attempts[expected]
        assert len(list(left)) == 3 - used


def test_settling_waits_for_busy_threads(monkeypatch):
    now, used = [0.0], [0.0]

    def sleep(seconds):
        now[0] += seconds
        used[0] += seconds if now[0] < 0.02 else 0.0  # workers spin for 20 ms

    monkeypatch.setattr(timing.time, "sleep", sleep)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing.time, "process_time", lambda: used[0])
    timing.WallClock().settle()
    assert 0.02 <= now[0] <= 0.03


def test_time_left():
    now = [0.0]
    estimate = progress.Estimate(4, lambda: now[0])
    assert estimate.left() is None
    now[0], estimate.done = 30.0, 1.5
    assert estimate.left() == pytest.approx(50.0)
    assert estimate.text() == "about 0:50 left"


@pytest.mark.parametrize("console", [None, Console(quiet=True)], ids=["lines", "bar"])
def test_progress(console, capsys):
    with progress.shown(2, console) as display:
        display.row(0, "first")
        display.part(0.5)
        display.row(1, "second")
    if console is None:
        assert "2/2 second  about 0:00 left" in capsys.readouterr().err
    else:
        assert display.estimate.done == 1.0


def test_slug():
    result = {"cpu": "AMD EPYC (family 26 model 2)", "threads": 2, "gpu": None}
    assert machine.slug(result) == "amd-epyc-family-26-model-2-2t"
    assert machine.slug(result | {"gpu": {"name": "NVIDIA X"}}) == "nvidia-x"
    assert machine.title(result) == "AMD EPYC (family 26 model 2), 2 threads"


@pytest.mark.parametrize("arguments", [["--only", "no such row"], ["report", "/nowhere.json"]])
def test_one_line_errors(arguments, capsys):
    assert cli.main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1


BARE = """
import sys
for name in ("rich", "matplotlib", "onnx", "onnxruntime"):
    sys.modules[name] = None
from bench import __main__ as cli
from bench.timing import Effort
cli.EFFORTS["quick"] = Effort(1, 0.0)
options = ["--set", "quick", "--only", "T1 B1 H64", "--no-roofline"]
sys.exit(cli.main([*options, "--json", sys.argv[1]]))
"""


def test_torch_alone_is_enough_for_times_and_json(tmp_path):
    out = tmp_path / "bare.json"
    command = [sys.executable, "-c", BARE, str(out)]
    done = subprocess.run(command, cwd=cli.RESULTS.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1/1 T1 B1 H64 step" in done.stderr
    assert "| T1 B1 H64 step |" in done.stdout
    (row,) = report.load(out)["rows"]
    assert report.load(out)["left_out"]["ONNX Runtime"] == ["onnx is not installed"]
    assert "timing" in row["providers"]["lstm_fused"]


def test_held_to_an_instruction_set(tmp_path):
    out = tmp_path / "avx2.json"
    options = ["--set", "quick", "--only", "B4 H64 forward", "--no-roofline", "--threads", "1"]
    assert cli.main([*options, "--isa", "avx2", "--json", str(out)]) == 0
    result = report.load(out)
    assert result["machine"]["forced_isa"] == "avx2"
    assert "AVX2" in result["machine"]["torch_isa"].upper()
    for row in result["rows"]:
        assert {run["isa"] for run in row["providers"]["lstm_fused"]["kernels"]} == {"avx2"}
    assert "cannot be held to an instruction set" in result["left_out"]["ONNX Runtime"]


def test_busy_neighbours_are_there_and_go():
    def children():
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return set(file.read().split())

    before = children()
    with circumstances.neighbours(2):
        assert len(children() - before) == 2
    assert children() == before


def test_fewer_samples_before_fewer_rows():
    effort = Effort(rounds=31, seconds=0.1, row_seconds=4.0, attempts=3)
    assert effort.within(100.0) == effort
    assert effort.within(10.0) == Effort(31, 0.1, row_seconds=4.0, attempts=1)
    late = effort.within(-1.0)
    assert late.attempts == 1 and timing.rounds_for(late, 0.2) == timing.FEWEST_ROUNDS


KILLED = """
import sys
import time
from bench import __main__ as cli
real = cli.measure.measure_row
def row(work, *args, **more):
    if work.mode == "forward":
        print("now", flush=True)
        time.sleep(100)
    return real(work, *args, **more)
cli.measure.measure_row = row
options = ["--set", "quick", "--only", "B16 H128", "--no-roofline", "--json", sys.argv[1]]
cli.SAVED_EVERY = 0.0
cli.SETS["quick"] = cli.SETS["quick"][::-1]
sys.exit(cli.main(options))
"""


@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGKILL], ids=["asked", "killed"])
def test_what_was_measured_survives_a_time_limit(tmp_path, kill):
    out = tmp_path / "part.json"
    command = [sys.executable, "-c", KILLED, str(out)]
    folder = cli.RESULTS.parents[1]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "now\n"
        process.send_signal(kill)
        process.stdout.read()
    assert process.returncode == (130 if kill == signal.SIGTERM else -kill)
    result = report.load(out)
    assert result["interrupted"]
    assert all(row["workload"]["mode"] == "training" for row in result["rows"])
    assert result["rows"]
