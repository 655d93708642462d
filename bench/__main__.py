"""`python -m bench` measures a set of workloads; `report` and `compare` show what was measured."""

import argparse
import contextlib
import json
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from bench import (
    apart,
    chart,
    circumstances,
    compare,
    machine,
    measure,
    memory,
    model,
    page,
    progress,
    readme,
    report,
    roofline,
    selfcheck,
    worker,
)
from bench.providers import PROVIDERS
from bench.sets import SETS
from bench.timing import Effort

SAVED_EVERY = 5.0  # seconds, while rows are measured
RESULTS = Path(__file__).parent / "results"
WIDTH = 200  # of a table that is written to a file
EFFORTS = {
    "quick": Effort(rounds=11, seconds=0.02, row_seconds=1.5, attempts=2),
    "sweep": Effort(rounds=9, seconds=0.02, row_seconds=2.0, attempts=2),
    # Events are exact to half a microsecond. A machine with a GPU is lent for minutes.
    "gpu": Effort(rounds=15, seconds=0.005, row_seconds=1.0, attempts=2, set_seconds=420.0),
}
THOROUGH = Effort(rounds=31, seconds=0.05, row_seconds=8.0, attempts=3)


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
        case = name == "case"
        table.add_column(name, justify="left" if case else "right", no_wrap=case)
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
    """Whole or not at all: whoever ends the process may do so meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half_made = path.with_suffix(".part")
    half_made.write_text(json.dumps(result, indent=1) + "\n")
    half_made.replace(path)


def default_path(result: dict) -> Path:
    """bench/results/<machine>.json, and the set's name in it where that is not plain."""
    which = "" if result["set"] in ("cpu", "gpu") else f"-{result['set']}"
    which += f"-beside-{result['busy']}" if result.get("busy") else ""
    which += "-kept" if result.get("keep_memory") else ""
    return RESULTS / f"{machine.slug(result['machine'])}{which}.json"


