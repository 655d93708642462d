"""What people read of results: tables, goals, charts, the page, README, comparisons."""

import json
import sys
from dataclasses import asdict

import pytest
import torch

from bench import __main__ as cli
from bench import charts, pages, report
from bench.cases import HEADLINE, SETS, Workload

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
    return [line for lines in groups.values() for line in lines][line][names.index(heading)]


def written(folder, name, found):
    path = folder / name
    report.save(found, path)
    return path


def test_durations_and_amounts():
    assert [report.quantity(s) for s in (2.5, 0.0123, 1.76e-5)] == ["2.5 s", "12.3 ms", "17.6 µs"]
    assert [report.quantity(b, report.BYTES) for b in (2e9, 1.25e7, 900)] == [
        "2 GB",
        "12.5 MB",
        "0.9 kB",
    ]


def test_goals_are_not_in_the_table():
    goals = {"torch.nn": 1.5, "ONNX Runtime": 1.05}
    slow = row("slow a step", sizes={"step_us": {"lstm_fused": 50.0}})
    found = result(
        row("met", goals=goals, onnx=1.2e-3),
        row("missed", ours=1.6e-3, goals=goals, onnx=1.2e-3),
        row("alone", goals=goals),  # no ONNX Runtime to be faster than
        slow,
    )
    assert cell(found, "over torch.nn", 1) == "1.25x"
    assert cell(found, "over ONNX Runtime", 1) == "0.75x"
    assert cell(found, "over ONNX Runtime", 2) == ""
    assert cell(found, "µs a time step", 3) == "100"
    assert "goal" not in report.markdown(found).lower()
    assert report.goals_text(found).splitlines() == [
        "Goals reached: 3 of 6.",
        "- missed: 1.25 of 1.5x over torch.nn",
        "- missed: 0.75 of 1.05x over ONNX Runtime",
        "- slow a step: 100 of 50 µs a time step",
    ]


def rounded(median, relative):
    return timed(median) | {"rounded": {"relative": relative, "largest": 1.0}}


def test_rounded_weights_are_compared_with_rounded_weights():
    """Their errors are in the table. A goal is of the counterpart, and left out without a peer."""
    goals = {"ONNX Runtime int8": 1.1, "lstm_fused": 1.6}
    first, second = row("first", goals=goals), row("second", goals=goals)
    for each in (first, second):
        each["providers"]["lstm_fused int8"] = rounded(5e-4, 4.1e-3)
        each["providers"]["lstm_fused bfloat16 weights"] = rounded(8e-4, 1e-3)
    first["providers"]["ONNX Runtime int8"] = rounded(6e-4, 1e-2)
    found = result(first, second, set="int8")
    assert cell(found, "int8 over lstm_fused") == "2.00x"
    assert cell(found, "int8 over ONNX Runtime int8") == "1.20x"
    assert cell(found, "bfloat16 weights over lstm_fused") == "1.25x"
    assert cell(found, "error") == "4.1e-3 / 1.0e-3 / 1.0e-2"
    assert cell(found, "error", 1) == "4.1e-3 / 1.0e-3 / -"
    assert not any("torch.nn int8" in heading for heading in report.cells(found)[0])
    of = "1.25 of 1.6x of lstm_fused bfloat16 weights over lstm_fused"
    assert report.goals_text(found).splitlines() == [
        "Goals reached: 1 of 3.",
        f"- first: {of}",
        f"- second: {of}",
    ]
    assert "Error: of y" in report.caption(found)
    assert charts.digest(found) in charts.chart(found)


def test_goals_of_a_step_depend_on_the_instruction_set():
    goals = {"lstm_fused on avx512": 50.0, "lstm_fused on avx2": 150.0, "lstm_fused C stream": 3.0}
    found = result(row("step", sizes={"step_us": goals}))
    assert report.goals_text(found) == "Goals reached: 1 of 1."  # 100 µs, on avx2
    found["rows"][0]["providers"]["lstm_fused C stream"] = timed(1e-4)
    found["providers"].append("lstm_fused C stream")
    found["machine"] = MACHINE | {"isa": "avx512_bf16"}
    assert report.goals_text(found).splitlines() == [
        "Goals reached: 0 of 2.",
        "- step: 100 of 50 µs a time step",
        "- step: 10 of 3 µs a time step of lstm_fused C stream",
    ]


def test_graphs_are_compared_with_graphs():
    found = row(limit=4.5e-4)
    found["providers"] |= {"torch.nn graph": timed(1.8e-3), "lstm_fused graph": timed(9e-4)}
    found = result(found)
    assert cell(found, "over torch.nn") == cell(found, "over torch.nn graph") == "2.00x"
    assert "over lstm_fused graph" not in report.cells(found)[0]
    assert cell(found, "of limit", 0) == "45% / 50%"


