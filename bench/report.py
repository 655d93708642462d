"""From results files to the tables people read."""

import json
from pathlib import Path

from bench import machine
from bench.workloads import Workload, regime

BASELINE, OURS = "torch.nn", "lstm_fused"
GRAPH = " graph"  # ends the name of whoever is replayed from a CUDA graph
# What other programs may use during a measurement before the table mentions it.
QUIET_CPUS = 0.1


def load(path: Path) -> dict:
    result = json.loads(path.read_text())
    if result.get("schema") != 2:
        raise ValueError("not a results file of this harness: measure again")
    return result


def duration(seconds: float) -> str:
    """Three digits and a unit: 17.6 µs, 1.21 ms."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def amount(size: float) -> str:
    """Three digits and a unit of bytes: 12.3 MB."""
    for unit, each in (("GB", 1e9), ("MB", 1e6)):
        if size >= each:
            return f"{size / each:.3g} {unit}"
    return f"{size / 1e3:.3g} kB"


def workload_of(row: dict) -> Workload:
    return Workload(**row["workload"])


def timing_of(row: dict, provider: str) -> dict | None:
    return row["providers"].get(provider, {}).get("timing")


def median_of(row: dict, provider: str) -> float | None:
    timing = timing_of(row, provider)
    return timing and timing["median"]


def spread_of(row: dict, provider: str) -> float:
    """Half the span from p10 to p90, as a part of the median."""
    timing = timing_of(row, provider)
    return (timing["p90"] - timing["p10"]) / 2 / timing["median"]


def ours_beside(opponent: str) -> str:
    """Which of ours an opponent is compared with: graphs are compared with graphs."""
    return OURS + GRAPH if opponent.endswith(GRAPH) else OURS


def opponents(result: dict) -> list[str]:
    return [name for name in result["providers"] if not name.startswith(OURS)]


def speedup(row: dict, opponent: str, provider: str | None = None) -> float | None:
    """The opponent's median over the provider's, None where either has no time."""
    theirs, own = median_of(row, opponent), median_of(row, provider or ours_beside(opponent))
    return theirs / own if theirs and own else None


def share(row: dict, provider: str = OURS) -> float | None:
    """The row's limit over the provider's median: 1.0 is a run at the machine's limit."""
    median, limit = median_of(row, provider), row.get("limit")
    return limit / median if median and limit else None


def missed(row: dict, opponent: str) -> bool:
    """Whether the row has a goal beside this opponent and did not reach it."""
    goal, ratio = row["workload"]["goals"].get(opponent), speedup(row, opponent)
    if goal is None or (ratio is None and median_of(row, ours_beside(opponent))):
        return False  # the opponent was not measured
    return ratio is None or ratio < goal


def step_us(row: dict, provider: str = OURS) -> float | None:
    """Microseconds a time step."""
    median = median_of(row, provider)
    return median and median * 1e6 / row["workload"]["T"]


def best_step_us(row: dict) -> float | None:
    """The lesser of ours with and without a graph."""
    return min(filter(None, (step_us(row, p) for p in (OURS, OURS + GRAPH))), default=None)


def goals_of(row: dict) -> list[bool]:
    """Whether each goal of a row was reached."""
    found = [not missed(row, opponent) for opponent in row["workload"]["goals"]]
    if most := row["workload"].get("step_us"):
        best = best_step_us(row)
        found.append(best is not None and best <= most)
    return found


def is_ours_wrong(row: dict) -> bool:
    """Whether we were wrong or failed; a peer that does so is shown, and is no error of ours."""
    entries = row["providers"].items()
    return any(e.keys() & {"wrong", "failed"} for p, e in entries if p.startswith(OURS))


def time_cell(entry: dict | None) -> str:
    """Median and half the span from p10 to p90, or what is wrong."""
    if entry is None or "absent" in entry:
        return ""
    if "wrong" in entry:
        wrong = entry["wrong"]
        return f"wrong: {wrong['tensor']} off by {wrong['error']:.1e} > {wrong['allowed']:.1e}"
    if "failed" in entry:
        return f"failed: {entry['failed']}"
    if "timing" not in entry:
        return ""
    timing = entry["timing"]
    spread = (timing["p90"] - timing["p10"]) / 2 / timing["median"]
    mark = " ~" if timing["noisy"] else ""
    return f"{duration(timing['median'])} ±{spread:.0%}{mark}"


def ratio_cell(row: dict, opponent: str) -> str:
    """How much faster, and the goal where there is one."""
    ratio, goal = speedup(row, opponent), row["workload"]["goals"].get(opponent)
    text = "" if ratio is None else f"{ratio:.2f}x"
    if goal is None or (ratio is None and not missed(row, opponent)):
        return text
    verdict = ", missed" if missed(row, opponent) else ""
    return f"{text} (goal {goal:g}x{verdict})".strip()


