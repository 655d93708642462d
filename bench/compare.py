"""What changed between two results, and whether a row became slower than their spreads explain.

Speed-ups are compared, not times: what slowed a whole run down, slowed the baseline down too.
"""

import math
from dataclasses import dataclass

from bench import machine, report
from bench.report import BASELINE, OURS


@dataclass(frozen=True)
class Change:
    """One row in both results: how many times faster than before, and what noise may explain.

    before, after: speed-ups over the baseline, None where we have no time.
    factor: after / before. spread: of the factor, the four spreads it is made of, in quadrature.
    """

    name: str
    before: float | None
    after: float | None
    factor: float | None
    spread: float

    @property
    def verdict(self) -> str:
        if self.before is None and self.after is None:
            return ""
        if self.before is None:
            return "new"
        if self.after is None:
            return "no time any more"
        if self.factor < 1 - self.spread:
            return "slower"
        return "faster" if self.factor > 1 + self.spread else "same"

    @property
    def regressed(self) -> bool:
        return self.verdict in ("slower", "no time any more")


def change(name: str, a: dict, b: dict, opponent: str = BASELINE, provider: str = OURS) -> Change:
    """a, b: the rows of that name in both results."""
    before, after = (report.speedup(row, opponent, provider) for row in (a, b))
    if before is None or after is None:
        return Change(name, before, after, None, 0.0)
    spreads = [report.spread_of(row, who) for row in (a, b) for who in (opponent, provider)]
    return Change(name, before, after, after / before, math.hypot(*spreads))


def changes(a: dict, b: dict) -> list[Change]:
    """Every row that both results have, in b's order; ValueError if there is none."""
    old = {row["workload"]["name"]: row for row in a["rows"] if "absent" not in row}
    new = {row["workload"]["name"]: row for row in b["rows"] if "absent" not in row}
    common = [name for name in new if name in old]
    if not common:
        raise ValueError("the two results have no row in common")
    differing = [n for n in common if shape(old[n]) != shape(new[n])]
    if differing:
        raise ValueError(f"{differing[0]!r} is not the same workload in both")
    return [change(name, old[name], new[name]) for name in common]


def shape(row: dict) -> dict:
    """A workload without what is only said about it."""
    said = ("goals", "step_us", "group", "source")
    return {k: v for k, v in row["workload"].items() if k not in said}


def notes(a: dict, b: dict) -> list[str]:
    """What a reader should know before trusting the comparison."""
    found = []
    titles = [machine.title(r["machine"]) for r in (a, b)]
    if titles[0] != titles[1]:
        found.append(f"Different machines: {titles[0]}; {titles[1]}.")
    names = [{row["workload"]["name"] for row in r["rows"]} for r in (a, b)]
    found += [
        f"Only in the first: {', '.join(sorted(gone))}." for gone in [names[0] - names[1]] if gone
    ]
    found += [
        f"Only in the second: {', '.join(sorted(new))}." for new in [names[1] - names[0]] if new
    ]
    return found


def table(found: list[Change]) -> str:
    """Markdown: speed-ups over the baseline before and after."""

    def times(value):
        return "" if value is None else f"{value:.2f}x"

    lines = [["case", "before", "after", "change", "spread", ""], ["---", *["---:"] * 5]]
    for c in found:
        percent = "" if c.factor is None else f"{c.factor - 1:+.0%}"
        spread = "" if c.factor is None else f"±{c.spread:.0%}"
        lines.append([c.name, times(c.before), times(c.after), percent, spread, c.verdict])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