def test_limits_and_memory_where_there_are_any():
    memory = {"torch.nn": 2.5e7, "lstm_fused": 1e7}
    found = result(row(limit=8e-4, memory=memory), row("other"))
    assert [cell(found, "of limit", line) for line in (0, 1)] == ["80%", ""]
    assert [cell(found, "memory", line) for line in (0, 1)] == ["25 MB / 10 MB", ""]
    assert not {"of limit", "memory"} & set(report.cells(result(row()))[0])


def test_noise_load_and_interruption_are_said():
    noisy = result(row(spread=0.3), others=0.5, interrupted=True, keep_memory=True)
    caption = report.caption(noisy)
    for part in ("~ marks", "Other programs used 0.5 CPUs", "Interrupted", "keep what is freed"):
        assert part in caption
    assert "±30% ~" in cell(noisy, "torch.nn")
    assert "~" not in report.markdown(result(row()))
    assert "beside 2 busy" in report.caption(result(row(), busy=2))


def test_wrong_and_failed_providers_are_shown():
    wrong = row("wrong", absent=None)
    del wrong["absent"]
    verdict = {"tensor": "y", "error": 1.0, "allowed": 0.1, "baseline_error": 0.0}
    wrong["providers"] |= {"lstm_fused": {"wrong": verdict}, "peer": {"failed": "Error: no"}}
    found = result(wrong, row("left", absent="lstm_fused has no Unknown yet"))
    assert cell(found, "lstm_fused") == "wrong: y off by 1.0e+00 > 1.0e-01"
    assert cell(found, "peer") == "failed: Error: no"
    assert report.is_ours_wrong(wrong) and not report.is_ours_wrong(row())
    assert "| left " not in report.markdown(found)
    assert "Left out: lstm_fused has no Unknown yet." in report.caption(found)


def test_rows_stand_under_their_regime():
    rows = [row("a"), row("b", sizes={"mode": "training"}), row("c")]
    _, groups = report.cells(result(*rows))
    assert {name: [line[0] for line in lines] for name, lines in groups.items()} == {
        "forward, batch 2 to 8": ["a", "c"],
        "training": ["b"],
    }


def test_compare_knows_noise_from_change(tmp_path, capsys):
    """And exits by what it finds; a row that lost its time is slower too."""
    lost = row("lost")
    lost["providers"]["lstm_fused"] = {"failed": "Error"}
    before = result(row("same"), row("slow"), row("noisy", spread=0.2), row("lost"), row("gone"))
    after = result(
        row("same", theirs=4e-3, ours=2.02e-3),  # the whole machine was slower
        row("slow", ours=1.1e-3),
        row("noisy", ours=1.2e-3, spread=0.2),
        lost,
        row("new"),
        machine=MACHINE | {"threads": 1},
    )
    found = {c.name: c for c in report.changes(before, after)}
    assert {name: c.verdict for name, c in found.items()} == {
        "same": "same",
        "slow": "slower",
        "noisy": "same",
        "lost": "no time any more",
    }
    assert found["slow"].factor == pytest.approx(1 / 1.1)
    assert found["slow"].spread == pytest.approx(0.02)
    back = {c.name: c.verdict for c in report.changes(after, before)}
    assert back["slow"] == "faster" and back["lost"] == "new"
    paths = [str(written(tmp_path, f"{k}.json", r)) for k, r in enumerate((before, after))]
    assert cli.main(["compare", paths[0], paths[0]]) == 0
    assert cli.main(["compare", *paths]) == 1
    text = capsys.readouterr().out
    for line in (
        "Slower beyond the spread: slow, lost.",
        "Only in the first: gone.",
        "Only in the second: new.",
        "Different machines: Slide Rule, 2 threads; Slide Rule, 1 thread.",
    ):
        assert line in text


def test_compare_refuses_what_cannot_be_compared(tmp_path, capsys):
    rows = (row(), row("another"), row(sizes={"H": 5}))
    paths = [str(written(tmp_path, f"{k}.json", result(r))) for k, r in enumerate(rows)]
    for other in paths[1:]:
        assert cli.main(["compare", paths[0], other]) == 2
        assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    ("theirs", "ours", "spread", "even"),
    [
        (1.0, 1.0, 0.0, True),
        (1.0, 1.02, 0.0, False),
        (1.0, 1.05, 0.05, True),
        (1, 0.8, 0.01, False),
    ],
)
def test_itself_is_even_within_its_spread(theirs, ours, spread, even, monkeypatch, capsys):
    found = result(row(), left_out={})
    names = ("torch.nn", "torch.nn again")
    timings = (timed(theirs, spread), timed(ours, spread))
    found["rows"][0]["providers"] = dict(zip(names, timings, strict=True))
    monkeypatch.setattr(cli, "run_rows", lambda args, works: found)
    assert cli.main(["--set", "quick", "--threads", "1", "--self"]) == (0 if even else 1)
    assert ("even |" in capsys.readouterr().out) == even


