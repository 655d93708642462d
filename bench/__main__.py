"""`python -m bench` measures a set of workloads; `report` and `compare` show what was measured."""

import argparse
import json
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from bench import (
    accuracy,
    charts,
    clients,
    environment,
    gpu,
    latency,
    measure,
    model,
    pages,
    report,
    roofline,
    run,
)
from bench.cases import SET_PROVIDERS, SET_RATIOS, SETS, TORCH
from bench.compiled import NotMeasured
from bench.isolated import Lost
from bench.providers import AGAIN, PROVIDERS
from bench.timing import Sampling

RESULTS = Path(__file__).parent / "results"
SAVED_EVERY = 5.0  # seconds, while rows are measured
# Events are exact to half a microsecond. A machine with a GPU is lent for minutes.
ON_GPU = Sampling(rounds=15, seconds=0.005, row_seconds=1.0, attempts=2, set_seconds=420.0)
SAMPLINGS = {
    "quick": Sampling(rounds=11, seconds=0.02, row_seconds=1.5, attempts=2, set_seconds=100.0),
    "sweep": Sampling(rounds=9, seconds=0.02, row_seconds=2.0, attempts=2),
    "gpu": ON_GPU,
    "plans": replace(ON_GPU, set_seconds=120.0),
}
THOROUGH = Sampling(rounds=31, seconds=0.05, row_seconds=8.0, attempts=3)


def parse(argv):
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    add = parser.add_argument
    add("--set", choices=SETS, default="cpu", help="which rows (default: cpu)")
    words = "threads of all (default: 2); several, by commas, are measured in turn and compared"
    add("--threads", default="2", metavar="N,...", help=words)
    add("--device", choices=("cpu", "cuda"), help="default: cuda for gpu and plans, else cpu")
    add("--isa", choices=environment.ISA_LIMITS, help="hold us and torch to an instruction set")
    add("--busy", type=int, default=0, metavar="N", help="measure while N processes keep CPUs busy")
    add("--keep-memory", action="store_true", help="malloc keeps all that is freed")
    add("--seconds", type=float, metavar="S", help="rows get fewer samples to end in about S")
    add("--only", default="", metavar="TEXT", help="only rows whose name contains TEXT")
    names = ", ".join(PROVIDERS)
    add("--providers", metavar="NAMES", help=f"to measure with {TORCH}, by commas: {names}")
    add("--roofline", action="store_true", help="only measure the machine's own limits")
    add("--self", action="store_true", help=f"{TORCH} against itself: is 1.0x reported?")
    words = "measure your own model; FACTORY() returns (module, inputs)"
    add("--model", metavar="PATH.py:FACTORY", help=words)
    add("--memory", action="store_true", help="the peak memory of each training row as well")
    add("--no-roofline", action="store_true", help="leave the machine's limits out")
    add("--json", type=Path, metavar="OUT", help="write the results")
    add("--save", action="store_true", help="write the results and a chart to bench/results")
    commands = parser.add_subparsers(dest="command", metavar="clients|accuracy|...")
    client = commands.add_parser("clients", help="models of other libraries, before and after")
    client.add_argument("names", nargs="*", help="only those whose name contains one of these")
    trained = commands.add_parser("accuracy", help="what rounded weights cost trained models")
    trained.add_argument("names", nargs="*", help="only those whose name contains one of these")
    shown = commands.add_parser("report", help="print results files as markdown tables")
    shown.add_argument("files", type=Path, nargs="+")
    shown.add_argument("--html", type=Path, metavar="OUT", help="write one page of them instead")
    shown.add_argument("--svg", action="store_true", help="draw a chart beside each file instead")
    words = "put them into README.md and the pages of docs, and draw their charts"
    shown.add_argument("--readme", action="store_true", help=words)
    shown.add_argument("--goals", action="store_true", help="which goals of the set were reached")
    compared = commands.add_parser("compare", help="what changed from one result to another")
    compared.add_argument("files", type=Path, nargs=2, metavar="BEFORE AFTER")
    args = parser.parse_args(argv)
    counts = args.threads.split(",")
    if not all(count.strip().isdecimal() and int(count) for count in counts):
        parser.error(f"--threads must be at least 1, by commas if several, not {args.threads!r}")
    args.thread_counts = [int(count) for count in counts]
    args.threads = args.thread_counts[0]
    args.device = args.device or ("cuda" if args.set in ("gpu", "plans") else "cpu")
    chosen = [name.strip() for name in (args.providers or "").split(",") if name.strip()]
    if unknown := [name for name in chosen if name not in PROVIDERS]:
        parser.error(f"no provider {unknown[0]!r}; there are: {names}")
    default = [name for name, provider in PROVIDERS.items() if provider.default]
    chosen = chosen or SET_PROVIDERS.get(args.set, default)
    args.providers = list(dict.fromkeys([TORCH, *chosen]))
    return args


