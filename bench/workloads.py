"""What is measured, as plain data: a new measurement is one more row in a set."""

from dataclasses import dataclass

import torch

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Workload:
    """One row: T, N, I, H are time, batch, input and hidden size; proj is 0 for no projection."""

    name: str
    T: int
    N: int
    I: int  # noqa: E741 - the input size is I everywhere
    H: int
    layers: int = 1
    bidirectional: bool = False
    proj: int = 0
    lengths: str = "full"  # "full", or "half": packed, spread evenly from T to T/2
    state: bool = False  # hx is given, as in streaming
    dtype: str = "float32"
    mode: str = "forward"  # or "training": forward, sum and backward, x.requires_grad
    goal: float | None = None  # at least this many times nn.LSTM's speed

    @property
    def training(self) -> bool:
        return self.mode == "training"


def both_modes(name, forward_goal, training_goal, **sizes):
    """The forward row and the training row of one shape."""
    return (
        Workload(f"{name} forward", mode="forward", goal=forward_goal, **sizes),
        Workload(f"{name} training", mode="training", goal=training_goal, **sizes),
    )


CPU = (
    *both_modes("B1 H256", 1.3, 1.5, T=100, N=1, I=256, H=256),
    *both_modes("B8 H256", 1.1, 1.1, T=100, N=8, I=256, H=256),
    *both_modes("B32 H256", 1.0, 1.1, T=100, N=32, I=256, H=256),
    *both_modes("packed B32 H256", 2.0, 3.0, T=100, N=32, I=256, H=256, lengths="half"),
    Workload("T1 B1 H64 forward", T=1, N=1, I=64, H=64, state=True, goal=5.0),
    Workload("T1 B1 H256 forward", T=1, N=1, I=256, H=256, state=True, goal=5.0),
    Workload("float64 B32 H256 forward", T=100, N=32, I=256, H=256, dtype="float64", goal=1.5),
)

QUICK = (
    *both_modes("B4 H64", None, None, T=32, N=4, I=64, H=64),
    *both_modes("packed B8 H64", None, None, T=32, N=8, I=64, H=64, lengths="half"),
    Workload("T1 B1 H64 forward", T=1, N=1, I=64, H=64, state=True),
    Workload("B4 H64 2 layers both directions", 32, 4, 64, 64, layers=2, bidirectional=True),
    Workload("B4 H64 projection 32", T=32, N=4, I=64, H=64, proj=32),
)

SETS = {"quick": QUICK, "cpu": CPU}
