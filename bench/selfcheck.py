"""torch.nn against itself: what the harness makes of two that are equally fast."""

import math

from bench import measure, report
from bench.providers import AGAIN, BASELINE
from bench.report import spread_of


def providers() -> dict:
    return measure.chosen((BASELINE, AGAIN))


def finding(row: dict) -> tuple[float, float]:
    """How many times as fast as itself, and what its own spread explains."""
    spread = math.hypot(spread_of(row, BASELINE), spread_of(row, AGAIN))
    return report.speedup(row, BASELINE, AGAIN), spread


def is_even(row: dict) -> bool:
    """Whether 1.0x lies within the spread."""
    ratio, spread = finding(row)
    return 1 / (1 + spread) <= ratio <= 1 + spread


def lines(result: dict) -> list[str]:
    """Markdown, a line a row."""
    found = ["| case | times as fast as itself | spread | |", "| --- | ---: | ---: | --- |"]
    for row in result["rows"]:
        if "absent" in row:
            continue
        ratio, spread = finding(row)
        verdict = "even" if is_even(row) else "UNEVEN"
        if any(entry["timing"]["noisy"] for entry in row["providers"].values()):
            verdict += ", too noisy to say much"
        found.append(f"| {row['workload']['name']} | {ratio:.3f}x | ±{spread:.1%} | {verdict} |")
    return found
