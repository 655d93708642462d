"""Peak memory of a training step, measured in a process of its own for each provider.

On a GPU it is torch's own count. On a CPU it is the growth of the process's resident set: torch's
profiler would see only what goes through torch's allocator, and neither oneDNN's scratch memory nor
that of our kernels does. The C library is told to give freed memory back at once, and the first
step of a shape counts, since later ones may reuse what a library kept.
"""

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RETURN_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


class NotMeasured(Exception):
    """Why there is no number, in one line."""


def status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    return int(re.search(rf"^{field}:\s*(\d+) kB", STATUS.read_text(), re.M)[1]) * 1024


def cpu_growth(step) -> int:
    """Bytes by which the resident set grew at most while step() ran."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    try:
        CLEAR.write_text("5")  # the peak starts over from what is resident now
    except OSError as error:
        raise NotMeasured(f"the peak of the resident set cannot be reset: {error}") from None
    before = status("VmRSS")
    kept = step()
    grown = status("VmHWM") - before
    del kept
    return max(0, grown)


def gpu_growth(step) -> int:
    """Bytes that torch's allocator handed out at most while step() ran."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = step()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


def growth(device: str, step) -> int:
    return gpu_growth(step) if device == "cuda" else cpu_growth(step)


def of_workload(work, provider: str, device: str) -> int:
    """The first training step of a workload; a tiny one before it loads what is loaded once."""
    from bench import measure, problem
    from bench.providers import PROVIDERS

    measure.set_precision(work)
    PROVIDERS[provider].build(problem.build(replace(work, T=2, N=1), device)).step()
    run = PROVIDERS[provider].build(problem.build(work, device))
    return growth(device, run.step)


def of_model(spec: str, fused: bool, device: str) -> int:
    """The second training step of a user's model: nobody knows a smaller input to warm up with."""
    from bench import model

    subject = model.load(spec, device)
    copy = subject.fused() if fused else subject.original()
    copy.step("training")
    copy.module.zero_grad(set_to_none=True)
    return growth(device, lambda: copy.step("training"))


def child(task: dict) -> dict[str, int]:
    """What the process of its own does: task is what the parent wrote, the result by row name."""
    from bench.workloads import Workload

    torch.set_num_threads(task["threads"])
    if "model" in task:
        return {"model": of_model(task["model"], task["fused"], task["device"])}
    works = [Workload(**work) for work in task["works"]]
    return {w.name: of_workload(w, task["provider"], task["device"]) for w in works}


def ask(task: dict) -> dict[str, int]:
    """child(task) in a process of its own; NotMeasured carries the last line it wrote."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory"],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        env=os.environ | RETURN_AT_ONCE,
    )
    if done.returncode:
        raise NotMeasured((done.stderr.strip() or f"exit {done.returncode}").split("\n")[-1])
    return json.loads(done.stdout.strip().split("\n")[-1])


def add(result: dict, works: list, providers: tuple[str, ...]) -> None:
    """row["memory"] for each training row that has a time of these providers."""
    from bench.report import median_of

    rows = {row["workload"]["name"]: row for row in result["rows"]}
    for provider in providers:
        asked = [
            asdict(work)
            for work in works
            if work.training and work.name in rows and median_of(rows[work.name], provider)
        ]
        if not asked:
            continue
        m = result["machine"]
        task = {"provider": provider, "works": asked}
        found = ask(task | {"device": m["device"], "threads": m["threads"]})
        for name, size in found.items():
            rows[name].setdefault("memory", {})[provider] = size


if __name__ == "__main__":
    print(json.dumps(child(json.load(sys.stdin))))
