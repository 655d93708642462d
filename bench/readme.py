"""What docs/benchmarks.md shows of committed results, between two markers."""

import os
import re
from pathlib import Path

from bench import chart, machine, report

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def block(paths: list[Path]) -> str:
    """Per results file its chart, its table, its caption and its name."""
    parts = []
    for path in paths:
        name = path.resolve()
        shown = Path(os.path.relpath(name, README.parent)) if name.is_relative_to(ROOT) else name
        result = report.load(path)
        title = machine.title(result["machine"])
        parts.append(f"![{title}: speed-up by regime]({shown.with_suffix('.svg')})")
        parts.append(f"{report.markdown(result)} From [{shown}]({shown}).")
    return "\n\n".join(parts)


def paths_in(block: str) -> list[Path]:
    """The results files that a block was made from."""
    return [(README.parent / name).resolve() for name in re.findall(r"From \[(.+?)\]", block)]


def between_markers(text: str, block: str) -> str:
    """text with what stands between the two markers replaced."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the markers {BEGIN} and {END} are not there, in this order")
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def update(paths: list[Path], readme: Path = README) -> None:
    """Draws the files' charts and puts the block into the README; NoCharts without matplotlib."""
    for path in paths:
        chart.save(report.load(path), path.with_suffix(""))
    readme.write_text(between_markers(readme.read_text(), block(paths)))
