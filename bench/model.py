"""A user's own model, before and after lstm_fused.replace: parity, speed and memory."""

import copy
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path

import torch
from torch.nn.utils.rnn import PackedSequence

import lstm_fused
from bench import machine, memory, report, timing
from bench.timing import Effort
from lstm_fused.testing import parity

BEFORE, AFTER = "torch.nn", "lstm_fused"
EFFORT = Effort(rounds=31, seconds=0.05, row_seconds=10.0, attempts=3)
SEED = 1  # of dropout masks, the same for all


class ModelError(Exception):
    """The model cannot be measured; the message says why in one line."""


def tensors_in(value, name: str = "out") -> dict[str, torch.Tensor]:
    """Every floating-point tensor of a nested value, by where it was found."""
    if isinstance(value, PackedSequence):
        value = value.data
    if isinstance(value, torch.Tensor):
        return {name: value} if value.is_floating_point() else {}
    if isinstance(value, Mapping):
        parts = [(f"{name}[{key!r}]", part) for key, part in value.items()]
    elif isinstance(value, (tuple, list)):
        parts = [(f"{name}[{k}]", part) for k, part in enumerate(value)]
    elif is_dataclass(value) and not isinstance(value, type):
        parts = [(f"{name}.{f.name}", getattr(value, f.name)) for f in fields(value)]
    else:
        return {}
    return {key: t for where, part in parts for key, t in tensors_in(part, where).items()}


