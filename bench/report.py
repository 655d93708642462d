"""From results files to what people read: tables, one chart a file, a page, README, comparisons."""

import contextlib
import hashlib
import html
import io
import json
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

from bench import environment
from bench.cases import HEADLINE, OURS, TORCH, Workload, regime
from bench.environment import ROOT
from bench.providers import AGAIN, OURS_GRAPH

DURATION = {"s": 1.0, "ms": 1e-3, "µs": 1e-6}
BYTES = {"GB": 1e9, "MB": 1e6, "kB": 1e3}
QUIET_CPUS = 0.1  # what other programs may use before a caption mentions it
README, DOCS = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
WORKS_WITH, SEQUENCES = ROOT / "docs" / "works_with.md", ROOT / "docs" / "sequences.md"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
COLORS = ("#1f6f8b", "#d1603d", "#6b8f3c", "#7b5ea7", "#8a8a8a", "#b08900")
SWEEP_LINE = re.compile(r"over ([TNH]), ")  # groups that are drawn as lines


class NoChart(Exception):
    """matplotlib is not there."""


def load(path: Path) -> dict:
    """A results file; ValueError names the one that cannot be read."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    if result.get("schema") != 2:
        raise ValueError(f"{path}: not a results file of this harness: measure again")
    return result


def quantity(value: float, units: dict[str, float] = DURATION) -> str:
    """Three digits and a unit: 17.6 µs, 12.3 MB. units: their sizes, the largest first."""
    unit = next((unit for unit, size in units.items() if value >= size), list(units)[-1])
    return f"{value / units[unit]:.3g} {unit}"


def median_of(row: dict, provider: str) -> float | None:
    return row["providers"].get(provider, {}).get("timing", {}).get("median")


def spread_of(timing: dict) -> float:
    """Half the span from p10 to p90, as a part of the median."""
    return (timing["p90"] - timing["p10"]) / 2 / timing["median"]


def peers(result: dict) -> list[str]:
    return [name for name in result["providers"] if not name.startswith(OURS)]


def speedup(row: dict, peer: str, provider: str | None = None) -> float | None:
    """The peer's median over the provider's, None where either has no time.

    Ours is the default, where a peer is replayed from a CUDA graph ours with a graph.
    """
    own = median_of(row, provider or (OURS_GRAPH if peer.endswith(" graph") else OURS))
    theirs = median_of(row, peer)
    return theirs / own if theirs and own else None


def share(row: dict, provider: str = OURS) -> float | None:
    """The row's limit over the provider's median: 1.0 is a run at the machine's limit."""
    median, limit = median_of(row, provider), row.get("limit")
    return limit / median if median and limit else None


def step_us(row: dict) -> list[float]:
    """Our microseconds a time step, without and with a graph, where there is a time."""
    medians = (median_of(row, provider) for provider in (OURS, OURS_GRAPH))
    return [median * 1e6 / row["workload"]["T"] for median in medians if median]


def goals_text(result: dict) -> str:
    """Which goals of its set a result reached; a goal over a peer without a time is left out."""
    reached, missed = 0, []
    for row in measured(result):
        name = row["workload"]["name"]
        found = [(speedup(row, p), g, f"x over {p}") for p, g in row["workload"]["goals"].items()]
        if most := row["workload"].get("step_us"):
            found.append((-min(step_us(row), default=math.inf), -most, " µs a time step"))
        for value, goal, unit in found:
            if value is not None and value >= goal:
                reached += 1
            elif value is not None or not median_of(row, OURS):
                missed.append(f"- {name}: {abs(value or 0):.3g} of {abs(goal):g}{unit}")
    lines = [f"Goals reached: {reached} of {reached + len(missed)}.", *missed]
    return "\n".join(lines)


def is_ours_wrong(row: dict) -> bool:
    """Whether we were wrong or failed; a peer that does so is shown, and is no error of ours."""
    entries = row["providers"].items()
    return any(e.keys() & {"wrong", "failed"} for p, e in entries if p.startswith(OURS))


