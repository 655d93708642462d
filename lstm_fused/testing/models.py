"""What any model computes in a step, by name: for comparing it with another."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

SEED = 1  # of dropout masks, the same for all


class NoGradient(Exception):
    """A training step was asked for of a model without gradients."""


def tensors_in(value: Any, name: str = "out") -> dict[str, torch.Tensor]:
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


class ModelRun:
    """A module with inputs of its own: a tuple of arguments, or a dict of keyword arguments."""

    def __init__(
        self, module: torch.nn.Module, inputs: tuple[Any, ...] | Mapping[str, Any]
    ) -> None:
        self.module, self.inputs = module, inputs
        found = tensors_in(inputs, "input")
        self.leaves = {name: t for name, t in found.items() if t.requires_grad}

    def call(self) -> Any:
        if isinstance(self.inputs, Mapping):
            return self.module(**self.inputs)
        return self.module(*self.inputs)

    def step(self, mode: str) -> Any:
        """ "forward": a call without gradients; "training": a call, sum and backward."""
        if mode == "forward":
            with torch.no_grad():
                return self.call()
        for leaf in (*self.module.parameters(), *self.leaves.values()):
            leaf.grad = None
        out = self.call()
        found = [t for t in tensors_in(out).values() if t.requires_grad]
        if not found:
            raise NoGradient("no output of the model needs a gradient")
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
