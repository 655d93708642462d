"""One row: the gate, the clock for the providers that pass it, and the memory of a training step.

These functions run in the processes of isolated.py. The times of a CPU are taken in a fresh one:
they depend on what malloc did before, and the oracle allocates much.
"""

import ctypes
import gc
import re
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import torch

from bench import isolated, timing
from bench.cases import TORCH, Workload
from bench.providers import PROVIDERS, Unsupported
from bench.runs import Case, ModuleRun, build_case, exact_results
from bench.timing import Sampling
from lstm_fused.testing import parity

UNRELATED = 0.5  # a result that is off by this part of its norm has nothing to do with the row
LONGEST = 20_000  # steps: the oracle's history of more fills the memory
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def quiet() -> None:
    """Ignores torch's warnings of some rows; a row of ours that ran through torch is an error."""
    warnings.filterwarnings("ignore", message="LSTM with projections is not supported with oneDNN")
    warnings.filterwarnings("ignore", message="RNN module weights are not part of single contig")
    warnings.filterwarnings("error", message="lstm_fused.* ran through torch")


def set_precision(work: Workload, device: str) -> None:
    """TF32 is allowed in the rows that say so and nowhere else; the CPU has none."""
    if device == "cuda":
        torch.backends.cudnn.allow_tf32 = work.dtype == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = work.dtype == "tf32"


def is_usable(device: str) -> bool:
    """Whether a process can go on after an error: that a GPU computes and captures as it should."""
    if device == "cpu":
        return True
    try:
        a = torch.zeros(1, device=device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            a += 1
        graph.replay()
        return torch.cuda.current_stream() == torch.cuda.default_stream() and a.item() == 1
    except Exception:
        return False


def judge(name: str, case: Case, exact: dict, baseline: dict, entry: dict):
    """The run of a provider that passed the gate; else None, and entry says why.

    exact: the oracle's results, None where it has none; baseline: torch.nn's, which fills it in
    its turn and is held to twice its own error, that is to finite values.
    """
    if reason := PROVIDERS[name].unsupported_reason(case.workload, case.device):
        entry["absent"] = reason
        return None
    try:
        run = PROVIDERS[name].build(case)
        if not PROVIDERS[name].judged or exact is None:
            entry["unjudged"] = "it computes something else" if exact else "too long for the oracle"
            return run
        found = run.results()
        if case.device == "cuda":
            torch.cuda.synchronize()  # an error is this provider's, not the next one's
    except Unsupported as reason:
        entry["absent"] = str(reason)
        return None
    except Exception as error:  # a peer may raise anything
        if not is_usable(case.device):
            raise
        entry["failed"] = f"{type(error).__name__}: {error}".split("\n")[0]
        return None
    if name == TORCH:
        baseline |= found
    if not baseline:
        entry["failed"] = f"nothing to judge it by: {TORCH} failed"
        return None
    if PROVIDERS[name].rounded:
        return run if judge_rounded(found["y"], exact["y"], entry) else None
    # A peer without a tensor (the gradient of a weight it keeps in another form) is not asked for.
    judged = {tensor: truth for tensor, truth in exact.items() if tensor in found}
    verdict = parity.worst(parity.compare(found, baseline, judged))
    entry["parity" if verdict.ok else "wrong"] = asdict(verdict)
    return run if verdict.ok else None


def judge_rounded(found: torch.Tensor, exact: torch.Tensor, entry: dict) -> bool:
    """Enters the error of y, of the norm and the largest one; False if it is no rounding's."""
    off = found.double() - exact
    relative = (off.norm() / exact.norm()).item()
    if not relative < UNRELATED:
        facts = {"tensor": "y", "error": relative, "allowed": UNRELATED, "baseline_error": 0.0}
        entry["wrong"] = facts
        return False
    entry["rounded"] = {"relative": relative, "largest": off.abs().max().item()}
    return True


def measure_row(
    work: Workload,
    names: list[str],
    sampling: Sampling | None,
    device: str = "cpu",
    gate: bool = True,
    clock=None,
) -> dict[str, dict]:
    """By provider its verdict and time, or why there is none: an entry of a results file.

    sampling: None to judge without measuring. gate: False for providers that were judged before.
    """
    quiet()
    set_precision(work, device)
    case, entries, runs, baseline = build_case(work, device), {name: {} for name in names}, {}, {}
    exact = exact_results(case) if gate and work.T <= LONGEST else None
    for name in sorted(
        names, key=lambda name: name != TORCH
    ):  # its errors are the others' tolerance
        isolated.trying(name)
        if gate:
            runs[name] = judge(name, case, exact, baseline, entries[name])
        else:
            runs[name] = PROVIDERS[name].build(case)
    runs = {name: run for name, run in runs.items() if run}
    if sampling and runs:
        with torch.set_grad_enabled(work.training):
            steps = {name: run.step for name, run in runs.items()}
            timings = timing.time_steps(steps, sampling, device, isolated.trying, clock)
        for name, run in runs.items():
            entries[name]["timing"] = timings[name]
            if isinstance(run, ModuleRun) and (kernels := run.kernels()):
                entries[name]["kernels"] = kernels
    return entries


def resident(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    return int(re.search(rf"^{field}:\s*(\d+) kB", STATUS.read_text(), re.M)[1]) * 1024


def peak_bytes(step, device: str) -> int:
    """Bytes that step() needs at most while it runs.

    On a GPU it is torch's own count. On a CPU it is the growth of the resident set: torch's
    allocator sees neither oneDNN's scratch memory nor that of our kernels. The process must run
    with environment.RETURN_MEMORY, and step() be the first of its shape: later ones may reuse what
    a library kept.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, kept = torch.cuda.memory_allocated(), step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text("5")  # the peak starts over from what is resident now
    before, kept = resident("VmRSS"), step()
    grown = resident("VmHWM") - before
    del kept
    return max(0, grown)


def row_memory(work: Workload, name: str, device: str) -> int:
    """Peak bytes of a provider's training step; a tiny one before loads what is loaded once."""
    set_precision(work, device)
    PROVIDERS[name].build(build_case(replace(work, T=2, N=1), device)).step()
    run = PROVIDERS[name].build(build_case(work, device))
    return peak_bytes(run.step, device)
