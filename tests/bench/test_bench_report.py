"""What becomes of results: tables, goals, charts, the page, the README, comparisons."""

import builtins
import copy
import json
from dataclasses import asdict

import pytest

from bench import __main__ as cli
from bench import chart, compare, page, readme, report
from bench.sets import SETS
from bench.workloads import Workload

MACHINE = {
    "device": "cpu",
    "cpu": "Slide Rule",
    "cpus": 2,
    "gpu": None,
    "threads": 2,
    "isa": "avx2",
    "forced_isa": None,
    "torch": "2.13.0",
    "revision": "abc",
    "date": "2026-01-01 00:00 UTC",
}


def timed(median, spread=0.01):
    """An entry with p10 and p90 so far from the median, as a part of it."""
    low, high = median * (1 - spread), median * (1 + spread)
    return {
        "timing": {
            "median": median,
            "p10": low,
            "p90": high,
            "n": 9,
            "loops": 1,
            "noisy": spread > 0.075,
        }
    }


def row(name="B8 forward", theirs=2e-3, ours=1e-3, spread=0.01, onnx=None, **more):
    goals = more.pop("goals", {})
    sizes = {"T": 10, "N": 8, "I": 4, "H": 4} | more.pop("sizes", {})
    providers = {"torch.nn": timed(theirs, spread), "lstm_fused": timed(ours, spread)}
    if onnx:
        providers["ONNX Runtime"] = timed(onnx)
    work = Workload(name, goals=goals, **sizes)
    return {"workload": asdict(work), "providers": providers} | more


def result(*rows, **more):
    names = {name: None for r in rows for name in r["providers"]}
    return {
        "schema": 2,
        "set": "cpu",
        "machine": MACHINE,
        "providers": list(names),
        "rows": list(rows),
        "others": 0.0,
        "interrupted": False,
    } | more


def cell(found, heading, line=0):
    names, groups = report.cells(found)
    return [line for _, lines in groups for line in lines][line][names.index(heading)]


def written(folder, name, found):
    path = folder / name
    cli.save(found, path)
    return path


def test_durations_and_amounts():
    assert [report.duration(s) for s in (2.5, 0.0123, 1.76e-5)] == ["2.5 s", "12.3 ms", "17.6 µs"]
    assert [report.amount(b) for b in (2e9, 1.25e7, 900)] == ["2 GB", "12.5 MB", "0.9 kB"]


def test_goals():
    goals = {"torch.nn": 1.5, "ONNX Runtime": 1.05}
    found = result(
        row("met", goals=goals, onnx=1.2e-3),
        row("missed", ours=1.6e-3, goals=goals, onnx=1.2e-3),
        row("alone", goals=goals),
        row("none"),
    )
    assert cell(found, "over torch.nn", 0) == "2.00x (goal 1.5x)"
    assert cell(found, "over ONNX Runtime", 0) == "1.20x (goal 1.05x)"
    assert cell(found, "over torch.nn", 1) == "1.25x (goal 1.5x, missed)"
    assert cell(found, "over ONNX Runtime", 1) == "0.75x (goal 1.05x, missed)"
    assert cell(found, "over ONNX Runtime", 2) == ""  # nobody to be faster than
    assert cell(found, "over torch.nn", 3) == "2.00x"
    assert "Goals reached: 4 of 6." in report.caption(found)


def test_graphs_are_compared_with_graphs():
    goals = {"torch.nn": 2.0, "torch.nn graph": 2.0, "torch.nn one chunk": 2.0}
    met = row(goals=goals, sizes={"step_us": 120.0})
    met["providers"] |= {"torch.nn graph": timed(1.8e-3), "lstm_fused graph": timed(9e-4)}
    late = row("late", ours=2e-3, sizes={"step_us": 120.0})
    found = result(met, late)
    assert cell(found, "over torch.nn") == "2.00x (goal 2x)"
    assert cell(found, "over torch.nn graph") == "2.00x (goal 2x)"
    assert "over lstm_fused graph" not in report.cells(found)[0]
    assert cell(found, "a time step", 0) == "100 / 90 µs (goal 120 µs)"
    met["limit"] = 4.5e-4
    assert cell(found, "of limit", 0) == "45% / 50%"
    assert cell(found, "a time step", 1) == "200 µs (goal 120 µs, missed)"
    assert "Goals reached: 4 of 5." in report.caption(found)  # one chunk: nobody to be faster than


