"""A user's own model, before and after lstm_fused.replace: parity, speed and memory, and what each
of its recurrent modules gains."""

import contextlib
import functools
import inspect
import math
import runpy
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import lstm_fused
from bench import environment, isolated, measure, run, timing
from bench.cases import OURS, TORCH, Workload
from bench.isolated import Lost, Worker
from bench.timing import Sampling
from lstm_fused.testing import parity
from lstm_fused.testing.models import ModelRun, NoGradient, tensors_in
from lstm_fused.testing.oracle import by_reference, copy_of, in_float64, map_tensors

SAMPLING = Sampling(rounds=31, seconds=0.02, row_seconds=10.0, attempts=2, set_seconds=40.0)
MODES = ("forward", "training")
RECURRENT = (torch.nn.RNNBase, torch.nn.RNNCellBase)
UNRELATED = 0.25  # an output that is off by this part of its largest value is not float64's
VANISHING = 1e-12  # a gradient below this part of the largest one is 0 but for rounding


class ModelError(Exception):
    """The model cannot be measured; the message says why in one line."""


@dataclass(frozen=True)
class Model:
    """What the user's factory returned, on a device.

    exact: what computes in float64 what the module does, where a copy of it in float64 does not.
    replace: what brings our modules into it, lstm_fused.replace if None.
    """

    module: torch.nn.Module
    inputs: tuple | dict
    exact: torch.nn.Module | None = None
    replace: Callable | None = None

    def run(self, provider: str) -> ModelRun:
        """An unchanged copy (TORCH), with our modules (OURS) or in float64 ("float64")."""
        if provider == "float64":
            exact = in_float64(self.exact or self.module)
            if any(p.dtype is torch.float64 for p in self.module.parameters()):
                by_reference(exact)  # the copy would only repeat what is judged
            return ModelRun(exact, in_float64(self.inputs))
        module = copy_of(self.module)
        module = (self.replace or lstm_fused.replace)(module) if provider == OURS else module
        return ModelRun(module, map_tensors(self.inputs, torch.clone))

    def replaced(self) -> list[str]:
        """The names of the modules that lstm_fused.replace changes."""
        fused = dict(self.run(OURS).module.named_modules())
        modules = self.module.named_modules()
        return [n or "the model" for n, m in modules if type(m) is not type(fused[n])]


def arguments(inputs) -> tuple | dict:
    """A tensor, a tuple of arguments or a dict of keyword arguments, as ModelRun takes them."""
    if isinstance(inputs, Mapping):
        return inputs
    return tuple(inputs) if type(inputs) in (tuple, list) else (inputs,)


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
    return Model(module.to(device), map_tensors(arguments(inputs), lambda t: t.to(device)))


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def exact_results(model: Model, mode: str, before: dict) -> dict[str, torch.Tensor]:
    """In float64 what `before` holds, without the gradients that are zero but for rounding."""
    with default_dtype(torch.float64):  # for tensors that the model makes on its way
        found = model.run("float64").results(mode)
    found = {name: found[name].double() for name in before}
    largest = {name: t.abs().max().item() if t.numel() else 0.0 for name, t in found.items()}
    gradients = {name: size for name, size in largest.items() if name.startswith("d ")}
    for name in largest.keys() - gradients.keys():
        if parity.max_error(before[name], found[name]) > UNRELATED * largest[name]:
            raise ModelError(f"{name} differs, as random numbers do that are drawn in float64")
    least = VANISHING * max(gradients.values(), default=0.0)
    return {name: t for name, t in found.items() if gradients.get(name, math.inf) > least}


def judge(model: Model, mode: str) -> dict[str, dict]:
    """Entries of a results file: failed, and ours parity, wrong, or unjudged with the reason."""
    entries, found = {TORCH: {}, OURS: {}}, {}
    for provider, entry in entries.items():
        try:
            found[provider] = model.run(provider).results(mode)
        except NoGradient:
            raise
        except Exception as error:
            entry["failed"] = f"{type(error).__name__}: {error}".split("\n")[0]
    if OURS not in found:
        return entries
    if TORCH not in found:
        entries[OURS]["unjudged"] = f"has nothing to be judged by: {TORCH} failed"
        return entries
    before, after = found[TORCH], found[OURS]
    if before.keys() != after.keys():
        raise ModelError(f"other outputs or gradients: {sorted(before.keys() ^ after.keys())}")
    try:
        verdicts = parity.compare(
            after, before, exact_results(model, mode, before), parity.model_row
        )
    except Exception as error:
        apart = max(parity.max_error(after[n], before[n].double()) for n in before)
        reason = str(error) if isinstance(error, ModelError) else f"{type(error).__name__}: {error}"
        reason = reason.split("\n")[0]
        words = f"does not run in float64 ({reason}); both are {apart:.1e} apart"
        entries[OURS]["unjudged"] = words
        return entries
    verdict = parity.worst(verdicts)
    kind = "parity" if verdict.ok else "wrong"
    entries[OURS][kind] = {"tensors": len(verdicts)} | asdict(verdict)
    return entries


def timed(model: Model, mode: str, providers, sampling: Sampling, device: str) -> dict[str, dict]:
    """By provider the timing of a step of the mode."""
    steps = {}
    for provider in providers:
        each = model.run(provider)
        each.module.train(mode == "training")
        steps[provider] = functools.partial(each.step, mode)
    return timing.time_steps(steps, sampling, device, isolated.trying)