def mapped(value, change):
    """A nested value with change(tensor) for each tensor; leaves stay leaves."""
    if isinstance(value, PackedSequence):
        return PackedSequence(mapped(value.data, change), *value[1:])
    if isinstance(value, torch.Tensor):
        return change(value).detach().requires_grad_(value.requires_grad)
    if isinstance(value, Mapping):
        return {key: mapped(part, change) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [mapped(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


class Copy:
    """A module with inputs of its own."""

    def __init__(self, module, inputs):
        self.module = module
        self.inputs = inputs
        self.leaves = {
            name: t for name, t in tensors_in(inputs, "input").items() if t.requires_grad
        }

    def call(self):
        if isinstance(self.inputs, Mapping):
            return self.module(**self.inputs)
        return self.module(*self.inputs)

    def step(self, mode: str):
        """ "forward": a call without gradients; "training": a call, sum and backward."""
        if mode == "forward":
            with torch.no_grad():
                return self.call()
        self.module.zero_grad(set_to_none=True)
        for leaf in self.leaves.values():
            leaf.grad = None
        out = self.call()
        found = [t for t in tensors_in(out).values() if t.requires_grad]
        if not found:
            raise ModelError("no output of the model needs a gradient")
        wide = torch.promote_types(found[0].dtype, torch.float32)
        torch.stack([t.sum(dtype=wide) for t in found]).sum().backward()
        return out

    def results(self, mode: str) -> dict[str, torch.Tensor]:
        """Outputs, and in training every gradient, with the dropout masks of one seed."""
        self.module.train(mode == "training")
        torch.manual_seed(SEED)
        found = tensors_in(self.step(mode))
        if mode == "training":
            leaves = self.leaves | dict(self.module.named_parameters())
            found |= {f"d {n}": t.grad for n, t in leaves.items() if t.grad is not None}
        return {name: t.detach().clone() for name, t in found.items()}


@dataclass(frozen=True)
class Subject:
    """What the user's factory returned, on a device."""

    spec: str
    module: torch.nn.Module
    inputs: tuple | dict

    def original(self) -> Copy:
        return Copy(copy.deepcopy(self.module), mapped(self.inputs, torch.clone))

    def fused(self) -> Copy:
        module = lstm_fused.replace(copy.deepcopy(self.module))
        return Copy(module, mapped(self.inputs, torch.clone))

    def exact(self) -> Copy:
        """The original in float64, its floating-point inputs too."""
        module = copy.deepcopy(self.module).double()
        return Copy(module, mapped(self.inputs, widened))

    def replaced(self) -> list[str]:
        """The names of the modules that lstm_fused.replace changes."""
        fused = dict(lstm_fused.replace(copy.deepcopy(self.module)).named_modules())
        originals = self.module.named_modules()
        return [n or "the model" for n, m in originals if type(m) is not type(fused[n])]


def widened(tensor):
    return tensor.double() if tensor.is_floating_point() else tensor.clone()


def load(spec: str, device: str = "cpu") -> Subject:
    """path.py:factory, where factory() returns (module, inputs).

    inputs: a tensor, a tuple of arguments or a dict of keyword arguments. Raises ModelError.
    """
    name, _, factory = spec.rpartition(":")
    path = Path(name)
    if not name or not path.is_file():
        raise ModelError(f"no such file: {name or spec} (path.py:factory is asked for)")
    sys.path.insert(0, str(path.resolve().parent))
    found = importlib.util.spec_from_file_location(path.stem, path)
    if found is None:
        raise ModelError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(found)
    sys.modules[path.stem] = module
    torch.manual_seed(0)
    try:
        found.loader.exec_module(module)
        made = getattr(module, factory)()
    except Exception as error:  # the user's code may raise anything
        raise ModelError(f"{spec}: {type(error).__name__}: {error}".split("\n")[0]) from error
    if not (isinstance(made, (tuple, list)) and len(made) == 2):
        raise ModelError(f"{spec} must return (module, inputs), got {type(made).__name__}")
    model, inputs = made
    if not isinstance(model, torch.nn.Module):
        raise ModelError(f"{spec} must return a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(inputs, Mapping):
        inputs = tuple(inputs) if type(inputs) in (tuple, list) else (inputs,)
    return Subject(spec, model.to(device), mapped(inputs, lambda t: t.to(device)))


def tolerance_row(name: str) -> str:
    """Outputs are judged as an LSTM's are, gradients by what they belong to."""
    if not name.startswith("d "):
        return "y"
    if name.startswith("d input"):
        return "d_x"
    return "d_bias" if "bias" in name.rpartition(".")[2] else "d_weight"


def judge(subject: Subject, mode: str) -> dict:
    """parity, wrong, or unjudged with the reason and how far apart the two are."""
    before, after = (c.results(mode) for c in (subject.original(), subject.fused()))
    if before.keys() != after.keys():
        raise ModelError(f"other outputs or gradients: {sorted(before.keys() ^ after.keys())}")
    try:
        exact = subject.exact().results(mode)
        verdicts = parity.compare(
            after, before, {n: exact[n].double() for n in before}, tolerance_row
        )
    except Exception as error:
        apart = max(parity.max_error(after[n], before[n].double()) for n in before)
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        return {"unjudged": f"does not run in float64 ({reason})", "apart": apart}
    verdict = parity.worst(verdicts)
    found = {"tensors": len(verdicts)} | asdict(verdict)
    return {"parity" if verdict.ok else "wrong": found}


def measure_mode(subject: Subject, mode: str, effort: Effort, device: str, part) -> dict:
    """One row: the verdict, then both times unless the verdict is red."""
    row = judge(subject, mode)
    if "wrong" in row:
        return row
    copies = {BEFORE: subject.original(), AFTER: subject.fused()}
    for each in copies.values():
        each.module.train(mode == "training")
    steps = {name: lambda each=each: each.step(mode) for name, each in copies.items()}
    clock = timing.clock_for(device)
    found = timing.quietest(
        lambda: timing.interleaved(steps, effort, clock, lambda done, of: part(done / of)),
        effort.attempts,
    )
    row["timing"] = {n: {**asdict(t), "noisy": t.noisy} for n, t in found.items()}
    return row


def measure(spec: str, device: str, display, effort: Effort | None = None) -> dict:
    """Everything about the user's model; ModelError where it cannot be run."""
    subject = load(str(spec), device)
    names = subject.replaced()
    if not names:
        raise ModelError(f"{spec}: the model holds no module that lstm_fused replaces")
    result = {"model": spec, "machine": machine.describe(device), "replaced": names, "rows": {}}
    for index, mode in enumerate(("forward", "training")):
        display.row(index, mode)
        try:
            result["rows"][mode] = measure_mode(
                subject, mode, effort or EFFORT, device, display.part
            )
        except ModelError as error:
            result["rows"][mode] = {"skipped": str(error)}
    if "timing" in result["rows"]["training"]:
        result["rows"]["training"]["memory"] = peaks(spec, device, result)
    return result


def peaks(spec: str, device: str, result: dict) -> dict[str, int]:
    """Peak bytes of a training step of both, empty after a line where that is not known."""
    path, _, factory = spec.rpartition(":")
    task = {"model": f"{Path(path).resolve()}:{factory}", "device": device}
    task["threads"] = result["machine"]["threads"]
    try:
        return {n: memory.ask(task | {"fused": n == AFTER})["model"] for n in (BEFORE, AFTER)}
    except memory.NotMeasured as error:
        print(f"without memory: {error}", file=sys.stderr)
        return {}


def verdict_line(mode: str, row: dict) -> str:
    if "skipped" in row:
        return f"{mode}: not measured, {row['skipped']}"
    if "unjudged" in row:
        return f"{mode}: NOT JUDGED, it {row['unjudged']}; both are {row['apart']:.1e} apart"
    found = row.get("parity") or row["wrong"]
    word = "agree" if "parity" in row else "DISAGREE"
    return (
        f"{mode}: {found['tensors']} tensors {word}; worst is {found['tensor']}, off by "
        f"{found['error']:.1e} of {found['allowed']:.1e} allowed, {BEFORE} by "
        f"{found['baseline_error']:.1e}"
    )


def lines(result: dict) -> list[str]:
    """What was found, as markdown."""
    found = [f"{result['model']}: replaced {', '.join(result['replaced'])}", ""]
    found += [verdict_line(mode, row) for mode, row in result["rows"].items()]
    found += ["", f"| step | {BEFORE} | {AFTER} | speedup | memory |"]
    found += ["| --- | ---: | ---: | ---: | ---: |"]
    for mode, row in result["rows"].items():
        if "timing" not in row:
            continue
        times = [report.time_cell({"timing": row["timing"][name]}) for name in (BEFORE, AFTER)]
        ratio = row["timing"][BEFORE]["median"] / row["timing"][AFTER]["median"]
        size = report.memory_cell(row)
        found.append(f"| {mode} | {times[0]} | {times[1]} | {ratio:.2f}x | {size} |")
    return found
