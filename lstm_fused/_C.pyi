"""Calls past torch's dispatcher: csrc/torch/module.cpp, inference.cpp, eager.cpp and stream.cpp."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

def infer(
    names: Sequence[str],
    params: Mapping[str, Tensor | None],
    x: Any,
    hx: Any,
    cell: int,
    directions: int,
    layers: int,
    hidden_size: int,
    proj_size: int,
    batch_first: bool,
    /,
) -> Any: ...

class Stream:
    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor: ...
    def _prepare(
        self,
        names: list[str],
        params: dict[str, Any],
        h: Tensor,
        c: Tensor | None,
        cell: int,
        inputs: int,
        threads: int,
        hidden_size: int = 0,
        proj_size: int = 0,
    ) -> None: ...
    def c_step(self) -> tuple[int, int]: ...
    def _copy_read(self) -> int: ...

def forward(
    x: Tensor,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    state0: Sequence[Tensor],
    weights: Sequence[Tensor],
    cell: int,
    directions: int,
    cell_states: bool,
    save_every: int,
    /,
) -> tuple[Tensor | None, ...] | None: ...
def backward(
    x: Tensor,
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    state0: Sequence[Tensor],
    weights: Sequence[Tensor],
    y: Tensor,
    gates: Tensor,
    saved_states: Tensor,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    cell: int,
    directions: int,
    save_every: int,
    mask: Sequence[bool],
    /,
) -> tuple[Tensor | None, ...] | None: ...
