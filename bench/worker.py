"""Rows measured by a process that may be lost: on a GPU, where one row can spoil the rest.

After a kernel that hangs or writes where it may not, or a capture that fails, a process can measure
nothing more. So another process measures row after row, and is given up together with the provider
that spoilt it: the row is then measured again without that one.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch

from bench.timing import Effort
from bench.workloads import Workload

SILENCE = 30.0  # seconds without a word after which a worker hangs: it says whom it tries
STARTING = 90.0  # before its first word of a row, in a new process or after a long oracle
STRIKES = 2  # a provider that spoilt so many workers in like rows is not tried in further ones


class Lost(Exception):
    """The worker is gone; the message says how."""


class Worker:
    """Called as measure.measure_row is. The process starts with the first row."""

    def __init__(self, module: str = "bench.worker", silence: float = SILENCE):
        self.module = module
        self.silence = silence
        self.process = None
        self.strikes = Counter()

    def __call__(self, work, effort, providers, device, part, *_) -> dict:
        spoilt = {name: "spoilt like rows before" for name in providers if self._out(name, work)}
        while True:
            names = [name for name in providers if name not in spoilt]
            row, blamed = self._try(work, effort, names, device, part)
            if not blamed:
                break
            self.stop()
            spoilt |= blamed
        failed = {name: {"failed": why} for name, why in spoilt.items()}
        row["providers"] = {name: (failed | row["providers"])[name] for name in providers}
        return row

    def _out(self, name, work):
        return self.strikes[_kind(name, work)] >= STRIKES

    def _try(self, work, effort, names, device, part) -> tuple[dict, dict[str, str]]:
        """The row, and whose fault it is that it has to be measured again, with the reason."""
        nobody = {"workload": asdict(work), "providers": {}}
        if not names:
            return nobody, {}
        trying = None
        task = {"work": asdict(work), "effort": asdict(effort), "names": names, "device": device}
        try:
            self._ask(task)
            self.patience = STARTING
            while "row" not in (answer := self._answer()):
                trying = answer.get("trying", trying)
                if "part" in answer:
                    part(answer["part"])
        except Lost as lost:
            if trying is None:  # the problem or its oracle failed
                self.stop()
                row = nobody | {"absent": f"its problem was lost: {lost}"}
                return row | {"providers": {name: {} for name in names}}, {}
            self.strikes[_kind(trying, work)] += 1
            return nobody, {trying: str(lost)}
        if answer["sound"]:
            return answer["row"], {}
        failures = {n: e["failed"] for n, e in answer["row"]["providers"].items() if "failed" in e}
        self.strikes.update(_kind(name, work) for name in failures)
        return nobody, failures

    def _ask(self, task) -> None:
        if self.process is None:
            self._start()
        try:
            self.process.stdin.write(json.dumps(task) + "\n")
            self.process.stdin.flush()
        except OSError:
            raise self._lost() from None

    def _start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", self.module, str(torch.get_num_threads())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
            start_new_session=True,  # Ctrl-C is for the one who asks, and who ends the worker
        )
        self.answers = queue.SimpleQueue()
        arguments = (self.process.stdout, self.answers)
        threading.Thread(target=_forward, args=arguments, daemon=True).start()

    def _answer(self) -> dict:
        try:
            line = self.answers.get(timeout=self.patience)
        except queue.Empty:
            raise Lost(f"said nothing for {self.patience:.0f} s") from None
        self.patience = self.silence
        if line is None:
            raise self._lost()
        return json.loads(line)

    def _lost(self) -> Lost:
        return Lost(f"the process that measured it ended with exit code {self.process.wait()}")

    def stop(self) -> None:
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None


def _kind(name: str, work: Workload) -> tuple:
    return name, work.mode, work.lengths, work.dtype


def _forward(lines, answers) -> None:
    for line in lines:
        answers.put(line)
    answers.put(None)


def sound(device: str) -> bool:
    """Whether this process can go on: that it computes, and on a GPU captures, what it should."""
    try:
        a = torch.zeros(1, device=device)
        if device == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                a += 1
            graph.replay()
            plain = torch.cuda.current_stream() == torch.cuda.default_stream()
            return plain and a.item() == 1
        return True
    except Exception:
        return False


def serve(tasks, tell) -> None:
    from bench import measure

    measure.quiet()
    for task in map(json.loads, tasks):
        row = measure.measure_row(
            Workload(**task["work"]),
            Effort(**task["effort"]),
            measure.chosen(task["names"]),
            task["device"],
            lambda part: tell({"part": part}),
            trying=lambda name: tell({"trying": name}),
        )
        failed = any("failed" in entry for entry in row["providers"].values())
        tell({"row": row, "sound": not failed or sound(task["device"])})


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def tell(what: dict) -> None:
        print(json.dumps(what), file=answers, flush=True)

    torch.set_num_threads(int(sys.argv[1]))
    serve(sys.stdin, tell)


if __name__ == "__main__":
    main()
