"""Calls of several models: every tensor but batch_sizes has a first dimension of models.

One call runs models of the same sizes and options with weights of their own, as an ensemble does.
"""

import torch
from torch.utils._pytree import tree_map


def several(weights):
    """Whether weights have a dimension of models; w_hh, the second, is (G * H, R) without one."""
    return weights[1].dim() == 3


def each(run, x, batch_sizes, *args):
    """run(x, batch_sizes, *args) of one model after the other, its results stacked.

    args and results: trees of tensors; an empty one stands for none and has no dimension of models.
    """

    def of(m, t):
        return t[m] if isinstance(t, torch.Tensor) and t.numel() + t.dim() > 1 else t

    found = [
        run(x[m], batch_sizes, *tree_map(lambda t, m=m: of(m, t), args)) for m in range(x.shape[0])
    ]
    return tree_map(lambda *ts: torch.stack(ts) if ts[0].shape != (0,) else ts[0], *found)
