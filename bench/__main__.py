"""`python -m bench` measures a set; `python -m bench report FILE` prints what was measured."""

import argparse
import json
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from bench import machine, parity, problem, report, timing
from bench.providers import BASELINE, PROVIDERS
from bench.workloads import SETS, Workload

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Effort:
    """Samples of each provider for one row, and how long a sample lasts at least."""

    rounds: int
    seconds: float


EFFORTS = {"quick": Effort(rounds=9, seconds=0.01), "cpu": Effort(rounds=31, seconds=0.05)}


def measure_row(work: Workload, effort: Effort, after_round) -> dict:
    """The gate, then the clock for whoever passed it."""
    task = problem.build(work)
    exact = problem.oracle(task)
    runs = {name: provider(task) for name, provider in PROVIDERS.items()}
    found = {name: run.results() for name, run in runs.items()}
    entries = {name: {} for name in runs}
    for name in runs:
        if name == BASELINE:
            continue
        verdict = parity.worst(parity.compare(found[name], found[BASELINE], exact))
        entries[name]["parity" if verdict.ok else "wrong"] = asdict(verdict)
    steps = {name: run.step for name, run in runs.items() if "wrong" not in entries[name]}
    with torch.set_grad_enabled(work.training):
        timings = timing.interleaved(steps, effort.rounds, effort.seconds, after_round)
    for name, measured in timings.items():
        entries[name]["timing"] = {**asdict(measured), "noisy": measured.noisy}
    for name, run in runs.items():
        if hasattr(run, "kernels"):
            entries[name]["kernels"] = run.kernels()
    return {"workload": asdict(work), "providers": entries}


def measure(works: list[Workload], effort: Effort, console: Console) -> dict:
    """All rows, or those that were done when Ctrl-C came."""
    result = {
        "machine": machine.describe(),
        "providers": list(PROVIDERS),
        "rows": [],
        "others": 0.0,
        "interrupted": False,
    }
    others = machine.Others()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(works) * effort.rounds)
        try:
            for done, work in enumerate(works):
                progress.update(bar, description=work.name, completed=done * effort.rounds)
                row = measure_row(work, effort, lambda: progress.advance(bar))
                result["rows"].append(row)
        except KeyboardInterrupt:
            result["interrupted"] = True
    result["others"] = others.cpus()
    return result


def print_table(result: dict, console: Console) -> None:
    heading, rows = report.cells(result)
    table = Table()
    for name in heading:
        table.add_column(name, justify="left" if name == "case" else "right")
    for row in rows:
        red = any(cell.startswith("wrong") for cell in row)
        style = "red" if red else "yellow" if "missed" in row else None
        table.add_row(*row, style=style)
    console.print(table)
    console.print(report.caption(result))


def save(result: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def parse(argv):
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--set", choices=SETS, default="cpu", help="which rows (default: cpu)")
    parser.add_argument("--threads", type=int, default=2, help="threads of both (default: 2)")
    parser.add_argument("--only", metavar="TEXT", help="only rows whose name contains TEXT")
    parser.add_argument(
        "--json",
        metavar="OUT",
        nargs="?",
        const="",
        help="write the results; without OUT to bench/results/<machine>.json",
    )
    commands = parser.add_subparsers(dest="command", metavar="report")
    shown = commands.add_parser("report", help="print a results file as a markdown table")
    shown.add_argument("file", type=Path)
    shown.add_argument("--readme", action="store_true", help="put it into README.md instead")
    args = parser.parse_args(argv)
    if args.threads < 1:
        parser.error("--threads must be at least 1")
    return args


def show_report(args) -> int:
    try:
        if args.readme:
            report.update_readme(args.file)
        else:
            print(report.markdown(report.load(args.file)))
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {args.file}: {error}", file=sys.stderr)
        return 2
    return 0


def main(argv=None) -> int:
    args = parse(argv)
    if args.command == "report":
        return show_report(args)
    works = [w for w in SETS[args.set] if args.only is None or args.only in w.name]
    if not works:
        print(f"error: no row of the set {args.set} contains {args.only!r}", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message="LSTM with projections is not supported with oneDNN")
    warnings.filterwarnings("error", message="lstm_fused.LSTM ran through torch")
    console = Console()
    result = measure(works, EFFORTS[args.set], console)
    print_table(result, console)
    if args.json is not None and result["rows"]:
        path = Path(args.json or RESULTS / f"{machine.slug(result['machine'])}.json")
        save(result, path)
        console.print(f"written to {path}")
    if result["interrupted"]:
        return 130
    wrong = any("wrong" in e for row in result["rows"] for e in row["providers"].values())
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
