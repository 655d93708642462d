"""From a results file to the table people read, and into the README."""

import json
from pathlib import Path

from bench.providers import BASELINE

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
# What other programs may use during a measurement before the table mentions it.
QUIET_CPUS = 0.1
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def duration(seconds: float) -> str:
    """Three digits and a unit: 17.6 µs, 1.21 ms."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def time_cell(entry: dict | None) -> str:
    """Median and half the span from p10 to p90, or what is wrong."""
    if entry is None:
        return ""
    if "wrong" in entry:
        wrong = entry["wrong"]
        return f"wrong: {wrong['tensor']} off by {wrong['error']:.1e} > {wrong['allowed']:.1e}"
    timing = entry["timing"]
    spread = (timing["p90"] - timing["p10"]) / 2 / timing["median"]
    mark = " ~" if timing["noisy"] else ""
    return f"{duration(timing['median'])} ±{spread:.0%}{mark}"


def median_of(row: dict, provider: str) -> float | None:
    return row["providers"].get(provider, {}).get("timing", {}).get("median")


def speedup(row: dict, provider: str) -> float | None:
    """The baseline's median over the provider's, None where either has no time."""
    baseline, own = median_of(row, BASELINE), median_of(row, provider)
    return baseline / own if baseline and own else None


def ratio_cells(row: dict, provider: str) -> list[str]:
    """How much faster, the goal, and whether it was met."""
    ratio, goal = speedup(row, provider), row["workload"]["goal"]
    cells = ["" if ratio is None else f"{ratio:.2f}x", "" if goal is None else f"{goal:g}x"]
    verdict = "" if goal is None else "met" if ratio is not None and ratio >= goal else "missed"
    return [*cells, verdict]


def cells(result: dict) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of the table, as text."""
    providers = result["providers"]
    others = [p for p in providers if p != BASELINE]
    heading = ["case", *providers]
    for provider in others:
        suffix = "" if len(others) == 1 else f" {provider}"
        heading += [f"speedup{suffix}", "goal", f"result{suffix}"]
    rows = []
    for row in result["rows"]:
        line = [row["workload"]["name"], *(time_cell(row["providers"].get(p)) for p in providers)]
        for provider in others:
            line += ratio_cells(row, provider)
        rows.append(line)
    return heading, rows


def caption(result: dict) -> str:
    m = result["machine"]
    sentences = [
        f"{m['cpu']}, {m['threads']} threads, ISA {m['isa']}, torch {m['torch']}, "
        f"revision {m['revision']}, {m['date']}.",
        "Medians of interleaved samples, ± half the span from p10 to p90.",
    ]
    if any("~" in cell for row in cells(result)[1] for cell in row):
        sentences.append("~ marks a span too wide to rely on.")
    if result["others"] > QUIET_CPUS:
        sentences.append(f"Other programs used {result['others']:.1f} CPUs meanwhile.")
    if result["interrupted"]:
        sentences.append("Interrupted: later rows are missing.")
    return " ".join(sentences)


def markdown(result: dict) -> str:
    heading, rows = cells(result)
    rule = ["---", *["---:"] * (len(heading) - 1)]
    lines = ["| " + " | ".join(line) + " |" for line in (heading, rule, *rows)]
    return "\n".join([*lines, "", caption(result)])


def load(path: Path) -> dict:
    return json.loads(path.read_text())


def between_markers(text: str, table: str) -> str:
    """text with what stands between the two markers replaced."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the markers {BEGIN} and {END} are not there, in this order")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def update_readme(path: Path, readme: Path = README) -> None:
    """Puts the table of a results file into the README, with the file's name."""
    name = path.resolve()
    shown = name.relative_to(ROOT) if name.is_relative_to(ROOT) else name
    table = markdown(load(path)) + f" From [{shown}]({shown})."
    readme.write_text(between_markers(readme.read_text(), table))