def test_share_of_the_limit():
    found = result(row(limit=8e-4), row("other"))
    assert cell(found, "of limit", 0) == "80%"
    assert cell(found, "of limit", 1) == ""
    assert "of limit" not in report.cells(result(row()))[0]


def test_memory():
    found = result(row(memory={"torch.nn": 2.5e7, "lstm_fused": 1e7}), row("other"))
    assert cell(found, "memory", 0) == "25 MB / 10 MB"
    assert cell(found, "memory", 1) == ""


def test_noise_others_and_interruption_are_said():
    caption = report.caption(result(row(spread=0.3), others=0.5, interrupted=True))
    assert "~ marks" in caption
    assert "Other programs used 0.5 CPUs" in caption
    assert "Interrupted" in caption
    assert "±30% ~" in cell(result(row(spread=0.3)), "torch.nn")
    assert "~" not in report.markdown(result(row()))


def test_rows_stand_under_their_regime():
    rows = [row("a"), row("b", sizes={"mode": "training"}), row("c")]
    _, groups = report.cells(result(*rows))
    assert [(name, [line[0] for line in lines]) for name, lines in groups] == [
        ("forward, batch 2 to 8", ["a", "c"]),
        ("training", ["b"]),
    ]


def test_compare_knows_noise_from_change():
    before = result(row("same"), row("slower"), row("noisy", spread=0.2), row("gone"))
    after = result(
        row("same", theirs=4e-3, ours=2.02e-3),  # the whole machine was slower
        row("slower", ours=1.1e-3),
        row("noisy", ours=1.2e-3, spread=0.2),
        row("new"),
    )
    found = {c.name: c for c in compare.changes(before, after)}
    assert {name: c.verdict for name, c in found.items()} == {
        "same": "same",
        "slower": "slower",
        "noisy": "same",
    }
    assert found["slower"].factor == pytest.approx(1 / 1.1)
    assert found["slower"].spread == pytest.approx(0.02)
    assert [name for name, c in found.items() if c.regressed] == ["slower"]
    assert compare.notes(before, after) == ["Only in the first: gone.", "Only in the second: new."]
    (back,) = compare.changes(result(row("slower", ours=1.1e-3)), result(row("slower")))
    assert back.verdict == "faster"


def test_a_row_that_lost_its_time_is_a_regression():
    wrong = row()
    wrong["providers"]["lstm_fused"] = {"wrong": {}}
    (change,) = compare.changes(result(row()), result(wrong))
    assert change.regressed
    (change,) = compare.changes(result(wrong), result(row()))
    assert change.verdict == "new"


def test_compare_exits_by_what_it_finds(tmp_path, capsys):
    a = written(tmp_path, "a.json", result(row()))
    b = written(tmp_path, "b.json", result(row(ours=1.5e-3)))
    c = written(tmp_path, "c.json", result(row("unheard of")))
    d = written(tmp_path, "d.json", result(row(sizes={"H": 5})))
    assert cli.main(["compare", str(a), str(a)]) == 0
    assert "no row" in capsys.readouterr().out
    assert cli.main(["compare", str(a), str(b)]) == 1
    assert "Slower beyond the spread: B8 forward." in capsys.readouterr().out
    for other in (c, d):
        assert cli.main(["compare", str(a), str(other)]) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_different_machines_are_noted():
    other = result(row()) | {"machine": MACHINE | {"threads": 1}}
    assert compare.notes(result(row()), other) == [
        "Different machines: Slide Rule, 2 threads; Slide Rule, 1 thread."
    ]


