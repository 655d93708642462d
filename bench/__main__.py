"""`python -m bench` measures a set of workloads; `report` prints what was measured."""

import argparse
import json
import sys
import warnings
from pathlib import Path

import torch

from bench import machine, measure, progress, readme, report, roofline
from bench.providers import PROVIDERS
from bench.sets import SETS
from bench.timing import Effort

RESULTS = Path(__file__).parent / "results"
WIDTH = 160  # of a table that is written to a file
EFFORTS = {
    "quick": Effort(rounds=9, seconds=0.02, row_seconds=2.5),
    "sweep": Effort(rounds=9, seconds=0.02, row_seconds=3.0),
}
THOROUGH = Effort(rounds=31, seconds=0.05, row_seconds=10.0)


def console():
    """rich's, or None where rich is missing; wide where nobody's terminal sets the width."""
    if progress.Console is None:
        return None
    screen = progress.Console()
    return screen if screen.is_terminal else progress.Console(width=WIDTH)


def print_table(result: dict, console) -> None:
    """The rows on a terminal, red where a provider was wrong, yellow where a goal was missed."""
    if console is None:
        print(report.markdown(result))
        return
    heading, groups = report.cells(result)
    table = progress.Table()
    for name in heading:
        table.add_column(name, justify="left" if name == "case" else "right", no_wrap=True)
    for name, rows in groups:
        table.add_row(name, style="bold", end_section=False)
        for row in rows:
            red = any(cell.startswith(("wrong", "failed")) for cell in row)
            missed = any("missed" in cell for cell in row)
            table.add_row(*row, style="red" if red else "yellow" if missed else None)
        table.add_section()
    console.print(table)
    console.print(report.caption(result), markup=False)


def save(result: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def default_path(result: dict) -> Path:
    """bench/results/<machine>.json, and the set's name in it where that is not plain."""
    which = "" if result["set"] in ("cpu", "gpu") else f"-{result['set']}"
    return RESULTS / f"{machine.slug(result['machine'])}{which}.json"


def add_measuring(parser):
    parser.add_argument("--set", choices=SETS, default="cpu", help="which rows (default: cpu)")
    parser.add_argument("--threads", type=int, default=2, help="threads of all (default: 2)")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="default: cuda for the set gpu, else cpu",
    )
    parser.add_argument("--only", metavar="TEXT", help="only rows whose name contains TEXT")
    parser.add_argument(
        "--providers",
        metavar="NAMES",
        help=f"who is measured beside torch.nn, by commas, of: {', '.join(PROVIDERS)}",
    )
    parser.add_argument(
        "--roofline", action="store_true", help="only print the machine's own limits"
    )
    parser.add_argument("--no-roofline", action="store_true", help="leave those limits out")
    parser.add_argument(
        "--json",
        metavar="OUT",
        nargs="?",
        const="",
        help="write the results; without OUT to bench/results/<machine>.json",
    )


def parse(argv):
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    add_measuring(parser)
    commands = parser.add_subparsers(dest="command", metavar="report")
    shown = commands.add_parser("report", help="print results files as markdown tables")
    shown.add_argument("files", type=Path, nargs="+")
    shown.add_argument("--readme", action="store_true", help="put them into README.md instead")
    args = parser.parse_args(argv)
    if args.threads < 1:
        parser.error("--threads must be at least 1")
    args.device = args.device or ("cuda" if args.set == "gpu" else "cpu")
    if args.providers is not None:
        names = [name.strip() for name in args.providers.split(",")]
        if unknown := [name for name in names if name not in PROVIDERS]:
            parser.error(f"no provider {unknown[0]!r}; there are: {', '.join(PROVIDERS)}")
        args.providers = list(dict.fromkeys([report.BASELINE, *names]))
    return args


def fail(message) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def show_report(args) -> int:
    for path in args.files:
        try:
            result = report.load(path)
        except (OSError, ValueError, KeyError) as error:
            return fail(f"{path}: {error}")
        if not args.readme:
            print(report.markdown(result))
    if args.readme:
        readme.update(args.files)
    return 0


def roof_finder(args):
    """What measures this machine's limits; None, after saying why, where that cannot be."""
    if args.no_roofline:
        return None
    try:
        if args.device == "cpu":
            roofline.library()
    except roofline.NotMeasured as error:
        print(f"without the machine's limits: {error}", file=sys.stderr)
        return None
    return lambda: roofline.measure(args.device, args.threads)


def show_roofline(args) -> int:
    find_roof = roof_finder(args)
    if find_roof is None:
        return 2
    print("\n".join(roofline.lines(find_roof())))
    return 0


def run_set(args) -> int:
    works = [w for w in SETS[args.set] if args.only is None or args.only in w.name]
    if not works:
        return fail(f"no row of the set {args.set} contains {args.only!r}")
    if args.device == "cuda" and not torch.cuda.is_available():
        return fail("torch finds no CUDA device here")
    torch.set_num_threads(args.threads)
    if args.roofline:
        return show_roofline(args)
    warnings.filterwarnings("ignore", message="LSTM with projections is not supported with oneDNN")
    warnings.filterwarnings("ignore", message="RNN module weights are not part of single contig")
    warnings.filterwarnings("error", message="lstm_fused.* ran through torch")
    effort = EFFORTS.get(args.set, THOROUGH)
    screen = console()
    find_roof = roof_finder(args)
    with progress.shown(len(works), screen) as display:
        result = measure.measure(
            args.set,
            works,
            effort,
            measure.chosen(args.providers),
            args.device,
            display,
            find_roof=find_roof,
        )
    print_table(result, screen)
    if args.json is not None and result["rows"]:
        path = Path(args.json) if args.json else default_path(result)
        save(result, path)
        print(f"written to {path}")
    if result["interrupted"]:
        return 130
    return 1 if any(map(report.is_red, result["rows"])) else 0


def main(argv=None) -> int:
    args = parse(argv)
    return show_report(args) if args.command == "report" else run_set(args)


if __name__ == "__main__":
    sys.exit(main())