def add_measuring(parser):
    parser.add_argument("--set", choices=SETS, default="cpu", help="which rows (default: cpu)")
    parser.add_argument("--threads", type=int, default=2, help="threads of all (default: 2)")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="default: cuda for the set gpu, else cpu",
    )
    parser.add_argument(
        "--isa", choices=circumstances.LIMITS, help="hold us and torch to an instruction set"
    )
    parser.add_argument(
        "--busy", type=int, default=0, metavar="N", help="measure beside N busy processes"
    )
    parser.add_argument(
        "--keep-memory",
        action="store_true",
        help="measure where malloc keeps all that is freed, instead of its own rules",
    )
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="rows get fewer samples to end in about S"
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
    parser.add_argument(
        "--self", action="store_true", help="measure torch.nn against itself: is 1.0x reported?"
    )
    parser.add_argument(
        "--model",
        metavar="PATH.py:FACTORY",
        help="measure your own model; FACTORY() returns (module, inputs)",
    )
    parser.add_argument(
        "--memory", action="store_true", help="the peak memory of each training row as well"
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
    parser.add_argument(
        "--save", action="store_true", help="write the results, their table, charts and page too"
    )
    commands = parser.add_subparsers(dest="command", metavar="report|compare")
    shown = commands.add_parser("report", help="print results files as markdown tables")
    shown.add_argument("files", type=Path, nargs="+")
    shown.add_argument(
        "--write",
        action="store_true",
        help="write tables and charts beside the files, and one HTML page beside the first",
    )
    shown.add_argument("--readme", action="store_true", help="put tables and charts into README.md")
    compared = commands.add_parser("compare", help="what changed from one result to another")
    compared.add_argument("before", type=Path)
    compared.add_argument("after", type=Path)
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


def load_all(paths: list[Path]) -> list[dict]:
    """Results files; ValueError names the one that cannot be read."""
    results = []
    for path in paths:
        try:
            results.append(report.load(path))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None
    return results


def write_reports(paths: list[Path], results: list[dict]) -> list[Path]:
    """Per result its .md, .svg and .png, and one .html of all; without charts if need be."""
    written, svgs = [], []
    for path, result in zip(paths, results, strict=True):
        written.append(path.with_suffix(".md"))
        written[-1].write_text(report.markdown(result) + "\n")
        try:
            drawn = chart.save(result, path.with_suffix(""))
        except chart.NoCharts as error:
            print(error, file=sys.stderr)
            drawn = []
        svgs.append(drawn[0] if drawn else None)
        written += drawn
    written.append(paths[0].with_suffix(".html"))
    written[-1].write_text(page.page(results, svgs))
    return written


def show_report(args) -> int:
    try:
        results = load_all(args.files)
        if args.write:
            for path in write_reports(args.files, results):
                print(f"written to {path}")
        if args.readme:
            readme.update(args.files)
    except (ValueError, chart.NoCharts) as error:
        return fail(error)
    if not (args.write or args.readme):
        print("\n\n".join(report.markdown(result) for result in results))
    return 0


def show_comparison(args) -> int:
    """1 if a row became slower than the spreads explain, 2 if nothing can be compared."""
    try:
        before, after = load_all([args.before, args.after])
        found = compare.changes(before, after)
    except ValueError as error:
        return fail(error)
    print(compare.table(found))
    for note in compare.notes(before, after):
        print(note)
    slower = [c.name for c in found if c.regressed]
    print(f"Slower beyond the spread: {', '.join(slower) or 'no row'}.")
    return 1 if slower else 0


def roof_of(args):
    """This machine's limits; None, after saying why, where they cannot be measured."""
    if args.no_roofline or args.busy:  # a limit is what the machine can do undisturbed
        return None
    try:
        return roofline.measure(args.device, args.threads)
    except (roofline.NotMeasured, RuntimeError) as error:  # torch's own, of a GPU
        print(f"without the machine's limits: {error}", file=sys.stderr)
        return None


def show_roofline(args) -> int:
    roof = roof_of(args)
    if roof is None:
        return 2
    print("\n".join(roofline.lines(roof)))
    return 0


def apart_timer(args):
    """On a GPU memory is torch's own; there whole rows are measured apart, see worker.py."""
    return apart.timer(args.keep_memory) if args.device == "cpu" else None


@contextlib.contextmanager
def row_measurer(args):
    """measure_one of measure.measure."""
    if args.device == "cpu":
        yield measure.measure_row
        return
    apart_from_here = worker.Worker()
    try:
        yield apart_from_here
    finally:
        apart_from_here.stop()


@contextlib.contextmanager
def ended_as_by_ctrl_c():
    """Meanwhile the signal that a time limit sends leaves what was measured, too."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def effort_of(args) -> Effort:
    effort = EFFORTS.get(args.set, THOROUGH)
    return replace(effort, set_seconds=args.seconds) if args.seconds else effort


def path_of(args, result: dict) -> Path | None:
    """Where the result is written, None if it is not."""
    if args.json is None and not args.save:
        return None
    return Path(args.json) if args.json else default_path(result)


def keep_going(args):
    """after_row of measure.measure: the result up to now, for whoever is killed."""
    written = time.monotonic()

    def after_row(result):
        nonlocal written
        path = path_of(args, result | {"busy": args.busy})
        if path and time.monotonic() - written > SAVED_EVERY:
            save(result, path)
            written = time.monotonic()

    return after_row


def keep(args, result: dict) -> None:
    """Writes what the options ask to be written."""
    if path := path_of(args, result):
        save(result, path)
        for written in [path, *(write_reports([path], [result]) if args.save else ())]:
            print(f"written to {written}")


def run_model(args) -> int:
    """1 if the fused model disagrees with the original."""
    screen = console()
    try:
        with progress.shown(2, screen) as display:
            result = model.measure(args.model, args.device, display)
    except model.ModelError as error:
        return fail(error)
    except KeyboardInterrupt:
        return 130
    print("\n".join(model.lines(result)))
    if args.json:
        save(result, Path(args.json))
        print(f"written to {args.json}")
    return 1 if any("wrong" in row for row in result["rows"].values()) else 0


def run_self(args, works) -> int:
    """1 if a row of torch.nn against itself is not 1.0x within its own spread."""
    effort = effort_of(args)
    with progress.shown(len(works), console()) as display:
        result = measure.measure(
            args.set,
            works,
            effort,
            selfcheck.providers(),
            args.device,
            display,
            times_apart=apart_timer(args),
        )
    print("\n".join([*selfcheck.lines(result), "", report.caption(result)]))
    if args.json:
        save(result, Path(args.json))
    if result["interrupted"]:
        return 130
    rows = [row for row in result["rows"] if "absent" not in row]
    return 0 if all(map(selfcheck.is_even, rows)) else 1


def add_memory(args, works, result) -> None:
    if not args.memory or result["interrupted"]:
        return
    try:
        memory.add(result, works, (report.BASELINE, report.OURS))
    except memory.NotMeasured as error:
        print(f"without memory: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        result["interrupted"] = True


def run_set(args) -> int:
    if args.device == "cuda" and not torch.cuda.is_available():
        return fail("torch finds no CUDA device here")
    torch.set_num_threads(args.threads)
    if args.roofline:
        return show_roofline(args)
    if args.model:
        return run_model(args)
    works = [w for w in SETS[args.set] if args.only is None or args.only in w.name]
    if not works:
        return fail(f"no row of the set {args.set} contains {args.only!r}")
    measure.quiet()
    if args.self:
        return run_self(args, works)
    effort = effort_of(args)
    screen = console()
    with (
        circumstances.neighbours(args.busy),
        ended_as_by_ctrl_c(),
        row_measurer(args) as measure_one,
        progress.shown(len(works), screen) as display,
    ):
        result = measure.measure(
            args.set,
            works,
            effort,
            measure.chosen(args.providers),
            args.device,
            display,
            find_roof=lambda: roof_of(args),
            times_apart=apart_timer(args),
            measure_one=measure_one,
            after_row=keep_going(args),
        )
    result["busy"] = args.busy
    if args.device == "cpu":
        result["keep_memory"] = args.keep_memory
    add_memory(args, works, result)
    if result["rows"]:
        keep(args, result)
    print_table(result, screen)
    if result["left_out"]:
        reasons = (f"{name} ({', '.join(whys)})" for name, whys in result["left_out"].items())
        print(f"left out: {'; '.join(reasons)}", file=sys.stderr)
    if result["interrupted"]:
        return 130
    return 1 if any(map(report.is_ours_wrong, result["rows"])) else 0


def main(argv=None) -> int:
    args = parse(argv)
    if args.isa and circumstances.isa() != args.isa:
        return circumstances.restart_with(args.isa, sys.argv[1:] if argv is None else argv)
    commands = {"report": show_report, "compare": show_comparison}
    return commands.get(args.command, run_set)(args)


if __name__ == "__main__":
    sys.exit(main())