def test_report_writes_tables_charts_and_one_page(tmp_path, capsys):
    hostile = row("<b> & row", limit=9e-4, onnx=3e-3)
    path = written(tmp_path, "made.json", result(hostile, row("second", limit=1e-4)))
    assert cli.main(["report", str(path), "--write"]) == 0
    names = {p.suffix for p in tmp_path.iterdir()}
    assert names == {".json", ".md", ".svg", ".png", ".html"}
    assert capsys.readouterr().out.count("written to") == 4
    text = (tmp_path / "made.html").read_text()
    assert "&lt;b&gt; &amp; row" in text and "<b> &" not in text
    assert "data:image/svg+xml;base64," in text
    assert 'src="http' not in text and "<script" not in text and "<link" not in text
    assert chart.digest(report.load(path)) in (tmp_path / "made.svg").read_text()
    assert (tmp_path / "made.png").read_bytes()[:4] == b"\x89PNG"


def test_a_chart_is_the_same_file_each_time(tmp_path):
    found = result(row(limit=8e-4))
    first, second = (chart.save(found, tmp_path / name)[0].read_bytes() for name in "ab")
    assert first == second
    assert chart.digest(found) != chart.digest(result(row(limit=8e-4, ours=1.1e-3)))


def test_a_sweep_is_drawn_as_lines(tmp_path):
    rows = [{"workload": asdict(work), "providers": row()["providers"]} for work in SETS["sweep"]]
    found = result(*rows)
    assert chart.is_sweep(found)
    assert not chart.is_sweep(result(row()))
    assert "over H, N6" in chart.save(found, tmp_path / "sweep")[0].read_text()


def test_without_matplotlib(tmp_path, monkeypatch, capsys):
    path = written(tmp_path, "made.json", result(row()))
    real = builtins.__import__

    def refuse(name, *args, **more):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert cli.main(["report", str(path), "--write"]) == 0
    assert "matplotlib is not installed" in capsys.readouterr().err
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".md", ".html"}
    assert cli.main(["report", str(path), "--readme"]) == 2


def test_red_and_missed_rows_stand_out_on_the_page():
    wrong = row("wrong")
    wrong["providers"]["lstm_fused"] = {
        "wrong": {"tensor": "y", "error": 1.0, "allowed": 0.1, "baseline_error": 0.0}
    }
    text = page.page([result(wrong, row("slow", goals={"torch.nn": 3.0}))], [None])
    assert 'class="red"' in text and 'class="missed"' in text


def test_files_of_another_kind_are_refused(tmp_path, capsys):
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"rows": []}))
    assert cli.main(["report", str(old)]) == 2
    assert "measure again" in capsys.readouterr().err


def test_markers(tmp_path):
    path, text = written(tmp_path, "made.json", result(row("small"))), tmp_path / "README.md"
    text.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    readme.update([path], text)
    found = text.read_text()
    assert found.startswith("before\n")
    assert found.endswith("\nafter\n")
    assert "old" not in found
    assert "| small |" in found
    assert readme.paths_in(found) == [path]
    assert f"({path.with_suffix('.svg')})" in found
    text.write_text("no markers")
    with pytest.raises(ValueError, match="markers"):
        readme.update([path], text)


def test_readme_shows_what_its_files_say():
    shown = readme.README.read_text().partition(readme.BEGIN)[2].partition(readme.END)[0]
    paths = readme.paths_in(shown)
    assert paths
    assert shown.strip() == readme.block(paths)
    for path in paths:
        drawn = path.with_suffix(".svg").read_text()
        assert chart.digest(report.load(path)) in drawn
        changed = copy.deepcopy(report.load(path))
        changed["rows"][0]["providers"]["lstm_fused"]["timing"]["median"] *= 1.01
        assert chart.digest(changed) not in drawn
