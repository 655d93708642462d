"""Whole measurements: processes of their own, what survives them, and the command's options."""

import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from bench import __main__ as cli
from bench import environment, isolated, measure, onnx_runs, report, run
from bench.cases import Workload
from bench.compiled import NotMeasured
from bench.providers import PROVIDERS
from bench.timing import Sampling
from tests.cuda import gpu_check
from tests.helpers import faulty_worker

SAMPLING = Sampling(rounds=2, seconds=0.0)
FORWARD = Workload("forward", T=3, N=2, I=3, H=4)
TRAINING = Workload("training", T=50, N=64, I=64, H=64, mode="training")
PAIR = ["torch.nn", "lstm_fused"]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setitem(cli.SETS, "quick", (FORWARD, TRAINING))
    monkeypatch.setitem(cli.SAMPLINGS, "quick", SAMPLING)


def test_a_measurement(quick, tmp_path, capsys):
    """Judged in one process, timed in another, memory in a third, written and printed."""
    out = tmp_path / "made" / "result.json"
    options = ["--set", "quick", "--threads", "1", "--no-roofline", "--memory"]
    assert cli.main([*options, "--json", str(out)]) == 0
    result = report.load(out)
    assert result["machine"]["isa"] and result["machine"]["threads"] == 1
    assert result["providers"][:2] == PAIR and not result["interrupted"]
    assert "needs a CUDA device" in result["left_out"]["torch.nn graph"]
    forward, training = result["rows"]
    entry = training["providers"]["lstm_fused"]
    assert {"median", "p10", "p90", "n", "loops", "noisy"} <= entry["timing"].keys()
    assert entry["parity"]["error"] <= entry["parity"]["allowed"]
    assert [each["pass"] for each in entry["kernels"]] == ["forward", "backward"]
    kept = 50 * 64 * 64 * 4 * 4  # the saved gates alone
    assert training["memory"].keys() == set(PAIR) and "memory" not in forward
    assert all(kept < size < 20 * kept for size in training["memory"].values())
    assert "| training " in capsys.readouterr().out


def test_resident_memory_of_a_step():
    """100 MB that a step needs for a moment, and returns, are seen."""
    size = 100_000_000
    grown = measure.peak_bytes(lambda: torch.ones(size, dtype=torch.uint8).max(), "cpu")
    assert 0.95 * size < grown < 1.2 * size  # the kernel counts in batches of pages
    assert measure.peak_bytes(lambda: None, "cpu") < size / 10


def test_faulty_provider_is_isolated():
    """One that kills its process, hangs, or leaves it unusable, costs its own time only."""
    measurer = run.RowMeasurer("cpu", {}, faulty_worker.measure_row)
    names, measurer.worker.silence = [*PAIR, *faulty_worker.FAULTY], 2.0
    reasons = ["its process ended with exit code 7", "said nothing for 2 s"]
    reasons.append("RuntimeError: not captured")
    try:
        entries = measurer._call(measurer.worker, FORWARD, names, SAMPLING)
        assert list(entries) == names
        assert all("timing" in entries[name] for name in PAIR)
        assert [entries[name]["failed"] for name in faulty_worker.FAULTY] == reasons
        for kind in measurer.strikes:
            measurer.strikes[kind] = run.STRIKES
        entries = measurer._call(measurer.worker, FORWARD, names, SAMPLING)
        assert {entries[name]["failed"] for name in faulty_worker.FAULTY} == {
            "broke its process in rows like this"
        }
        row = measurer.row(Workload("impossible", T=3, N=2, I=3, H=4, dtype="no"), PAIR, SAMPLING)
        assert row["absent"] == "its case was lost: KeyError: 'no'"
    finally:
        measurer.worker.stop()


def variables(*names):
    return [os.environ.get(name) for name in names]


def test_a_worker_has_its_own_environment_and_our_threads():
    names = list(environment.KEEP_MEMORY)
    before = variables(*names)
    with isolated.Worker(environment.KEEP_MEMORY) as worker:
        assert worker.call(variables, *names) == list(environment.KEEP_MEMORY.values())
        assert worker.call(torch.get_num_threads) == torch.get_num_threads() == 1
    assert variables(*names) == before


def test_memory_that_is_kept_is_asked_for(monkeypatch):
    asked = []
    worker = isolated.Worker

    def started(variables=None, **more):
        asked.append(variables)
        return worker(variables, **more)

    monkeypatch.setattr(run, "Worker", started)
    judged = {name: {"parity": {}} for name in PAIR}
    monkeypatch.setattr(run.RowMeasurer, "_call", lambda *_, **__: dict(judged))
    run.measure_set([FORWARD], PAIR, SAMPLING, keep_memory=True)
    assert environment.KEEP_MEMORY in asked


def test_what_was_measured_survives_ctrl_c(quick, tmp_path, monkeypatch, capsys):
    def row(self, work, names, sampling):
        if work is TRAINING:
            raise KeyboardInterrupt
        entry = {"timing": {"median": 1.0, "p10": 1.0, "p90": 1.0, "noisy": False}}
        return {"workload": asdict(work), "providers": {name: entry for name in names}}

    monkeypatch.setattr(run.RowMeasurer, "row", row)
    out = tmp_path / "part.json"
    assert cli.main(["--set", "quick", "--no-roofline", "--json", str(out)]) == 130
    result = report.load(out)
    assert [r["workload"]["name"] for r in result["rows"]] == ["forward"]
    assert result["interrupted"]
    assert "Interrupted: later rows are missing." in capsys.readouterr().out