def measure_mode(model: Model, mode: str, sampling: Sampling, device: str, **facts) -> dict:
    """A row: the entries of both, with times unless the verdict is red. facts: of its Workload."""
    work = Workload(**{"name": mode, "mode": mode, "group": ""} | dict(T=0, N=0, I=0, H=0) | facts)
    row = {"workload": asdict(work), "providers": {TORCH: {}, OURS: {}}}
    try:
        entries = row["providers"] = judge(model, mode)
        if "wrong" not in entries[OURS]:
            sound = [name for name, entry in entries.items() if "failed" not in entry]
            for name, found in timed(model, mode, sound, sampling, device).items():
                entries[name]["timing"] = found
    except (ModelError, NoGradient) as error:
        row["absent"] = f"{mode}: {error}"
    return row


@dataclass
class Called:
    """A recurrent module as a step calls it: by which arguments first, how often; names: of it and
    of those that are called alike."""

    model: Model
    names: list[str]
    calls: int = 0


def recorded(model: Model, mode: str) -> list[Called]:
    """The recurrent modules that a step of torch.nn's calls."""
    each, seen, hooks = model.run(TORCH), {}, []

    def note(name, module, args, kwargs):
        if name not in seen:
            bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
            inputs = map_tensors(bound.args[1:], torch.clone)
            seen[name] = Called(Model(module, inputs), [name or "the model"])
        seen[name].calls += 1

    for name, module in each.module.named_modules():
        if isinstance(module, RECURRENT):
            hook = functools.partial(note, name)
            hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    each.module.train(mode == "training")
    try:
        each.step(mode)
    except NoGradient:
        return []
    finally:
        for hook in hooks:
            hook.remove()
    alike = {}
    for call in seen.values():
        shapes = {n: tuple(t.shape) for n, t in tensors_in(call.model.inputs).items()}
        key = (repr(call.model.module), repr(shapes), call.calls)
        if key in alike:
            alike[key].names += call.names
        else:
            alike[key] = call
    return list(alike.values())


def measure_module(call: Called, mode: str, sampling: Sampling, device: str) -> dict:
    """A row: one call of the module, and in words what ours runs."""
    others = f" and {len(call.names) - 1} like it" * (len(call.names) > 1)
    name = f"{call.names[0]}{others} {mode}"
    group = "one call of each recurrent module"
    work = Workload(name, 0, 0, 0, 0, mode=mode, group=group)
    found = timed(call.model, mode, (TORCH, OURS), sampling, device)
    each = call.model.run(OURS)
    with torch.set_grad_enabled(mode == "training"):
        kernels = str(lstm_fused.explain(each.module, *each.inputs))
    return {
        "workload": asdict(work),
        "providers": {provider: {"timing": t} for provider, t in found.items()},
        "calls": call.calls,
        "explained": kernels,
    }


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


def measure_model(spec: str, device: str, seconds: float | None = None) -> dict:
    """A results file: the model's forward and training row, then those of its recurrent modules.

    seconds: what the rows take about. Raises ModelError where the model cannot run.
    """
    model, rows = load(spec, device), []
    names = model.replaced()
    if not names:
        raise ModelError(f"{spec}: the model holds no module that lstm_fused replaces")
    begin, total = time.monotonic(), seconds or SAMPLING.set_seconds
    modes = {mode: recorded(model, mode) for mode in MODES}
    turns = [(mode, None) for mode in MODES]
    turns += [(mode, call) for mode, calls in modes.items() for call in calls]
    for k, (mode, call) in enumerate(turns):
        share = SAMPLING.within((begin + total - time.monotonic()) / (len(turns) - k))
        if not call:
            rows.append(measure_mode(model, mode, share, device, group=spec))
        elif "timing" in rows[MODES.index(mode)]["providers"][OURS]:
            rows.append(measure_module(call, mode, share, device))
    if "timing" in rows[1]["providers"][OURS]:
        rows[1]["memory"] = memory_of(spec, device)
    facts = {"set": "model", "replaced": names, "providers": [TORCH, OURS], "rows": rows}
    fixed = {"schema": run.SCHEMA, "others": 0.0, "interrupted": False}
    return fixed | {"machine": environment.describe(device)} | facts


def verdict_line(row: dict) -> str:
    mode, entry = row["workload"]["mode"], row["providers"][OURS]
    if "absent" in row:
        return f"not measured, {row['absent']}"
    if "failed" in entry:
        return f"{mode}: FAILED, {entry['failed']}"
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
    """What was replaced, how it was judged, and which kernels run, for people."""
    rows = result["rows"]
    found = [f"{rows[0]['workload']['group']}: replaced {', '.join(result['replaced'])}"]
    found += [verdict_line(row) for row in rows if "explained" not in row]
    modules = {r["workload"]["name"].rpartition(" ")[0]: r for r in rows if "explained" in r}
    for name, row in modules.items():  # the last mode of each
        calls = f", called {row['calls']} times" * (row["calls"] > 1)
        found += [f"{name}{calls}:", *("  " + line for line in row["explained"].splitlines())]
    return found
