"""Tensors compared with torch.nn's and with a float64 oracle's, each by the table of tolerances."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lstm_fused.testing import tolerance
from lstm_fused.testing.tolerance import error_of as max_error

__all__ = ["Verdict", "compare", "max_error", "model_row", "worst"]


@dataclass(frozen=True)
class Verdict:
    """One tensor: largest absolute errors against float64, and what is allowed."""

    tensor: str
    error: float
    allowed: float
    baseline_error: float

    @property
    def ok(self) -> bool:
        """Infinite errors, of NaN or of another shape, are never allowed."""
        return self.error <= self.allowed < math.inf


def compare(
    found: Mapping[str, Tensor | None],
    baseline: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    row_of: Callable[[str], str] = str,
) -> list[Verdict]:
    """The verdict on each tensor of exact, the oracle's; all three are dicts of tensors by name.

    row_of: from a tensor's name to the row of the table of tolerances.
    """
    verdicts = []
    for name, truth in exact.items():
        largest = truth.abs().max().item() if truth.numel() else 0.0
        baseline_error = max_error(baseline[name], truth)
        allowed = tolerance.allowed(row_of(name), baseline[name].dtype, baseline_error, largest)
        verdicts.append(Verdict(name, max_error(found[name], truth), allowed, baseline_error))
    return verdicts


def model_row(name: str) -> str:
    """row_of for whole models: outputs as an LSTM's, "d NAME", gradients, by what NAME is."""
    if not name.startswith("d "):
        return "y"
    if name.startswith("d input"):
        return "d_x"
    return "d_bias" if "bias" in name.rpartition(".")[2] else "d_weight"


def worst(verdicts: list[Verdict]) -> Verdict:
    """The one that goes furthest over, or comes closest to, what it is allowed."""
    tiny = torch.finfo(torch.float64).tiny
    return max(verdicts, key=lambda v: v.error / max(v.allowed, tiny))