KILLED = """
import sys
import time
from dataclasses import asdict
from pathlib import Path
from bench import __main__ as cli
def row(self, work, names, sampling):
    if work.mode == "training":
        print("now", flush=True)
        time.sleep(100)
    return {"workload": asdict(work), "providers": {name: {} for name in names}}
cli.run.RowMeasurer.row = row
cli.SAVED_EVERY = 0.0
options = ["--set", "quick", "--only", "B16 H128", "--no-roofline", "--json", sys.argv[1]]
if __name__ == "__main__":
    sys.exit(cli.main(options))
"""


@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGKILL], ids=["asked", "killed"])
def test_what_was_measured_survives_a_time_limit(tmp_path, kill):
    out = tmp_path / "part.json"
    command = [sys.executable, "-c", KILLED, str(out)]
    process = subprocess.Popen(command, cwd=environment.ROOT, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout.readline() == "now\n"
        process.send_signal(kill)
        process.stdout.read()
    assert process.returncode == (130 if kill == signal.SIGTERM else -kill)
    result = report.load(out)
    assert result["interrupted"]
    assert [row["workload"]["mode"] for row in result["rows"]] == ["forward"]


BARE = """
import sys
for name in ("rich", "matplotlib", "numpy", "onnx", "onnxruntime"):
    sys.modules[name] = None
from bench import __main__ as cli
sys.exit(cli.main(["report", sys.argv[1]]))
"""


def test_torch_alone_is_enough(monkeypatch):
    (path,) = cli.RESULTS.glob("*-2t.json")
    command = [sys.executable, "-W", "ignore", "-c", BARE, str(path)]
    done = subprocess.run(command, cwd=environment.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| B32 H256 training " in done.stdout
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert PROVIDERS["ONNX Runtime"].unsupported_reason(FORWARD, "cpu") == "onnx is not installed"


def test_held_to_an_instruction_set(tmp_path):
    out = tmp_path / "avx2.json"
    options = ["--set", "quick", "--only", "T1 B1 H64 step", "--no-roofline"]
    names = "lstm_fused,ONNX Runtime,ONNX Runtime int8"
    more = ["--seconds", "0.1", "--threads", "1", "--providers", names]
    assert cli.main([*options, *more, "--isa", "avx2", "--json", str(out)]) == 0
    result = report.load(out)
    assert result["machine"]["forced_isa"] == "avx2"
    assert "AVX2" in result["machine"]["torch_isa"].upper()
    (row,) = result["rows"]
    assert {ran["isa"] for ran in row["providers"]["lstm_fused"]["kernels"]} == {"avx2"}
    assert "timing" in row["providers"]["ONNX Runtime"]
    # Where there are no instructions for them, its sums of products of bytes overflow 16 bits. A
    # Zen 5 has them beside AVX2, too.
    held = row["providers"]["ONNX Runtime int8"]["rounded"]["relative"]
    free = measure.measure_row(Workload(**row["workload"]), ["torch.nn", "ONNX Runtime int8"], None)
    flags = Path("/proc/cpuinfo").read_text().split()
    if "avx512_vnni" in flags and "avx_vnni" not in flags:
        assert held > 5 * free["ONNX Runtime int8"]["rounded"]["relative"]
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patched:
        patched.setenv(environment.ISA_VARIABLE, "avx2")
        reason = PROVIDERS["OpenVINO"].unsupported_reason(FORWARD, "cpu")
        assert reason == "cannot be held to an instruction set"


def test_onnx_runtime_that_was_imported_before_cannot_be_held(monkeypatch):
    import onnxruntime  # noqa: F401

    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv(environment.ISA_VARIABLE, "avx2")
    with pytest.raises(NotMeasured, match="imported before"):
        onnx_runs.import_onnx_runtime()


def test_busy_processes_are_there_and_go():
    def children():
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return set(file.read().split())

    before = children()
    with environment.busy_processes(2):
        assert len(children() - before) == 2
    assert children() == before


def test_machines_have_names(fake_cuda, monkeypatch):
    machine = {"cpu": "AMD EPYC (family 26 model 2)", "threads": 2, "gpu": None}
    assert environment.slug(machine) == "amd-epyc-family-26-model-2-2t"
    assert environment.title(machine) == "AMD EPYC (family 26 model 2), 2 threads"
    monkeypatch.setattr(environment, "output_of", lambda *command: "unknown")
    found = environment.describe("cuda")
    assert found["gpu"]["name"] == "NVIDIA Abacus" and found["gpu"]["driver"] == "unknown"
    assert environment.slug(found) == "nvidia-abacus"


@pytest.mark.parametrize("arguments", [["--only", "no such row"], ["report", "/nowhere.json"]])
def test_one_line_errors(arguments, capsys):
    assert cli.main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1


@pytest.mark.parametrize("part", ["plans", "bench"])
def test_gpu_check_uses_options_that_there_are(part, tmp_path):
    commands = gpu_check.commands(part, tmp_path)
    for _, *module, name, out in (command[1:] for command in commands):
        args = cli.parse([*module[1:], name, out])
        assert args.device == "cuda" and args.json.parent == tmp_path
        assert args.roofline or args.providers[:2] == PAIR


@pytest.mark.parametrize(("seconds", "times"), [(1.0, 1), (100.0, 2)])
def test_limits_are_measured_again_where_there_is_time(monkeypatch, seconds, times):
    now, asked = [0.0], []
    monkeypatch.setattr(run.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(run.roofline, "best", lambda found: {})
    monkeypatch.setattr(run.roofline, "limit_of_row", lambda *_: None)

    def find_roofline():
        now[0] += 10.0
        asked.append(now[0])
        return {}

    sampling = Sampling(rounds=2, seconds=0.0, set_seconds=seconds)
    run.measure_set([], PAIR, sampling, find_roofline=lambda: find_roofline() or {"rates": 1})
    assert len(asked) == times
