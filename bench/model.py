"""A user's own model, before and after lstm_fused.replace: parity, speed and memory."""

import copy
import functools
import runpy
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import lstm_fused
from bench import environment, measure, run, timing
from bench.cases import OURS, TORCH, Workload
from bench.isolated import Lost, Worker
from bench.timing import Sampling
from lstm_fused.testing import parity
from lstm_fused.testing.models import ModelRun, NoGradient
from lstm_fused.testing.oracle import in_float64, map_tensors

SAMPLING = Sampling(rounds=31, seconds=0.05, row_seconds=10.0, attempts=3)


class ModelError(Exception):
    """The model cannot be measured; the message says why in one line."""


@dataclass(frozen=True)
class Model:
    """What the user's factory returned, on a device."""

    module: torch.nn.Module
    inputs: tuple | dict

    def run(self, provider: str) -> ModelRun:
        """An unchanged copy (TORCH), with our modules (OURS) or in float64 ("float64")."""
        if provider == "float64":
            return ModelRun(in_float64(self.module), in_float64(self.inputs))
        module = copy.deepcopy(self.module)
        module = lstm_fused.replace(module) if provider == OURS else module
        return ModelRun(module, map_tensors(self.inputs, torch.clone))

    def replaced(self) -> list[str]:
        """The names of the modules that lstm_fused.replace changes."""
        fused = dict(self.run(OURS).module.named_modules())
        modules = self.module.named_modules()
        return [n or "the model" for n, m in modules if type(m) is not type(fused[n])]


def load(spec: str, device: str = "cpu") -> Model:
    """path.py:factory, where factory() returns (module, inputs).

    inputs: a tensor, a tuple of arguments or a dict of keyword arguments. Raises ModelError.
    """
    name, _, factory = spec.rpartition(":")
    if not name or not Path(name).is_file():
        raise ModelError(f"no such file: {name or spec} (path.py:factory is asked for)")
    sys.path.insert(0, str(Path(name).resolve().parent))
    torch.manual_seed(0)
    try:
        made = runpy.run_path(name, run_name=Path(name).stem)[factory]()
    except Exception as error:  # the user's code may raise anything
        raise ModelError(f"{spec}: {type(error).__name__}: {error}".split("\n")[0]) from error
    if not (isinstance(made, (tuple, list)) and len(made) == 2):
        raise ModelError(f"{spec} must return (module, inputs), got {type(made).__name__}")
    module, inputs = made
    if not isinstance(module, torch.nn.Module):
        raise ModelError(f"{spec} must return a torch.nn.Module, got {type(module).__name__}")
    if not isinstance(inputs, Mapping):
        inputs = tuple(inputs) if type(inputs) in (tuple, list) else (inputs,)
    return Model(module.to(device), map_tensors(inputs, lambda t: t.to(device)))


def judge(model: Model, mode: str) -> dict:
    """An entry of a results file: parity, wrong, or unjudged with the reason."""
    before, after = (model.run(provider).results(mode) for provider in (TORCH, OURS))
    if before.keys() != after.keys():
        raise ModelError(f"other outputs or gradients: {sorted(before.keys() ^ after.keys())}")
    try:
        exact = model.run("float64").results(mode)
        exact = {name: exact[name].double() for name in before}
        verdicts = parity.compare(after, before, exact, parity.model_row)
    except Exception as error:
        apart = max(parity.max_error(after[n], before[n].double()) for n in before)
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        return {"unjudged": f"does not run in float64 ({reason}); both are {apart:.1e} apart"}
    verdict = parity.worst(verdicts)
    return {"parity" if verdict.ok else "wrong": {"tensors": len(verdicts)} | asdict(verdict)}


def measure_mode(model: Model, mode: str, device: str) -> dict[str, dict]:
    """The entries of both, with times unless the verdict is red."""
    entries = {TORCH: {}, OURS: judge(model, mode)}
    if "wrong" not in entries[OURS]:
        steps = {}
        for provider in entries:
            each = model.run(provider)
            each.module.train(mode == "training")
            steps[provider] = functools.partial(each.step, mode)
        for provider, found in timing.time_steps(steps, SAMPLING, device).items():
            entries[provider]["timing"] = found
    return entries


def step_memory(spec: str, provider: str, device: str) -> int:
    """Peak bytes of the second training step: no smaller input to warm up with is known."""
    each = load(spec, device).run(provider)
    each.step("training")
    each.module.zero_grad(set_to_none=True)
    return measure.peak_bytes(lambda: each.step("training"), device)


def memory_of(spec: str, device: str) -> dict[str, int]:
    """Peak bytes of a training step of both, empty after a line where that is not known."""
    found = {}
    for provider in (TORCH, OURS):
        with Worker(environment.RETURN_MEMORY) as worker:
            try:
                found[provider] = worker.call(step_memory, spec, provider, device)
            except Lost as lost:
                print(f"without memory: {lost}", file=sys.stderr)
                return {}
    return found


def measure_model(spec: str, device: str) -> dict:
    """A results file of the model's forward and training row; ModelError where it cannot run."""
    model, rows = load(spec, device), []
    names = model.replaced()
    if not names:
        raise ModelError(f"{spec}: the model holds no module that lstm_fused replaces")
    for mode in ("forward", "training"):
        row = {"workload": asdict(Workload(mode, 0, 0, 0, 0, mode=mode, group=spec))}
        row["providers"] = {TORCH: {}, OURS: {}}
        rows.append(row)
        try:
            row["providers"] = measure_mode(model, mode, device)
        except (ModelError, NoGradient) as error:
            row["absent"] = f"{mode}: {error}"
    if "timing" in rows[1]["providers"][OURS]:
        rows[1]["memory"] = memory_of(spec, device)
    facts = {"set": "model", "replaced": names, "providers": [TORCH, OURS], "rows": rows}
    fixed = {"schema": run.SCHEMA, "others": 0.0, "interrupted": False}
    return fixed | {"machine": environment.describe(device)} | facts


def verdict_line(row: dict) -> str:
    mode, entry = row["workload"]["mode"], row["providers"][OURS]
    if "absent" in row:
        return f"not measured, {row['absent']}"
    if "unjudged" in entry:
        return f"{mode}: NOT JUDGED, it {entry['unjudged']}"
    found = entry.get("parity") or entry["wrong"]
    verb = "agree" if "parity" in entry else "DISAGREE"
    return (
        f"{mode}: {found['tensors']} tensors {verb}; worst is {found['tensor']}, off by "
        f"{found['error']:.1e} of {found['allowed']:.1e} allowed, {TORCH} by "
        f"{found['baseline_error']:.1e}"
    )


def lines(result: dict) -> list[str]:
    """What was replaced and how it was judged, for people."""
    spec = result["rows"][0]["workload"]["group"]
    found = [f"{spec}: replaced {', '.join(result['replaced'])}"]
    return [*found, *map(verdict_line, result["rows"])]