def test_several_thread_counts(tmp_path, monkeypatch, capsys):
    """Each is measured and written, then the speed-up of each provider from the first is shown."""
    times = {1: (2e-3, 1e-3), 4: (1e-3, 2.5e-4)}

    def measured(args, works):
        assert torch.get_num_threads() == args.threads
        theirs, ours = times[args.threads]
        machine = MACHINE | {"threads": args.threads}
        return result(row(theirs=theirs, ours=ours), left_out={}, machine=machine)

    monkeypatch.setattr(cli, "run_rows", measured)
    out = tmp_path / "out.json"
    assert cli.main(["--threads", "1,4", "--json", str(out)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"out-1t.json", "out-4t.json"}
    table = capsys.readouterr().out.split("\n\n")[-2].splitlines()
    assert [cell.strip() for cell in table[-1].split("|")[1:-1]] == ["B8 forward", "4.00x", "2.00x"]
    with pytest.raises(SystemExit):
        cli.main(["--threads", "1,0"])


def test_a_page_and_a_chart_on_demand(tmp_path):
    path = written(tmp_path, "made.json", result(row("<b> & row", limit=9e-4, onnx=3e-3)))
    assert cli.main(["report", str(path), "--html", str(tmp_path / "page.html"), "--svg"]) == 0
    text, drawn = (tmp_path / "page.html").read_text(), (tmp_path / "made.svg").read_text()
    assert "&lt;b&gt; &amp; row" in text and "<b> &" not in text and "<svg" in text
    assert 'src="http' not in text and "<script" not in text and "<link" not in text
    found = report.load(path)
    assert charts.digest(found) in drawn and charts.chart(found) == drawn
    assert charts.digest(found) != charts.digest(result(row("<b> & row", ours=1.1e-3)))


def test_a_sweep_is_drawn_as_lines():
    rows = [{"workload": asdict(work), "providers": row()["providers"]} for work in SETS["sweep"]]
    assert charts.is_sweep(result(*rows)) and not charts.is_sweep(result(row()))
    assert "over H, N6" in charts.chart(result(*rows))


def test_without_matplotlib(tmp_path, monkeypatch, capsys):
    path = written(tmp_path, "made.json", result(row()))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["report", str(path), "--svg"]) == 2
    assert "matplotlib is not installed" in capsys.readouterr().err
    assert cli.main(["report", str(path), "--html", str(tmp_path / "page.html")]) == 0


def test_files_of_another_kind_are_refused(tmp_path, capsys):
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"rows": []}))
    assert cli.main(["report", str(old)]) == 2
    assert "measure again" in capsys.readouterr().err


def test_markers(tmp_path):
    path, text = written(tmp_path, "made.json", result(row("small"))), tmp_path / "docs.md"
    text.write_text(f"before\n{pages.BEGIN}\nold\n{pages.END}\nafter\n")
    pages.update(text, [path])
    found = text.read_text()
    assert found.startswith("before\n") and found.endswith("\nafter\n")
    assert "old" not in found and "| small " in found and "(made.svg)" in found
    assert pages.paths_in(found, text) == [path]
    text.write_text("no markers")
    with pytest.raises(ValueError, match="markers"):
        pages.update(text, [path])


PAGES = [
    *(pages.README, pages.DOCS, pages.WORKS_WITH, pages.SEQUENCES),
    *(pages.QUANTIZATION, pages.STREAMING, pages.CELLS),
]


@pytest.mark.parametrize("target", PAGES, ids=lambda path: path.name)
def test_pages_show_what_their_files_say(target):
    shown = target.read_text().partition(pages.BEGIN)[2].partition(pages.END)[0]
    paths = pages.paths_in(shown, target)
    assert paths
    assert shown.strip() == pages.block(paths, target)
    assert target != pages.README or all(f"| {name} " in shown for name in HEADLINE)
    for path in paths:
        found, changed = report.load(path), report.load(path)
        for row in changed["rows"][:1]:
            row["providers"]["lstm_fused"]["timing"]["median"] *= 1.01
        for shape in changed.get("latency", []):
            shape["calls"] += 1
        digests = {charts.RATIOS: charts.digest} if found["rows"] else {}
        digests |= {charts.LATENCY: charts.latency_digest} if found.get("latency") else {}
        assert digests or found["set"] == "accuracy"
        for ending, digest in digests.items():
            drawn = charts.beside(path, ending).read_text()
            assert digest(found) in drawn and digest(changed) not in drawn
