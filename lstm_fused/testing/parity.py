"""The gate before the clock: a provider that is wrong gets no time."""

import math
from dataclasses import dataclass

import torch

from lstm_fused.testing import tolerance
from lstm_fused.testing.tolerance import error_of as max_error

__all__ = ["Verdict", "compare", "max_error", "worst"]


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


def compare(found: dict, baseline: dict, exact: dict, row_of=str) -> list[Verdict]:
    """Each tensor by the tests' own rule; row_of gives the name their table knows it by."""
    verdicts = []
    for name, truth in exact.items():
        largest = truth.abs().max().item() if truth.numel() else 0.0
        baseline_error = max_error(baseline[name], truth)
        allowed = tolerance.allowed(row_of(name), baseline[name].dtype, baseline_error, largest)
        verdicts.append(Verdict(name, max_error(found[name], truth), allowed, baseline_error))
    return verdicts


def worst(verdicts: list[Verdict]) -> Verdict:
    """The one that goes furthest over, or comes closest to, what it is allowed."""
    tiny = torch.finfo(torch.float64).tiny
    return max(verdicts, key=lambda v: v.error / max(v.allowed, tiny))