def fail(message) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def show_report(args) -> int:
    try:
        results = [report.load(path) for path in args.files]
        if args.svg or args.readme:
            for path, result in zip(args.files, results, strict=True):
                charts.draw(result, path)
        if args.readme:
            shown = list(zip(args.files, results, strict=True))
            for target in dict.fromkeys(page for _, r in shown for page in pages.pages_of(r)):
                pages.update(target, [f for f, r in shown if target in pages.pages_of(r)])
    except (ValueError, charts.NoChart) as error:
        return fail(error)
    if args.html:
        args.html.write_text(pages.page(results))
    elif not (args.svg or args.readme):
        show = report.goals_text if args.goals else report.markdown
        print("\n\n".join(map(show, results)))
    return 0


def show_comparison(args) -> int:
    """1 if a row became slower than the spreads explain, 2 if nothing can be compared."""
    try:
        results = [report.load(path) for path in args.files]
        found = report.changes(*results)
    except ValueError as error:
        return fail(error)
    print(report.comparison(found, *results))
    return 1 if any(change.regressed for change in found) else 0


def find_roofline(args):
    """This machine's limits; None, after saying why, where they cannot be measured."""
    try:
        return gpu.measure_gpu() if args.device == "cuda" else roofline.measure_cpu(args.threads)
    except (NotMeasured, RuntimeError) as error:  # torch's own, of a GPU
        print(f"without the machine's limits: {error}", file=sys.stderr)
        return None


def default_path(result: dict) -> Path:
    """bench/results/<machine>.json, and in its name what is not plain."""
    which = "" if result["set"] in ("cpu", "gpu") else f"-{result['set']}"
    which += f"-beside-{result['busy']}" if result.get("busy") else ""
    which += "-kept" if result.get("keep_memory") else ""
    return RESULTS / f"{environment.slug(result['machine'])}{which}.json"


def keep(args, result: dict) -> None:
    """Writes what the options ask to be written."""
    if args.save and not args.json:
        args.json = default_path(result)
    if args.json:
        report.save(result, args.json)
        print(f"written to {args.json}", file=sys.stderr)
    if args.save:
        try:
            charts.draw(result, args.json)
        except charts.NoChart as error:
            print(error, file=sys.stderr)


def run_model(args) -> int:
    """1 if the fused model disagrees with the original."""
    try:
        result = model.measure_model(args.model, args.device, args.seconds)
    except model.ModelError as error:
        return fail(error)
    keep(args, result)
    print("\n".join([*model.lines(result), "", report.markdown(result)]))
    return 1 if any(map(report.is_ours_wrong, result["rows"])) else 0


def run_clients(args) -> int:
    """1 if ours were wrong in one; a file that is written keeps its other clients."""
    path = args.json or default_path({"set": "clients", "machine": environment.describe()})
    kept = args.json or args.save
    before = report.load(path) if kept and path.exists() else None
    after = [lambda result: report.save(result, path)] if kept else []
    result = clients.measure_clients(args.names, before, *after)
    if result["rows"]:
        keep(args, result)
        print(report.markdown(result))
    return 1 if any(map(report.is_ours_wrong, result["rows"])) else 0


