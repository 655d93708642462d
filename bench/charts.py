"""The pictures of a results file, as SVG."""

import hashlib
import io
import re
from pathlib import Path

from bench.cases import OURS, TORCH
from bench.latency import BINS
from bench.report import by_regime, measured, ratios, share, speedup

COLORS = ("#1f6f8b", "#d1603d", "#6b8f3c", "#7b5ea7", "#8a8a8a", "#b08900")
WIDE_LABEL = 25  # characters: three such do not fit beside each other
RATIOS, LATENCY = ".svg", "-latency.svg"
SWEEP_LINE = re.compile(r"over ([TNH]), ")  # groups that are drawn as lines


class NoChart(Exception):
    """matplotlib is not there."""


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
        (row["workload"]["name"], share(row), *(ratio(row) for ratio in ratios(result).values()))
        for row in measured(result)
    ]
    return hashlib.sha256(repr(shown).encode()).hexdigest()[:16]


def latency_digest(result: dict) -> str:
    return hashlib.sha256(repr(result["latency"]).encode()).hexdigest()[:16]


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
    step = min(0.22, 0.9 / len(series))
    for k, (label, value) in enumerate(series.items()):
        offset = (k - (len(series) - 1) / 2) * step
        points = [
            (value(row), index + offset)
            for index, rows in enumerate(groups.values())
            for row in rows
            if value(row) is not None
        ]
        axes.plot(*zip(*points, strict=True), "o", color=COLORS[k], alpha=0.75, label=label)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set_ylim(len(groups) - 0.5, -0.5)
    columns = 3 if max(map(len, series)) < WIDE_LABEL else 1
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=columns)


def draw_regimes(result: dict, plot):
    """Speed-up over each peer on the left, share of the limit on the right, by regime."""
    groups, rows = by_regime(result), measured(result)
    over = ratios(result)
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


def draw_latency(found: list[dict], plot):
    """The histogram of single calls, a panel a shape; found: a result's "latency"."""
    size = (8, 3.2 * len(found))
    figure, axes = plot.subplots(len(found), figsize=size, squeeze=False, layout="constrained")
    for panel, shape in zip(axes[:, 0], found, strict=True):
        for k, (name, each) in enumerate(shape["providers"].items()):
            first, counts = each["first_bin"], each["counts"]
            edges = [2 ** ((first + j) / BINS) * 1e-3 for j in range(len(counts) + 1)]
            panel.stairs(counts, edges, color=COLORS[k], label=name)
            for key in ("p50", "p99.99"):
                panel.axvline(each[key] * 1e6, color=COLORS[k], linestyle=":", linewidth=1)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.xaxis.get_major_locator().set_params(subs=(1, 2, 5))
        panel.xaxis.set_minor_formatter(lambda value, _: "")
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.set_xlabel("µs of a single call; dotted: median and p99.99")
        panel.set_ylabel(f"of {shape['calls']:,} calls")
        panel.set_title(shape["name"], fontsize=9)
        panel.grid(True, alpha=0.25)
    axes[0][0].legend()
    return figure


def svg(figure, plot, description: str) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Description": description})
    plot.close(figure)
    return text.getvalue()


def chart(result: dict) -> str:
    """The SVG picture of a result, the same text each time; NoChart where matplotlib is missing."""
    plot = pyplot()
    figure = draw_sweep(result, plot) if is_sweep(result) else draw_regimes(result, plot)
    return svg(figure, plot, digest(result))


def latency_chart(result: dict) -> str:
    """As chart(), of a result that has a "latency"."""
    plot = pyplot()
    return svg(draw_latency(result["latency"], plot), plot, latency_digest(result))


def pictures(result: dict) -> dict[str, str]:
    """All pictures of a result by what their files' names end in; NoChart as above."""
    found = {RATIOS: chart} if result["rows"] else {}
    found |= {LATENCY: latency_chart} if result.get("latency") else {}
    return {ending: picture(result) for ending, picture in found.items()}


def beside(path: Path, ending: str) -> Path:
    """The file of a picture of that results file."""
    return path.with_name(path.stem + ending)


def draw(result: dict, path: Path) -> None:
    """Writes the pictures of a results file beside it; NoChart as above."""
    for ending, picture in pictures(result).items():
        beside(path, ending).write_text(picture)
