"""A whole set of rows: which provider runs in which process, and what is kept."""

import copy
import sys
import time
from collections import Counter
from dataclasses import asdict

from bench import environment, measure, roofline
from bench.cases import COMPILED, OURS, TORCH, Workload
from bench.isolated import COMPILING, SILENCE, Lost, Worker
from bench.providers import unsupported_reason
from bench.timing import Sampling

SCHEMA = 2
PASSED = {"parity", "rounded", "unjudged"}  # an entry's verdicts that let it be timed
STRIKES = 2  # a provider that broke so many processes in like rows is not tried in further ones


class RowMeasurer:
    """Measures rows in worker processes, without the providers that break them.

    On a GPU one worker judges and times row after row. On a CPU it judges them, and another, fresh
    one for each row, times those that were right.
    """

    def __init__(
        self, device: str, variables: dict[str, str], function=measure.measure_row, silence=SILENCE
    ):
        self.device, self.variables, self.function = device, variables, function
        self.worker, self.strikes, self.silence = Worker(silence=silence), Counter(), silence

    def row(self, work: Workload, names: list[str], sampling: Sampling) -> dict:
        row = {"workload": asdict(work), "providers": {name: {} for name in names}}
        if reason := unsupported_reason(work, self.device):
            return row | {"absent": reason}
        on_cpu = self.device == "cpu"
        try:
            entries = self._call(self.worker, work, names, None if on_cpu else sampling)
            right = [name for name in names if entries[name].keys() & PASSED]
            if on_cpu and right:
                with Worker(self.variables, silence=self.silence) as fresh:
                    timed = self._call(fresh, work, right, sampling, gate=False)
                entries |= {name: entries[name] | timed[name] for name in right}
        except Lost as lost:
            return row | {"absent": f"its case was lost: {lost}"}
        return row | {"providers": entries}

    def _call(self, worker, work, names, sampling, gate=True) -> dict[str, dict]:
        """measure_row in the worker, repeated without providers that break it."""
        kinds = {name: (name, work.mode, work.lengths, work.dtype) for name in names}
        out = [name for name in names if self.strikes[kinds[name]] >= STRIKES]
        entries = {name: {"failed": "broke its process in rows like this"} for name in out}
        while rest := [name for name in names if name not in entries]:
            try:
                entries |= worker.call(self.function, work, rest, sampling, self.device, gate)
            except Lost as lost:
                if lost.trying is None:
                    raise
                self.strikes[kinds[lost.trying]] += 1
                entries[lost.trying] = {"failed": str(lost)}
        return {name: entries[name] for name in names}


def finished(result: dict, rooflines: list[dict]) -> dict:
    """What is kept of a result, which may go on: with the seconds that each row takes at the
    machine's limits, and without the providers that no row could be given to, but their reasons."""
    result = copy.deepcopy(result)
    rows, names = result["rows"], result["providers"]
    if rooflines:
        result["roofline"] = roofline.best(rooflines)
        for row in rows:
            if (limit := roofline.limit_of_row(row, result["roofline"], OURS)) is not None:
                row["limit"] = float(f"{limit:.4g}")
    entries = {name: [row["providers"].pop(name) for row in rows] for name in names}
    asked = [n for n in names if n == TORCH or any(e.keys() - {"absent"} for e in entries[n])]
    result["left_out"] = {
        name: sorted({entry["absent"] for entry in entries[name] if entry})
        for name in names
        if name not in asked
    }
    result["providers"] = asked
    for k, row in enumerate(rows):
        row["providers"] = {name: entries[name][k] for name in asked}
    return result


def measure_set(
    works: list[Workload],
    names: list[str],
    sampling: Sampling,
    device: str = "cpu",
    keep_memory: bool = False,
    find_roofline=lambda: None,
    after_row=lambda result: None,
    **facts,
) -> dict:
    """The result of all rows, or of those that were done when Ctrl-C came.

    names: of providers. find_roofline measures the machine's limits, if it can; it is called before
    the rows and, where the set's time allows it, after them. after_row is given the result up to
    each row. facts: what else the results file says.
    """
    result = {
        "schema": SCHEMA,
        "machine": environment.describe(device),
        "providers": list(names),
        "rows": [],
        "others": 0.0,
        "interrupted": True,
        "keep_memory": keep_memory,
        **facts,
    }
    begin, before = time.monotonic(), environment.background_cpu_seconds()
    silence = COMPILING if COMPILED in names else SILENCE
    variables = environment.KEEP_MEMORY if keep_memory else {}
    measurer = RowMeasurer(device, variables, silence=silence)
    rooflines = []
    try:
        rooflines += filter(None, [find_roofline()])
        once_more = time.monotonic() - begin  # what limits take
        for index, work in enumerate(works):
            print(f"{index + 1}/{len(works)} {work.name}", file=sys.stderr)
            left = begin + sampling.set_seconds - time.monotonic()
            share = sampling.within(left / (len(works) - index))
            result["rows"].append(measurer.row(work, names, share))
            after_row(finished(result, rooflines))
        left = begin + sampling.set_seconds - time.monotonic()
        rooflines += filter(None, [find_roofline()] if rooflines and left > once_more else [])
        result["interrupted"] = False
    except KeyboardInterrupt:
        pass
    finally:
        measurer.worker.stop()
    seconds = max(time.monotonic() - begin, 1e-9)
    load = (environment.background_cpu_seconds() - before) / seconds
    result["others"] = round(max(0.0, load), 2)
    return finished(result, rooflines)


def add_memory(result: dict, device: str) -> None:
    """row["memory"], peak bytes of torch.nn's and our step, in each training row that has times."""
    for name in (TORCH, OURS):
        with Worker(environment.RETURN_MEMORY) as worker:
            for row in result["rows"]:
                work = Workload(**row["workload"])
                if work.training and "timing" in row["providers"].get(name, {}):
                    found = worker.call(measure.row_memory, work, name, device)
                    row.setdefault("memory", {})[name] = found