def memory_cell(row: dict) -> str:
    """Peak bytes of a training step, the baseline's and ours."""
    found = row.get("memory", {})
    if BASELINE not in found or OURS not in found:
        return ""
    return f"{amount(found[BASELINE])} / {amount(found[OURS])}"


def step_cell(row: dict) -> str:
    """Our time of a time step without and with a graph, where a goal is set to it."""
    most, best = row["workload"].get("step_us"), best_step_us(row)
    if not most:
        return ""
    each = [step_us(row, p) for p in (OURS, OURS + GRAPH)]
    text = " / ".join(f"{us:.3g}" for us in each if us) or "none"
    verdict = "" if best and best <= most else ", missed"
    return f"{text} µs (goal {most:g} µs{verdict})"


def share_cell(row: dict) -> str:
    """Our share of the limit, without and with a graph."""
    shares = [share(row, provider) for provider in (OURS, OURS + GRAPH)]
    return " / ".join(f"{part:.0%}" for part in shares if part is not None)


def columns(result: dict) -> list[tuple[str, object]]:
    """Heading and cell function of each column after the case's name."""
    shown = result["providers"]
    made = [(name, lambda row, p=name: time_cell(row["providers"].get(p))) for name in shown]
    if OURS in shown:
        for name in opponents(result):
            made.append((f"over {name}", lambda row, p=name: ratio_cell(row, p)))
    if any(row["workload"].get("step_us") for row in result["rows"]):
        made.append(("a time step", step_cell))
    if any(row.get("limit") for row in result["rows"]):
        made.append(("of limit", share_cell))
    if any(row.get("memory") for row in result["rows"]):
        made.append(("memory", memory_cell))
    return made


def by_regime(result: dict) -> dict[str, list[dict]]:
    """The rows that were measured, under the heading each belongs to, in order."""
    groups = {}
    for row in result["rows"]:
        if "absent" not in row:
            groups.setdefault(regime(workload_of(row)), []).append(row)
    return groups


def cells(result: dict) -> tuple[list[str], list[tuple[str, list[list[str]]]]]:
    """The table's heading, and per regime the lines below it, as text."""
    made = columns(result)
    groups = [
        (name, [[row["workload"]["name"], *(cell(row) for _, cell in made)] for row in rows])
        for name, rows in by_regime(result).items()
    ]
    return ["case", *(name for name, _ in made)], groups


def caption(result: dict) -> str:
    m = result["machine"]
    isa = m["forced_isa"] or m["isa"]
    where = f"{machine.title(m)}, ISA {isa}" if not m["gpu"] else machine.title(m)
    sentences = [
        f"{where}, torch {m['torch']}, revision {m['revision']}, {m['date']}.",
        "Medians of interleaved samples, ± half the span from p10 to p90.",
    ]
    rows = result["rows"]
    entries = [entry for row in rows for entry in row["providers"].values()]
    if any(entry.get("timing", {}).get("noisy") for entry in entries):
        sentences.append("~ marks a span too wide to rely on.")
    if any(row.get("limit") for row in rows):
        sentences.append("Of limit: the machine's measured limit for the row over our time.")
    if any(row.get("memory") for row in rows):
        sentences.append(f"Memory: peak of a training step, {BASELINE}'s and ours.")
    if OURS + GRAPH in result["providers"]:
        sentences.append("Graphs, replayed CUDA graphs, are compared with graphs.")
    goals = [reached for row in rows if "absent" not in row for reached in goals_of(row)]
    if goals:
        sentences.append(f"Goals reached: {sum(goals)} of {len(goals)}.")
    absent = {row["absent"] for row in rows if "absent" in row}
    sentences += [f"Left out: {', '.join(sorted(absent))}."] if absent else []
    if "keep_memory" in result:
        malloc = ", whose malloc was told to keep what is freed" * result["keep_memory"]
        sentences.append(f"Each row in a process of its own{malloc}.")
    if result.get("busy"):
        sentences.append(f"Measured beside {result['busy']} busy process(es).")
    elif result["others"] > QUIET_CPUS:
        sentences.append(f"Other programs used {result['others']:.1f} CPUs meanwhile.")
    if result["interrupted"]:
        sentences.append("Interrupted: later rows are missing.")
    return " ".join(sentences)


def table(result: dict) -> str:
    """The rows as a markdown table, a line in bold above each regime."""
    heading, groups = cells(result)
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)]]
    for name, rows in groups:
        lines += [[f"**{name}**", *[""] * (len(heading) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown(result: dict) -> str:
    return f"{table(result)}\n\n{caption(result)}"