def time_cell(entry: dict) -> str:
    """Median and half the span from p10 to p90, or what is wrong."""
    if "wrong" in entry:
        wrong = entry["wrong"]
        return f"wrong: {wrong['tensor']} off by {wrong['error']:.1e} > {wrong['allowed']:.1e}"
    if "failed" in entry:
        return f"failed: {entry['failed']}"
    if "timing" not in entry:
        return ""
    timing = entry["timing"]
    mark = " ~" if timing["noisy"] else ""
    return f"{quantity(timing['median'])} ±{spread_of(timing):.0%}{mark}"


def ratio_cell(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def memory_cell(row: dict) -> str:
    """Peak bytes of a training step, torch.nn's and ours."""
    found = row.get("memory", {})
    sizes = [quantity(found[name], BYTES) for name in (TORCH, OURS) if name in found]
    return " / ".join(sizes)


def share_cell(row: dict) -> str:
    """Our share of the limit, without and with a graph."""
    shares = (share(row, provider) for provider in (OURS, OURS_GRAPH))
    return " / ".join(f"{part:.0%}" for part in shares if part is not None)


def judged_cell(row: dict) -> str:
    """How many outputs and gradients ours were compared with float64, where a model was judged."""
    entry = row["providers"][OURS]
    if "unjudged" in entry:
        return "not judged"
    count = (entry.get("parity") or {}).get("tensors")
    return f"{count} tensor{'s' * (count > 1)}" if count else ""


def columns(result: dict) -> dict:
    """From heading to cell function of each column after the case's name."""
    made = {p: lambda row, p=p: time_cell(row["providers"].get(p, {})) for p in result["providers"]}
    if OURS in result["providers"]:
        for peer in peers(result):
            made[f"over {peer}"] = lambda row, p=peer: ratio_cell(speedup(row, p))
    if result.get("set") in ("clients", "model"):
        made["equal"] = judged_cell
    if any(row["workload"].get("step_us") for row in result["rows"]):
        made["µs a time step"] = lambda row: " / ".join(f"{us:.3g}" for us in step_us(row))
    if any(row.get("limit") for row in result["rows"]):
        made["of limit"] = share_cell
    if any(row.get("memory") for row in result["rows"]):
        made["memory"] = memory_cell
    return made


def measured(result: dict) -> list[dict]:
    return [row for row in result["rows"] if "absent" not in row]


def by_regime(result: dict) -> dict[str, list[dict]]:
    """The rows that were measured, under the heading each belongs to, in order."""
    groups = {}
    for row in measured(result):
        groups.setdefault(regime(Workload(**row["workload"])), []).append(row)
    return groups


def cells(result: dict) -> tuple[list[str], dict[str, list[list[str]]]]:
    """The table's heading, and per regime the lines below it, as text."""
    made = columns(result)
    groups = {
        name: [[row["workload"]["name"], *(cell(row) for cell in made.values())] for row in rows]
        for name, rows in by_regime(result).items()
    }
    return ["case", *made], groups


def table_text(lines: list[list[str]]) -> str:
    """Markdown that is aligned as plain text too; the first line is the heading."""
    widths = [max(4, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def text(line):
        first, *rest = zip(line, widths, strict=True)
        return " | ".join([first[0].ljust(first[1]), *(cell.rjust(w) for cell, w in rest)])

    return "\n".join(f"| {text(line)} |" for line in (lines[0], rule, *lines[1:]))


def table(result: dict) -> str:
    """The rows as a markdown table, a line in bold above each regime."""
    heading, groups = cells(result)
    lines = [heading]
    for name, rows in groups.items():
        lines += [[f"**{name}**", *[""] * (len(heading) - 1)], *rows]
    return table_text(lines)


def caption(result: dict) -> str:
    m, rows, busy = result["machine"], result["rows"], result.get("busy")
    isa = "" if m["gpu"] else f", ISA {m['forced_isa'] or m['isa']}"
    noisy = [e for r in rows for e in r["providers"].values() if e.get("timing", {}).get("noisy")]
    absent = ", ".join(sorted({row["absent"] for row in rows if "absent" in row}))
    malloc = ", whose malloc was told to keep what is freed" * result.get("keep_memory", False)

    def some(key):
        return any(row.get(key) for row in rows)

    is_model = result.get("set") in ("clients", "model")
    sentences = [
        (f"{environment.title(m)}{isa}, torch {m['torch']}, {m['revision']}, {m['date']}", True),
        ("Medians of interleaved samples, ± half the span from p10 to p90", True),
        ("~ marks a span too wide to rely on", noisy),
        ("Of limit: the machine's measured limit for the row over our time", some("limit")),
        (f"Equal: outputs and gradients off by at most twice {TORCH}'s error", is_model),
        (f"Memory: peak of a training step, {TORCH}'s and ours", some("memory")),
        ("Replayed CUDA graphs are compared with each other", OURS_GRAPH in result["providers"]),
        (f"Left out: {absent}", absent),
        (f"Each row in a process of its own{malloc}", "keep_memory" in result and not m["gpu"]),
        (f"Measured beside {busy} busy process(es)", busy),
        (f"Other programs used {result['others']:.1f} CPUs meanwhile", not busy),
        ("Interrupted: later rows are missing", result["interrupted"]),
    ]
    if result["others"] <= QUIET_CPUS:
        del sentences[-2]
    return " ".join(f"{sentence}." for sentence, applies in sentences if applies)


def markdown(result: dict) -> str:
    return f"{table(result)}\n\n{caption(result)}"


def pyplot():
    try:
        import matplotlib
        from matplotlib import pyplot
    except ImportError:
        raise NoChart("matplotlib is not installed: no chart") from None
    matplotlib.use("Agg")
    style = {"svg.fonttype": "none", "svg.hashsalt": "lstm_fused", "font.size": 9}
    matplotlib.rcParams.update(style)
    return pyplot


def digest(result: dict) -> str:
    """What a chart's file carries, so that a test can tell whether it shows this result."""
    shown = [
        (row["workload"]["name"], share(row), *(speedup(row, peer) for peer in peers(result)))
        for row in measured(result)
    ]
    return hashlib.sha256(repr(shown).encode()).hexdigest()[:16]


def is_sweep(result: dict) -> bool:
    return any(SWEEP_LINE.match(group) for group in by_regime(result))


def logarithmic(axes, name: str) -> None:
    """That axis of the axes, "x" or "y", in powers, written as 1x, 2x, 5x; a line at 1x."""
    getattr(axes, f"set_{name}scale")("log")
    axis = getattr(axes, f"{name}axis")
    axis.get_major_locator().set_params(subs=(1, 2, 5))
    axis.set_major_formatter(lambda value, _: f"{value:g}x")
    axis.set_minor_formatter(lambda value, _: "")
    (axes.axvline if name == "x" else axes.axhline)(1.0, color="black", linewidth=1)
    axes.grid(True, alpha=0.25)


def dots(axes, groups: dict, series: dict) -> None:
    """A row of dots per regime; series: from label to a function of a row, its value or None."""
    for k, (label, value) in enumerate(series.items()):
        offset = (k - (len(series) - 1) / 2) * 0.22
        points = [
            (value(row), index + offset)
            for index, rows in enumerate(groups.values())
            for row in rows
            if value(row) is not None
        ]
        axes.plot(*zip(*points, strict=True), "o", color=COLORS[k], alpha=0.75, label=label)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)


def draw_regimes(result: dict, plot):
    """Speed-up over each peer on the left, share of the limit on the right, by regime."""
    groups, rows = by_regime(result), measured(result)
    over = {f"over {p}": lambda row, p=p: speedup(row, p) for p in peers(result)}
    limits = {f"{p}'s share": lambda row, p=p: share(row, p) for p in (TORCH, OURS)}
    panels = [{k: f for k, f in s.items() if any(map(f, rows))} for s in (over, limits)]
    panels = [series for series in panels if series]
    size = (3.5 + 3 * len(panels), 1.5 + 0.45 * len(groups))
    figure, axes = plot.subplots(
        1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for panel, series in zip(axes[0], panels, strict=True):
        dots(panel, groups, series)
    logarithmic(axes[0][0], "x")
    axes[0][0].set_title(f"times as fast: {OURS}", fontsize=9)
    if len(panels) > 1:
        axes[0][1].set_xlim(0, 1.05)
        axes[0][1].xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes[0][1].grid(True, alpha=0.25)
        axes[0][1].set_title("share of the machine's limit", fontsize=9)
    return figure


def draw_sweep(result: dict, plot):
    """Speed-up over torch.nn along each line of a sweep, a panel a line."""
    lines = {name: rows for name, rows in by_regime(result).items() if SWEEP_LINE.match(name)}
    size = (8, 2.1 * len(lines))
    figure, axes = plot.subplots(len(lines), figsize=size, squeeze=False, layout="constrained")
    for panel, (name, rows) in zip(axes[:, 0], lines.items(), strict=True):
        axis = SWEEP_LINE.match(name)[1]
        for k, mode in enumerate(("forward", "training")):
            points = [
                (row["workload"][axis], speedup(row, TORCH))
                for row in rows
                if row["workload"]["mode"] == mode and speedup(row, TORCH)
            ]
            panel.plot(*zip(*points, strict=True), "o-", color=COLORS[k], label=mode, markersize=3)
        panel.set_xscale("linear" if axis == "N" else "log")
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        logarithmic(panel, "y")
        panel.set_title(f"times as fast as {TORCH} {name}", fontsize=9)
    axes[0][0].legend()
    return figure


def chart(result: dict) -> str:
    """The SVG picture of a result, the same text each time; NoChart where matplotlib is missing."""
    plot, text = pyplot(), io.StringIO()
    figure = draw_sweep(result, plot) if is_sweep(result) else draw_regimes(result, plot)
    metadata = {"Date": None, "Description": digest(result)}
    figure.savefig(text, format="svg", metadata=metadata)
    plot.close(figure)
    return text.getvalue()


def save(result: dict, path: Path) -> None:
    """The results file, whole or not at all, since the process may be ended meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(path)


def page(results: list[dict]) -> str:
    """One HTML page with nothing to load from elsewhere."""
    parts = ['<!doctype html><meta charset="utf-8"><title>lstm_fused, measured</title>']
    for result in results:
        with contextlib.suppress(NoChart):
            parts.append(chart(result).partition("?>")[2])
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
        parts.append(f"![{title}: speed-up]({Path(name).with_suffix('.svg')})")
        if not is_sweep(result):
            parts.append(headline(result) if target == README else table(result))
        if target == README:  # without these columns
            shown = ("workload", "providers")
            result["rows"] = [{key: row[key] for key in shown} for row in measured(result)]
        parts.append(f"{caption(result)} From [{path.name}]({name}).")
    return "\n\n".join(parts)


def pages_of(result: dict) -> tuple[Path, ...]:
    """The pages that show a result of its set."""
    return {"clients": (WORKS_WITH,), "sequences": (SEQUENCES,)}.get(result["set"], (README, DOCS))


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


def scaling(results: list[dict]) -> str:
    """How many times as fast each provider is as on the first result's threads."""
    first, *others = results
    names = [OURS, *peers(first)]
    counts = [result["machine"]["threads"] for result in others]
    head = ["case", *(f"{name} {count}t" for name in names for count in counts)]
    lines = [head]
    for row in measured(first):
        line = [row["workload"]["name"]]
        for name in names:
            for other in others:
                same = next((r for r in measured(other) if r["workload"] == row["workload"]), {})
                before = median_of(row, name)
                after = median_of(same, name) if same else None
                line.append(ratio_cell(before / after if before and after else None))
        lines.append(line)
    count = first["machine"]["threads"]
    words = f"Speed-up over {count} {'thread' if count == 1 else 'threads'} of the same provider."
    return f"{table_text(lines)}\n\n{words}"


class Change(NamedTuple):
    """One row in two results: our speed-up over torch.nn before and after, None without a time.

    Speed-ups are compared, not times: what slows a whole run down slows torch.nn down too.
    factor: after / before; spread: of it, the four spreads it is made of, in quadrature.
    """

    name: str
    before: float | None
    after: float | None
    verdict: str
    factor: float | None = None
    spread: float = 0.0

    @property
    def regressed(self) -> bool:
        return self.verdict in ("slower", "no time any more")


def change(a: dict, b: dict) -> Change:
    """What changed from the row a to the row b of the same name; ValueError if they differ."""
    said = ("goals", "step_us", "group", "source")
    name, rows = b["workload"]["name"], (a, b)
    if any(a["workload"][k] != v for k, v in b["workload"].items() if k not in said):
        raise ValueError(f"{name!r} is not the same workload in both")
    before, after = (speedup(row, TORCH) for row in rows)
    if not (before and after):
        return Change(name, before, after, "no time any more" if before else "new" if after else "")
    timings = [row["providers"][p]["timing"] for row in rows for p in (TORCH, OURS)]
    factor, spread = after / before, math.hypot(*map(spread_of, timings))
    verdict = "slower" if factor < 1 - spread else "faster" if factor > 1 + spread else "same"
    return Change(name, before, after, verdict, factor, spread)


def changes(a: dict, b: dict) -> list[Change]:
    """Every row that both results have, in b's order; ValueError if there is none."""
    old = {row["workload"]["name"]: row for row in measured(a)}
    new = {row["workload"]["name"]: row for row in measured(b)}
    if not old.keys() & new.keys():
        raise ValueError("the two results have no row in common")
    return [change(old[name], new[name]) for name in new if name in old]


def comparison(found: list[Change], a: dict, b: dict) -> str:
    """Markdown of changes(a, b), and what a reader should know before trusting them."""
    lines = [["case", "before", "after", "change", "spread", ""]]
    for c in found:
        percent = ["", ""] if c.factor is None else [f"{c.factor - 1:+.0%}", f"±{c.spread:.0%}"]
        lines.append([c.name, ratio_cell(c.before), ratio_cell(c.after), *percent, c.verdict])
    titles = [environment.title(result["machine"]) for result in (a, b)]
    names = [{row["workload"]["name"] for row in result["rows"]} for result in (a, b)]
    slower = [c.name for c in found if c.regressed]
    notes = {
        f"Different machines: {'; '.join(titles)}.": titles[0] != titles[1],
        f"Only in the first: {', '.join(sorted(names[0] - names[1]))}.": names[0] - names[1],
        f"Only in the second: {', '.join(sorted(names[1] - names[0]))}.": names[1] - names[0],
        f"Slower beyond the spread: {', '.join(slower) or 'no row'}.": True,
    }
    return "\n".join([table_text(lines), *(note for note, applies in notes.items() if applies)])


def self_finding(row: dict) -> tuple[float, float]:
    """How many times as fast torch.nn is as itself, and what its own spread explains."""
    spreads = (spread_of(row["providers"][name]["timing"]) for name in (TORCH, AGAIN))
    return speedup(row, TORCH, AGAIN), math.hypot(*spreads)


def is_even(row: dict) -> bool:
    """Whether 1.0x lies within the spread."""
    ratio, spread = self_finding(row)
    return 1 / (1 + spread) <= ratio <= 1 + spread


def self_table(result: dict) -> str:
    """torch.nn against itself: what the harness makes of two that are equally fast."""
    lines = [["case", "times as fast as itself", "spread", ""]]
    for row in measured(result):
        ratio, spread = self_finding(row)
        verdict = "even" if is_even(row) else "UNEVEN"
        if any(entry["timing"]["noisy"] for entry in row["providers"].values()):
            verdict += ", too noisy to say much"
        lines.append([row["workload"]["name"], f"{ratio:.3f}x", f"±{spread:.1%}", verdict])
    return table_text(lines)
