"""Measuring rows: the gate, then the clock for whoever passed it."""

import copy
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict

import torch

from bench import machine, problem, progress, roofline, timing
from bench.providers import BASELINE, OURS, PROVIDERS, Provider
from bench.timing import Effort
from bench.workloads import Workload
from lstm_fused.testing import parity

SCHEMA = 2


def chosen(names: Iterable[str] | None = None) -> dict[str, Provider]:
    """The providers of these names, or those that are measured unless others are named."""
    if names is None:
        return {name: p for name, p in PROVIDERS.items() if p.default}
    return {name: PROVIDERS[name] for name in names}


def quiet() -> None:
    """What torch warns of in each of some rows says nothing new; a row of ours that ran through
    torch is no row of ours."""
    warnings.filterwarnings("ignore", message="LSTM with projections is not supported with oneDNN")
    warnings.filterwarnings("ignore", message="RNN module weights are not part of single contig")
    warnings.filterwarnings("error", message="lstm_fused.* ran through torch")


def set_precision(work: Workload, device: str) -> None:
    """TF32 is allowed in the rows that say so and nowhere else; the CPU has none."""
    if device == "cpu":
        return
    torch.backends.cudnn.allow_tf32 = work.dtype == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = work.dtype == "tf32"


def admit(name: str, provider: Provider, task, exact, baseline, entry: dict):
    """The run of a provider that passed the gate; else None, and entry says why.

    The baseline is held to twice its own error, that is to finite values.
    """
    if why := provider.why_not(task.workload, task.device):
        entry["absent"] = why
        return None
    try:
        run = provider.build(task)
        found = run.results()
        if task.device == "cuda":
            torch.cuda.synchronize()  # what went wrong is this provider's, not the next one's
    except Exception as error:  # whatever a peer raises is a fact about that peer
        entry["failed"] = f"{type(error).__name__}: {error}".split("\n")[0]
        return None
    if name == BASELINE:
        baseline["found"] = found
    if not baseline:
        entry["failed"] = f"nothing to judge it by: {BASELINE} failed"
        return None
    # A peer without a tensor (the gradient of a weight it keeps in another form) is not asked for.
    judged = {tensor: truth for tensor, truth in exact.items() if tensor in found}
    verdict = parity.worst(parity.compare(found, baseline["found"], judged))
    entry["parity" if verdict.ok else "wrong"] = asdict(verdict)
    return run if verdict.ok else None


def nobody(name: str) -> None:
    """What is told who is tried next, where nobody asks."""


def clocked(
    runs: dict, work, effort: Effort, device: str, part, clock=None, trying=nobody
) -> dict[str, dict]:
    """The timing of each run, and of ours what ran."""
    clock = clock or timing.clock_for(device)
    steps = {name: run.step for name, run in runs.items()}
    with torch.set_grad_enabled(work.training):
        timings = timing.quietest(
            lambda: timing.interleaved(
                steps, effort, clock, lambda done, of: part(done / of), trying
            ),
            effort.attempts,
        )
    found = {}
    for name, measured in timings.items():
        found[name] = {"timing": {**asdict(measured), "noisy": measured.noisy}}
        if hasattr(runs[name], "kernels"):
            trying(name)
            found[name]["kernels"] = runs[name].kernels()
    return found


def measure_row(
    work: Workload,
    effort: Effort,
    providers: dict[str, Provider],
    device: str = "cpu",
    part=lambda fraction: None,
    clock=None,
    times_apart=None,
    trying=nobody,
) -> dict:
    """One row of the results: per provider its verdict and time, or why there is none.

    times_apart: apart.timer(), where times are not to be taken in this process. trying is told who
    is built, judged or timed next.
    """
    set_precision(work, device)
    entries = {name: {} for name in providers}
    row = {"workload": asdict(work), "providers": entries}
    if why := problem.why_absent(work, device):
        row["absent"] = why
        return row
    task = problem.build(work, device)
    exact = problem.oracle(task)
    runs, baseline = {}, {}
    order = sorted(providers, key=lambda name: name != BASELINE)  # its errors judge the others
    for name in order:
        trying(name)
        if run := admit(name, providers[name], task, exact, baseline, entries[name]):
            runs[name] = run
    runs = {name: runs[name] for name in providers if name in runs}
    if times_apart:
        found = times_apart(runs, work, effort, device, part)
    else:
        found = clocked(runs, work, effort, device, part, clock, trying)
    for name, entry in found.items():
        entries[name] |= entry
    return row


def add_limits(result: dict, roofs: list[roofline.Roof]) -> None:
    """The machine's rates, and in each row the seconds it takes at them."""
    if not roofs:
        return
    roof = roofline.best(roofs)
    result["roofline"] = asdict(roof)
    for row in result["rows"]:
        limit = roofline.limit_of_row(row, roof, OURS)
        if limit is not None:
            row["limit"] = float(f"{limit:.4g}")


def measure(
    name: str,
    works: list[Workload],
    effort: Effort,
    providers: dict[str, Provider] | None = None,
    device: str = "cpu",
    display=None,
    clock=None,
    find_roof=lambda: None,
    times_apart=None,
    measure_one=measure_row,
    after_row=lambda result: None,
) -> dict:
    """All rows, or those that were done when Ctrl-C came.

    find_roof measures the machine's limits, if it can; it is called before and after the rows.
    times_apart as in measure_row, which measure_one stands for. after_row is given the result up
    to each row.
    """
    providers = providers or chosen()
    display = display or progress.Silent()
    others = machine.Others()
    result = {
        "schema": SCHEMA,
        "set": name,
        "machine": machine.describe(device),
        "providers": list(providers),
        "planned": len(works),
        "rows": [],
        "others": 0.0,
        "interrupted": False,
    }
    roofs = []
    end = time.monotonic() + effort.set_seconds
    try:
        roofs += filter(None, [find_roof()])
        for index, work in enumerate(works):
            display.row(index, work.name)
            share = effort.within((end - time.monotonic()) / (len(works) - index))
            row = measure_one(work, share, providers, device, display.part, clock, times_apart)
            result["rows"].append(row)
            after_row(finished(result, roofs, others))
        roofs += filter(None, [find_roof()]) if roofs else []
    except KeyboardInterrupt:
        result["interrupted"] = True
    return finished(result, roofs, others)


def finished(result: dict, roofs: list, others: machine.Others) -> dict:
    """What is kept of a result, which may go on."""
    kept = copy.deepcopy(result)
    kept["others"] = others.cpus()
    kept["interrupted"] = kept["interrupted"] or len(kept["rows"]) < kept["planned"]
    add_limits(kept, roofs)
    leave_out(kept)
    return kept


def leave_out(result: dict) -> None:
    """Takes providers that no row asked for out of the rows; left_out keeps their reasons."""
    asked, reasons = {BASELINE}, {}
    for row in result["rows"]:
        for name, entry in row["providers"].items():
            if entry.keys() - {"absent"}:
                asked.add(name)
            elif entry:
                reasons.setdefault(name, {})[entry["absent"]] = None
    result["providers"] = [name for name in result["providers"] if name in asked]
    result["left_out"] = {n: list(found) for n, found in reasons.items() if n not in asked}
    for row in result["rows"]:
        row["providers"] = {n: e for n, e in row["providers"].items() if n in asked}
