"""What only a GPU's rows need: their set, graphs, events, and a worker that may be lost."""

import time

import pytest
import torch

from bench import machine, measure, problem, providers, timing, worker
from bench.sets import SETS
from bench.timing import Effort
from bench.workloads import Workload

EFFORT = Effort(rounds=2, seconds=0.0)
PAIR = measure.chosen(["torch.nn", "lstm_fused"])


def test_gpu_rows_are_both_modes_of_each_shape():
    first, *rows = SETS["gpu"]
    assert first.mode == "step" and first.T == 1
    assert all(row.group and row.mode in ("forward", "training") for row in rows)
    names = [row.name.rpartition(" ") for row in rows]
    assert {mode for _, _, mode in names} == {"forward", "training"}
    assert [name for name, _, _ in names[::2]] == [name for name, _, _ in names[1::2]]
    # A run that is cut early has rows of every group.
    groups = {row.group for row in rows}
    assert {row.group for row in rows[: 2 * len(groups)]} == groups


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("name", ["torch.nn graph", "lstm_fused graph"])
def test_a_graph_is_the_same_step_each_time(fake_cuda, name, mode):
    """Its replay writes all results and gradients, and adds to none."""
    task = problem.build(Workload("captured", T=3, N=2, I=3, H=4, mode=mode))
    run = providers.PROVIDERS[name].build(task)
    exact = problem.oracle(task)
    for _ in range(3):
        with torch.no_grad():
            run.out[0].fill_(float("nan"))
            for leaf in run.leaves.values():
                if leaf.grad is not None:
                    leaf.grad.fill_(float("nan"))
        found = run.results()
        assert found.keys() == exact.keys()
        for tensor, value in found.items():
            torch.testing.assert_close(value.double(), exact[tensor], rtol=1e-5, atol=1e-5)


def test_events_time_a_gpu(fake_cuda):
    clock = timing.clock_for("cuda")
    loops, taken = timing.loops_for(lambda: time.sleep(0.002), 0.01, clock)
    assert loops >= 4 and 0.01 <= taken < 0.1
    clock.settle()


def test_this_gpu_is_described(fake_cuda, monkeypatch):
    monkeypatch.setattr(machine, "output_of", lambda *command: None)
    found = machine.describe("cuda")
    assert found["gpu"]["name"] == "NVIDIA Abacus" and found["gpu"]["driver"] == "unknown"
    assert machine.slug(found) == "nvidia-abacus"


@pytest.fixture
def spoilt_worker(monkeypatch):
    """A worker with more providers than there are, see faulty_worker.py."""
    more = dict.fromkeys(("exits", "hangs", "refuses"), providers.Provider(None))
    found = worker.Worker("tests.helpers.faulty_worker", silence=2.0)
    yield found, PAIR | more
    found.stop()


def test_who_spoils_a_worker_costs_its_own_time_only(spoilt_worker):
    measure_one, everybody = spoilt_worker
    forward = Workload("forward", T=3, N=2, I=3, H=4)
    for again in range(3):
        row = measure_one(forward, EFFORT, everybody, "cpu", lambda part: None)
        entries = row["providers"]
        assert list(entries) == list(everybody)
        assert all("timing" in entries[name] for name in PAIR)
        failed = [entries[name]["failed"] for name in ("exits", "hangs", "refuses")]
        if again == worker.STRIKES:
            assert failed == ["spoilt like rows before"] * 3
        else:
            assert failed == [
                "the process that measured it ended with exit code 7",
                "said nothing for 2 s",
                "RuntimeError: not captured",
            ]


def test_a_row_nobody_can_be_given_is_a_fact_about_it(spoilt_worker):
    measure_one, _ = spoilt_worker
    impossible = Workload("impossible", T=3, N=2, I=3, H=4, dtype="unheard of")
    row = measure_one(impossible, EFFORT, PAIR, "cpu", lambda part: None)
    assert row["absent"] == (
        "its problem was lost: the process that measured it ended with exit code 1"
    )
    assert row["providers"] == {name: {} for name in PAIR}
    assert not measure_one.strikes
