"""From results files to what people read: tables, goals, comparisons."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from bench import accuracy, environment
from bench.accuracy import power_of_ten
from bench.cases import (
    COUNTERPARTS,
    OURS,
    OURS_GRAPH,
    SET_NAMES,
    SET_RATIOS,
    TORCH,
    Workload,
    regime,
)
from bench.latency import ARITHMETIC, SHARES
from bench.providers import AGAIN

DURATION = {"s": 1.0, "ms": 1e-3, "µs": 1e-6}
BYTES = {"GB": 1e9, "MB": 1e6, "kB": 1e3}
ACCURACY = (
    "Error: of the layer's y beside float32, its norm over that of y; rms and largest: of single"
    " values of y; metric: on held-out data, in bold in float32"
)
TAIL = 1.5  # a single call's p99.99 over its median, on an idle core, at most
QUIET_CPUS = 0.1  # what other programs may use before a caption mentions it


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


def counterpart(row: dict, peer: str) -> str:
    """Which of ours a peer is compared with: of those of its own kind the first that has a time."""
    own = COUNTERPARTS.get(peer, (OURS,))
    return next((name for name in own if median_of(row, name)), own[0])


def speedup(row: dict, peer: str, provider: str | None = None) -> float | None:
    """The peer's median over the provider's, by default its counterpart's; None where either has no
    time."""
    own, theirs = median_of(row, provider or counterpart(row, peer)), median_of(row, peer)
    return theirs / own if theirs and own else None


def ratios(result: dict) -> dict[str, Callable[[dict], float | None]]:
    """From heading to function of a row of each speed-up that the result's table has."""
    if OURS not in result["providers"]:
        return {}
    found = {f"over {peer}": lambda row, p=peer: speedup(row, p) for peer in peers(result)}
    names = SET_NAMES.get(result.get("set"), {})
    if pairs := SET_RATIOS.get(result.get("set")):
        found = {
            f"{own.removeprefix(f'{OURS} ')} over {names.get(p, p)}": lambda row, o=own, p=p: (
                speedup(row, p, o)
            )
            for own, p in pairs
            if {own, p} <= set(result["providers"])
        }
    return found


def share(row: dict, provider: str = OURS) -> float | None:
    """The row's limit over the provider's median: 1.0 is a run at the machine's limit."""
    median, limit = median_of(row, provider), row.get("limit")
    return limit / median if median and limit else None


def step_us(row: dict, names=(OURS, OURS_GRAPH)) -> list[float]:
    """Microseconds a time step of each provider that has a time."""
    medians = (median_of(row, provider) for provider in names)
    return [median * 1e6 / row["workload"]["T"] for median in medians if median]


def step_goals(row: dict, isa: str) -> Iterator[tuple[str, float | None, float]]:
    """(provider, microseconds a time step, at most so many) of each goal for this instruction set;
    one of ours counts with a graph or without."""
    for key, most in (row["workload"].get("step_us") or {}).items():
        name, _, wanted = key.partition(" on ")
        if isa.startswith(wanted):
            names = (name, OURS_GRAPH) if name == OURS else (name,)
            yield name, min(step_us(row, names), default=None), most


def goals_text(result: dict) -> str:
    """Which goals of its set a result reached; a goal of a pair of which either was not measured is
    left out, unless it is ours that has no time."""
    if result["set"] == "accuracy":
        return accuracy.goals_text(result)
    reached, missed, machine = 0, [], result["machine"]
    isa = machine["forced_isa"] or machine["isa"]
    for row in measured(result):
        name = row["workload"]["name"]
        found = []
        for peer, goal in row["workload"]["goals"].items():
            own = counterpart(row, peer)
            if own in result["providers"] and (median_of(row, peer) or not median_of(row, own)):
                of = f" of {own}" * (own != OURS)
                found.append((speedup(row, peer), goal, f"x{of} over {peer}"))
        for own, value, most in step_goals(row, isa):
            if own in result["providers"]:
                of = f" of {own}" * (own != OURS)
                found.append((value and -value, -most, f" µs a time step{of}"))
        for value, goal, unit in found:
            if value is not None and value >= goal:
                reached += 1
            else:
                missed.append(f"- {name}: {abs(value or 0):.3g} of {abs(goal):g}{unit}")
    for shape in result.get("latency", []):
        tails = {n: each["p99.99"] / each["p50"] for n, each in shape["providers"].items()}
        machine = f"{ARITHMETIC} {tails.pop(ARITHMETIC):.3g}"
        for name, tail in tails.items():
            reached += tail <= TAIL
            if tail > TAIL:
                what = f"p99.99 of {name} is {tail:.3g} of {TAIL} medians, of {machine}"
                missed.append(f"- {shape['name']}: {what}")
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


