"""The harness: what reaches the clock, what is kept and printed. Nothing is timed here."""

import json
import re

import pytest
import torch
from rich.console import Console

from bench import __main__ as cli
from bench import parity, problem, providers, report, timing
from bench.workloads import DTYPES, SETS, Workload
from tests import tolerance

EFFORT = cli.Effort(rounds=2, seconds=0.0)
SMALL = Workload("small", T=3, N=2, I=3, H=4, mode="training", goal=1.0)


def measure(*works):
    return cli.measure(list(works), EFFORT, Console(quiet=True))


@pytest.mark.parametrize("rows", SETS.values(), ids=SETS)
def test_rows_are_well_formed(rows):
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        assert row.dtype in DTYPES
        assert row.mode in ("forward", "training")
        assert row.lengths in ("full", "half")


@pytest.mark.parametrize(
    "work",
    [
        SMALL,
        Workload("packed", T=5, N=3, I=3, H=4, lengths="half", mode="training"),
        Workload("stacked", T=3, N=2, I=3, H=5, layers=2, bidirectional=True, proj=2, state=True),
        Workload("double", T=3, N=2, I=3, H=4, dtype="float64"),
    ],
    ids=lambda work: work.name,
)
def test_oracle_is_nn_lstm_in_float64(work):
    task = problem.build(work)
    exact = problem.oracle(task)
    found = providers.torch_lstm(task).results()
    assert exact.keys() == found.keys()
    assert ("d_x" in found) == work.training
    for name, value in found.items():
        assert exact[name].dtype == torch.float64
        torch.testing.assert_close(value.double(), exact[name], rtol=1e-5, atol=1e-5)


def test_floor_and_factor():
    exact = {"y": torch.tensor([1.0, -2.0], dtype=torch.float64)}
    baseline = {"y": torch.tensor([1.0, -2.0 + 2**-20])}
    allowed = 2 * 2**-20 + tolerance.FLOOR[torch.float32]["y"] * torch.finfo(torch.float32).eps * 2
    (verdict,) = parity.compare(baseline, baseline, exact)
    assert verdict.allowed == pytest.approx(allowed)
    assert verdict.ok
    assert not parity.compare({"y": baseline["y"] + 2 * allowed}, baseline, exact)[0].ok


@pytest.mark.parametrize("wrong", [float("nan"), 1e-3])
def test_a_wrong_provider_gets_no_time(monkeypatch, wrong):
    class Wrong(providers.ModuleRun):
        def results(self):
            found = super().results()
            found["d_x"] = found["d_x"] + wrong
            return found

    monkeypatch.setitem(providers.PROVIDERS, "lstm_fused", lambda p: Wrong(p.module, p))
    result = measure(SMALL)
    entry = result["rows"][0]["providers"]["lstm_fused"]
    assert "timing" not in entry
    assert entry["wrong"]["tensor"] == "d_x"
    heading, (row,) = report.cells(result)
    assert row[heading.index("lstm_fused")].startswith("wrong: d_x off by")
    assert row[heading.index("speedup")] == ""
    assert row[heading.index("result")] == "missed"
    assert "timing" in result["rows"][0]["providers"]["nn.LSTM"]


def test_interrupt_keeps_what_was_measured(monkeypatch, tmp_path):
    measure_row = cli.measure_row

    def interrupted(work, *rest):
        if work.name == "later":
            raise KeyboardInterrupt
        return measure_row(work, *rest)

    monkeypatch.setattr(cli, "measure_row", interrupted)
    rows = (SMALL, Workload("later", T=1, N=1, I=1, H=1))
    monkeypatch.setitem(cli.SETS, "quick", rows)
    monkeypatch.setitem(cli.EFFORTS, "quick", EFFORT)
    out = tmp_path / "new" / "result.json"
    assert cli.main(["--set", "quick", "--threads", "1", "--json", str(out)]) == 130
    saved = json.loads(out.read_text())
    assert [row["workload"]["name"] for row in saved["rows"]] == ["small"]
    assert saved["interrupted"]
    assert "Interrupted" in report.markdown(saved)


def test_samples_are_interleaved_and_summed_up():
    order = []
    steps = {name: (lambda name=name: order.append(name)) for name in "AB"}
    found = timing.interleaved(steps, rounds=3, seconds=0.0)
    assert "".join(order) == "AB" + 3 * "AB"  # the first of each is calibration
    assert found["A"].n == 3
    summary = timing.summary([2.0, 4.0, 6.0], loops=2)
    assert (summary.median, summary.p10, summary.p90) == (2.0, 1.2, 2.8)
    assert summary.noisy


def test_markers(tmp_path):
    result, readme = tmp_path / "result.json", tmp_path / "README.md"
    cli.save(measure(SMALL), result)
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.update_readme(result, readme)
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| small |" in text
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="markers"):
        report.update_readme(result, readme)


def test_readme_table_is_what_its_file_says():
    block = report.README.read_text().partition(report.BEGIN)[2].partition(report.END)[0]
    source = re.search(r"From \[(.+?)\]", block)
    if block.strip():
        path = report.ROOT / source.group(1)
        assert block.strip().startswith(report.markdown(report.load(path)))


@pytest.mark.parametrize("arguments", [["--only", "no such row"], ["report", "/nowhere.json"]])
def test_one_line_errors(arguments, capsys):
    assert cli.main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
