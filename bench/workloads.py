"""What a measurement is, as plain data; the sets of them are in sets.py."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

# "tf32" is float32 whose products a GPU may round to TF32; a CPU computes it as float32.
DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
MODES = ("forward", "training", "step")
CELLS = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN"}  # and torch.nn's name of each
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1}


@dataclass(frozen=True)
class Workload:
    """One row: T, N, I, H are time, batch, input and hidden size; proj is 0 for no projection.

    mode: "forward" without gradients; "training", forward, sum and backward, the gradient of the
    input included; "step", a call a time step (T = 1) with the state carried from call to call.
    goals: at least this many times a provider's speed, by the provider's name.
    """

    name: str
    T: int
    N: int
    I: int  # noqa: E741 - the input size is I everywhere
    H: int
    cell: str = "lstm"
    layers: int = 1
    directions: int = 1
    proj: int = 0
    bias: bool = True
    batch_first: bool = False
    dropout: float = 0.0
    lengths: str = "full"  # "full", or "half": packed, spread evenly from T to T/2
    dtype: str = "float32"
    mode: str = "forward"
    goals: Mapping[str, float] = field(default_factory=dict, hash=False)
    step_us: float = 0.0  # a goal too: microseconds of a time step at most, 0 for none
    group: str = ""  # the heading this row is shown under; empty: regime() finds one
    source: str = ""  # who published the shape

    @property
    def training(self) -> bool:
        return self.mode == "training"

    @property
    def R(self) -> int:
        """Width of the recurrence: of h and of each direction's output."""
        return self.proj or self.H


def lengths_of(work: Workload) -> list[int]:
    """The length of each batch row, longest first."""
    if work.lengths == "full":
        return [work.T] * work.N
    return torch.linspace(work.T, work.T // 2, work.N).round().long().tolist()


def batch_sizes_of(work: Workload) -> list[int]:
    """How many rows each of the T steps has."""
    if work.lengths == "full":
        return [work.N] * work.T
    lengths = lengths_of(work)
    return [sum(length > t for length in lengths) for t in range(work.T)]


def regime(work: Workload) -> str:
    """The heading a row belongs under: what decides its speed more than its exact size does."""
    if work.group:
        return work.group
    plain = work.layers == work.directions == 1 and not (work.proj or work.batch_first)
    if work.cell != "lstm":
        return "GRU and RNN"
    if work.T == 1:
        return "one step"
    if work.lengths != "full":
        return "variable length"
    if work.dtype not in ("float32", "tf32"):
        return "other dtypes"
    if not plain or not work.bias:
        return "layers, directions, projection"
    if work.training:
        return "training"
    if work.N == 1:
        return "forward, batch 1"
    return "forward, batch 2 to 8" if work.N <= 8 else "forward, batch above 8"
