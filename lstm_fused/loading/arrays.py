"""Arrays of other libraries as the weights of a module of ours."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def tensor(array: Any) -> Any:
    """A copy on the CPU of an array of numpy's or a tensor; None for None."""
    if array is None or isinstance(array, Tensor):
        return array if array is None else array.detach().cpu().clone()
    return torch.tensor(array)


def gates(array: Tensor, order: Sequence[int], dim: int = -1) -> Tensor:
    """array with its blocks of gates along dim in this order: block order[k] becomes block k."""
    blocks = array.chunk(len(order), dim)
    return torch.cat([blocks[k] for k in order], dim)


def suffixes(layers: int, directions: int) -> list[str]:
    """What the names of a module's weights end with, in the order of the weights."""
    return [f"_l{k}{'_reverse' if d else ''}" for k in range(layers) for d in range(directions)]


def fill(module: Any, parts: Sequence[Mapping[str, Tensor | None]]) -> Any:
    """module with the weights of parts: by name without suffix, of each layer and direction.

    A bias that is None is zeros. Raises ValueError for a weight of another shape.
    """
    directions = 2 if module.bidirectional else 1
    with torch.no_grad():
        for suffix, part in zip(suffixes(module.num_layers, directions), parts, strict=True):
            for name, value in part.items():
                own = getattr(module, name + suffix)
                if value is None:
                    own.zero_()
                    continue
                if value.shape != own.shape:
                    raise ValueError(
                        f"{name} must have shape {tuple(own.shape)}, got {tuple(value.shape)}"
                    )
                own.copy_(value)
    return module
