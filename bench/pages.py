"""What README and the pages of docs show of results files, and a page of its own."""

import contextlib
import html
import json
import os
import re
from pathlib import Path

from bench import charts, environment
from bench.cases import HEADLINE, OURS, TORCH
from bench.charts import is_sweep
from bench.environment import ROOT
from bench.report import caption, cells, latency_table, load, markdown, measured, table, table_text

README, DOCS = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
WORKS_WITH, SEQUENCES = ROOT / "docs" / "works_with.md", ROOT / "docs" / "sequences.md"
CELLS = ROOT / "docs" / "cells.md"
QUANTIZATION, STREAMING = ROOT / "docs" / "quantization.md", ROOT / "docs" / "streaming.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def page(results: list[dict]) -> str:
    """One HTML page with nothing to load from elsewhere."""
    parts = ['<!doctype html><meta charset="utf-8"><title>lstm_fused, measured</title>']
    for result in results:
        with contextlib.suppress(charts.NoChart):
            parts += (picture.partition("?>")[2] for picture in charts.pictures(result).values())
        facts = json.dumps([result["machine"], result.get("roofline")], indent=1)
        parts += (f"<pre>{html.escape(text)}</pre>" for text in (markdown(result), facts))
    return "\n".join(parts)


def headline(result: dict) -> str:
    """README's short table of a result."""
    heading, groups = cells(result)
    keep = [heading.index(name) for name in ("case", TORCH, OURS, f"over {TORCH}")]
    rows = [line for lines in groups.values() for line in lines if line[0] in HEADLINE]
    return table_text([[line[k] for k in keep] for line in (heading, *rows)])


def block(paths: list[Path], target: Path) -> str:
    """What README shows of the first file, and a page of docs of all; of a sweep the chart."""
    parts = []
    for path in paths[:1] if target == README else paths:
        result, name = load(path), os.path.relpath(path.resolve(), target.parent)
        title = f"{environment.title(result['machine'])}, set {result['set']}"
        if result["rows"]:
            parts.append(f"![{title}: speed-up]({Path(name).with_suffix('.svg')})")
        if not is_sweep(result):
            parts.append(headline(result) if target == README else table(result))
        if found := result.get("latency"):
            picture = charts.beside(Path(name), charts.LATENCY)
            parts += [f"![{title}: single calls]({picture})", latency_table(found)]
        if target == README:  # without these columns
            shown = ("workload", "providers")
            result["rows"] = [{key: row[key] for key in shown} for row in measured(result)]
        parts.append(f"{caption(result)} From [{path.name}]({name}).")
    return "\n\n".join(parts)


def pages_of(result: dict) -> tuple[Path, ...]:
    """The pages that show a result of its set."""
    found = {
        "clients": (WORKS_WITH,),
        "sequences": (SEQUENCES,),
        "cells": (CELLS,),
        "accuracy": (QUANTIZATION,),
        "int8": (QUANTIZATION,),
        "streaming": (STREAMING,),
    }
    return found.get(result["set"], (README, DOCS))


def paths_in(text: str, target: Path) -> list[Path]:
    """The results files that a block of the target was made from."""
    names = re.findall(r"From \[.+?\]\((.+?)\)", text)
    return [(target.parent / name).resolve() for name in names]


def update(target: Path, paths: list[Path]) -> None:
    """Puts the block between the target's two markers."""
    before, begin, rest = target.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{target}: the markers {BEGIN} and {END} are not there, in this order")
    target.write_text(f"{before}{BEGIN}\n{block(paths, target)}\n{END}{after}")
