"""A row's times, taken in a process of its own.

glibc's malloc asks the system for large blocks anew each time, until a larger one has been freed:
from then on it keeps such blocks, and the pages of a training step are not touched for the first
time in every step. How fast a row is therefore depends on what the process did before it, and the
oracle in float64 would be that. `keep_memory` measures the other extreme: all that is freed stays.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from bench.timing import Effort
from bench.workloads import Workload

# Beyond any block of any row.
KEEP = {"MALLOC_MMAP_THRESHOLD_": str(1 << 40), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


def timer(keep_memory: bool = False):
    """times(names, work, effort, device, part) -> what measure.clocked finds, in a new process."""

    def times(names, work, effort, device, part) -> dict[str, dict]:
        task = {
            "work": asdict(work),
            "names": list(names),
            "effort": asdict(effort),
            "device": device,
            "threads": torch.get_num_threads(),
        }
        return ask(task, os.environ | (KEEP if keep_memory else {}), part)

    return times


def ask(task: dict, environment, part) -> dict[str, dict]:
    """child(task) in a process of its own. If that one dies, everybody in the row has failed."""
    child = subprocess.Popen(
        [sys.executable, "-m", "bench.apart"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
        env=environment,
        start_new_session=True,  # Ctrl-C is for the one who asks, and who ends the child
    )
    try:
        child.stdin.write(json.dumps(task))
        child.stdin.close()
        answer = None
        for line in child.stdout:
            answer = json.loads(line)
            if "part" in answer:
                part(answer["part"])
    except BaseException:
        os.killpg(child.pid, signal.SIGKILL)
        raise
    finally:
        child.stdout.close()
        child.wait()
    if child.returncode:
        why = f"the process that measured it ended with exit code {child.returncode}"
        return {name: {"failed": why} for name in task["names"]}
    return answer["times"]


def child(task: dict, tell) -> dict[str, dict]:
    from bench import measure, problem

    measure.quiet()
    torch.set_num_threads(task["threads"])
    work = Workload(**task["work"])
    measure.set_precision(work, task["device"])
    built = problem.build(work, task["device"])
    runs = {name: provider.build(built) for name, provider in measure.chosen(task["names"]).items()}
    effort = Effort(**task["effort"])
    return measure.clocked(runs, work, effort, task["device"], lambda part: tell({"part": part}))


if __name__ == "__main__":

    def tell(what: dict) -> None:
        print(json.dumps(what), flush=True)

    tell({"times": child(json.load(sys.stdin), tell)})