def run_accuracy(args) -> int:
    result = accuracy.measure_accuracy(args.names)
    keep(args, result)
    print(report.markdown(result))
    return 0


def run_rows(args, works) -> dict:
    sampling = SAMPLINGS.get(args.set, THOROUGH)
    sampling = replace(sampling, set_seconds=args.seconds) if args.seconds else sampling
    saved = time.monotonic()

    def after_row(result):  # so that a process that is killed leaves a file
        nonlocal saved
        if (args.json or args.save) and time.monotonic() - saved > SAVED_EVERY:
            report.save(result, args.json or default_path(result))
            saved = time.monotonic()

    # A limit is what the machine can do undisturbed, with float32 weights.
    without = args.no_roofline or args.busy or args.self or args.set in SET_RATIOS
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit is Ctrl-C
    try:
        with environment.busy_processes(args.busy):
            return run.measure_set(
                works,
                [TORCH, AGAIN] if args.self else args.providers,
                sampling,
                args.device,
                args.keep_memory,
                (lambda: None) if without else (lambda: find_roofline(args)),
                after_row,
                set=args.set,
                busy=args.busy,
            )
    finally:
        signal.signal(signal.SIGTERM, before)


def run_counts(args) -> int:
    """The set with each thread count, then how each provider gains from threads; as run_set."""
    results, code, target = [], 0, args.json
    for count in args.thread_counts:
        args.threads = count
        torch.set_num_threads(count)
        if target and len(args.thread_counts) > 1:
            args.json = target.with_stem(f"{target.stem}-{count}t")
        elif not target:
            args.json = None  # --save names the file by the thread count
        found, result = run_set(args)
        code = max(code, found)
        if result is None or result["interrupted"]:
            break
        results.append(result)
    if len(results) > 1:
        print("\n" + report.scaling(results))
    return code


def run_set(args) -> tuple[int, dict | None]:
    """(code, result); code is 1 if ours were wrong, or --self found torch.nn to be faster than
    itself, and 130 after Ctrl-C."""
    works = [w for w in SETS[args.set] if args.only in w.name]
    if not works:
        return fail(f"no row of the set {args.set} contains {args.only!r}"), None
    result = run_rows(args, works)
    try:
        if args.memory and not result["interrupted"]:
            run.add_memory(result, args.device)
        if args.set == "streaming" and not (result["interrupted"] or args.only):
            result["latency"] = latency.measure(args.providers)
    except Lost as error:
        print(f"without memory: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        result["interrupted"] = True
    if result["rows"]:
        keep(args, result)
    rows = report.measured(result)
    print(report.self_table(result) if args.self else report.markdown(result))
    for name, reasons in result["left_out"].items():
        print(f"left out: {name} ({', '.join(reasons)})", file=sys.stderr)
    if result["interrupted"]:
        return 130, result
    good = all(map(report.is_even, rows)) if args.self else not any(map(report.is_ours_wrong, rows))
    return (0 if good else 1), result


def main(argv=None) -> int:
    args = parse(argv)
    if args.isa and environment.isa() != args.isa:
        return environment.restart_with(args.isa, sys.argv[1:] if argv is None else argv)
    if args.command in ("report", "compare"):
        return show_report(args) if args.command == "report" else show_comparison(args)
    if args.device == "cuda" and not torch.cuda.is_available():
        return fail("torch finds no CUDA device here")
    torch.set_num_threads(args.threads)
    measure.quiet()
    if args.roofline:
        if (found := find_roofline(args)) is None:
            return 2
        print("\n".join(roofline.lines(found)))
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    if args.command:
        return run_clients(args) if args.command == "clients" else run_accuracy(args)
    return run_model(args) if args.model else run_counts(args)


if __name__ == "__main__":
    sys.exit(main())
