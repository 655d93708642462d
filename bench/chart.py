"""Charts of a result: speed-up by regime and share of the limit; a sweep as lines over an axis."""

import hashlib
import re
from pathlib import Path

from bench import report
from bench.report import BASELINE, OURS

COLORS = ("#1f6f8b", "#d1603d", "#6b8f3c", "#7b5ea7", "#8a8a8a", "#b08900")
LINES = re.compile(r"over ([TNH]), ")  # groups that are drawn as lines, see bench/sets.py


class NoCharts(Exception):
    """matplotlib is not there; the message says so."""


def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise NoCharts("matplotlib is not installed: no charts") from None
    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {"svg.fonttype": "none", "svg.hashsalt": "lstm_fused", "font.size": 9}
    )
    from matplotlib import pyplot

    return pyplot


def drawn(result: dict) -> dict:
    """What a chart shows, as numbers: per row its speed-ups and its share of the limit."""
    return {
        row["workload"]["name"]: {
            "over": {
                p: r for p in result["providers"] if (r := report.speedup(row, p)) is not None
            },
            "share": report.share(row),
        }
        for rows in report.by_regime(result).values()
        for row in rows
    }


def digest(result: dict) -> str:
    """What a chart's file carries, so that a test can tell whether it shows this result."""
    return hashlib.sha256(repr(drawn(result)).encode()).hexdigest()[:16]


def is_sweep(result: dict) -> bool:
    return any(LINES.match(group) for group in report.by_regime(result))


def color_of(result: dict, provider: str) -> str:
    return COLORS[result["providers"].index(provider) % len(COLORS)]


def dots(axes, groups: dict, series: list[tuple[str, str, object]]) -> None:
    """A row of dots per regime; series: a label, a colour and row -> value or None."""
    for k, (label, color, value) in enumerate(series):
        points = [
            (v, index + (k - (len(series) - 1) / 2) * 0.22)
            for index, rows in enumerate(groups.values())
            for row in rows
            if (v := value(row)) is not None
        ]
        xs, ys = zip(*points, strict=True) if points else ((), ())
        axes.plot(xs, ys, "o", color=color, alpha=0.75, markersize=5, label=label)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.grid(True, alpha=0.25)


def speedup_ticks(axis) -> None:
    """A logarithmic axis, written as 1x, 2x, 5x."""
    axis.set_major_locator(_ticker().LogLocator(base=10, subs=(1, 2, 5)))
    axis.set_major_formatter(_ticker().FuncFormatter(lambda v, _: f"{v:g}x"))
    axis.set_minor_formatter(_ticker().NullFormatter())


def _ticker():
    from matplotlib import ticker

    return ticker


def by_regime(result: dict, plot):
    """Speed-up over each opponent on the left, share of the limit on the right."""
    groups = report.by_regime(result)
    numbers = drawn(result).values()
    opponents = [p for p in report.opponents(result) if any(p in row["over"] for row in numbers)]
    limits = any(row["share"] is not None for row in numbers)
    width, panels = (9, 2) if limits else (6.5, 1)
    figure, all_axes = plot.subplots(
        1,
        panels,
        figsize=(width, 1.3 + 0.45 * len(groups)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    left = all_axes[0][0]
    over = [(p, color_of(result, p), lambda row, p=p: report.speedup(row, p)) for p in opponents]
    dots(left, groups, over)
    left.set_xscale("log")
    speedup_ticks(left.xaxis)
    low, high = left.get_xlim()
    left.set_xlim(min(low, 0.85), max(high, 1.2))
    left.axvline(1.0, color="black", linewidth=1)
    left.set_xlabel("times as fast as")
    series = dict(zip(*left.get_legend_handles_labels()[::-1], strict=True))
    if limits:
        right = all_axes[0][1]
        shares = [
            (p, color_of(result, p), lambda row, p=p: report.share(row, p))
            for p in (BASELINE, OURS)
        ]
        dots(right, groups, shares)
        right.set_xlim(0, 1.05)
        right.xaxis.set_major_formatter(_ticker().PercentFormatter(1.0))
        right.set_xlabel("share of the machine's limit")
        series |= dict(zip(*right.get_legend_handles_labels()[::-1], strict=True))
    if series:
        names = dict(loc="outside upper center", ncols=6, frameon=False)
        figure.legend(series.values(), series.keys(), **names)
    return figure


def as_lines(result: dict, plot):
    """Speed-up over torch.nn along each line of a sweep, a panel a line."""
    groups = report.by_regime(result)
    lines = {name: rows for name, rows in groups.items() if LINES.match(name)}
    figure, all_axes = plot.subplots(
        len(lines), 1, figsize=(8, 2.1 * len(lines)), squeeze=False, layout="constrained"
    )
    for axes, (name, rows) in zip(all_axes[:, 0], lines.items(), strict=True):
        axis = LINES.match(name)[1]
        for k, mode in enumerate(("forward", "training")):
            points = [
                (row["workload"][axis], ratio)
                for row in rows
                if row["workload"]["mode"] == mode and (ratio := report.speedup(row, BASELINE))
            ]
            axes.plot(*zip(*points, strict=True), "o-", color=COLORS[k], label=mode, markersize=3.5)
        axes.set_xscale("log" if axis != "N" else "linear")
        axes.set_yscale("log")
        speedup_ticks(axes.yaxis)
        axes.axhline(1.0, color="black", linewidth=1)
        axes.set_title(f"times as fast as {BASELINE} {name}", fontsize=9)
        axes.xaxis.set_major_formatter(_ticker().FuncFormatter(lambda v, _: f"{v:g}"))
        axes.grid(True, which="both", alpha=0.25)
    all_axes[0][0].legend()
    return figure


def save(result: dict, stem: Path) -> list[Path]:
    """stem.svg and stem.png; NoCharts where matplotlib is missing."""
    plot = pyplot()
    figure = as_lines(result, plot) if is_sweep(result) else by_regime(result, plot)
    paths = [stem.with_suffix(".svg"), stem.with_suffix(".png")]
    metadata = {"Date": None, "Description": digest(result)}
    figure.savefig(paths[0], metadata=metadata)
    figure.savefig(paths[1], dpi=120)
    plot.close(figure)
    return paths