def rounded_providers(result: dict) -> list[str]:
    """Those whose weights are rounded, in an order."""
    entries = [row["providers"] for row in result["rows"]]
    return [n for n in result["providers"] if any("rounded" in e.get(n, {}) for e in entries)]


def error_cell(row: dict, names: list[str]) -> str:
    """The relative error of y of each of these providers, "-" where there is none."""
    entries = [row["providers"].get(name, {}).get("rounded") for name in names]
    return " / ".join(power_of_ten(entry["relative"]) if entry else "-" for entry in entries)


def judged_cell(row: dict) -> str:
    """How many outputs and gradients ours were compared with float64, where a model was judged."""
    entry = row["providers"][OURS]
    if "unjudged" in entry:
        return "not judged"
    count = (entry.get("parity") or {}).get("tensors")
    return f"{count} tensor{'s' * (count > 1)}" if count else ""


def columns(result: dict) -> dict:
    """From heading to cell function of each column after the case's name."""
    names = SET_NAMES.get(result.get("set"), {})
    made = {
        names.get(p, p): lambda row, p=p: time_cell(row["providers"].get(p, {}))
        for p in result["providers"]
    }
    for heading, ratio in ratios(result).items():
        made[heading] = lambda row, ratio=ratio: ratio_cell(ratio(row))
    if result.get("set") in ("clients", "model"):
        made["equal"] = judged_cell
    if rounded := rounded_providers(result):
        made["error"] = lambda row: error_cell(row, rounded)
    if any(OURS in (row["workload"].get("step_us") or {}) for row in result["rows"]):
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
    """The rows as a markdown table, a line in bold above each regime, or those of accuracy."""
    if result["set"] == "accuracy":
        return table_text(accuracy.rows_of(result))
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

    rounded = rounded_providers(result)

    def some(key):
        return any(row.get(key) for row in rows)

    is_model = result.get("set") in ("clients", "model")
    sentences = [
        (f"{environment.title(m)}{isa}, torch {m['torch']}, {m['revision']}, {m['date']}", True),
        (ACCURACY, result.get("models")),
        ("Medians of interleaved samples, ± half the span from p10 to p90", rows),
        ("~ marks a span too wide to rely on", noisy),
        ("Of limit: the machine's measured limit for the row over our time", some("limit")),
        (f"Equal: outputs and gradients off by at most twice {TORCH}'s error", is_model),
        (f"Memory: peak of a training step, {TORCH}'s and ours", some("memory")),
        *((sentence, True) for sentence in latency_sentences(result.get("latency", []))),
        (f"Error: of y, its norm over that of y, of {' / '.join(rounded)}", rounded),
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


def latency_table(found: list[dict]) -> str:
    """found: a result's "latency", what latency.measure() gave; "" of none."""
    lines = [["single calls", *SHARES, "p99.99 over p50"]]
    for shape in found:
        lines.append([f"**{shape['name']}**", *[""] * (len(SHARES) + 1)])
        for name, each in shape["providers"].items():
            cells = [quantity(each[key]) for key in SHARES]
            lines.append([name, *cells, ratio_cell(each["p99.99"] / each["p50"])])
    return table_text(lines) if found else ""


def latency_sentences(found: list[dict]) -> Iterator[str]:
    if found:
        priority = ", with real-time priority" * all(shape["real_time"] for shape in found)
        yield f"Single calls: {found[0]['calls']:,} of each on one processor{priority}"
        yield (
            f"{ARITHMETIC.capitalize()} takes as long as the first row and uses no memory:"
            " what delays it, the machine does"
        )


def markdown(result: dict) -> str:
    parts = (table(result), latency_table(result.get("latency", [])), caption(result))
    return "\n\n".join(filter(None, parts))


def save(result: dict, path: Path) -> None:
    """The results file, whole or not at all, since the process may be ended meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(path)


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
