"""is_grads_batched of torch.autograd.grad: an older vmap that uses no operator's vmap rule."""

from functools import partial

import torch
from torch.utils._pytree import tree_leaves, tree_map


def level_of(*grads):
    """How many vmaps of is_grads_batched the gradients are inside of, 0 outside.

    Of the gradients themselves: torch's own count is not known to the thread that autograd has for
    a CUDA device.
    """
    level = 0
    grads = [g for g in grads if g is not None]
    while any(map(torch._C._functorch.is_legacy_batchedtensor, grads)):
        level += 1
        grads = [torch._remove_batch_dim(g, level, 1, 0) for g in grads]
    return level


def each_example(run, level, *args):
    """run once per example under is_grads_batched of torch.autograd.grad.

    Only outside of run's autograd.Function can its results be differentiated again.
    """
    if level == 0:
        return run(*args)

    def bare(a):  # (B, *shape), or (1, *shape) if a is not batched at this level
        return torch._remove_batch_dim(a, level, 1, 0) if isinstance(a, torch.Tensor) else a

    def example(k, a):
        return a.select(0, k % a.shape[0]) if isinstance(a, torch.Tensor) else a

    def joined(*ts):
        return None if ts[0] is None else torch._add_batch_dim(torch.stack(ts), 0, level)

    args = tree_map(bare, args)
    count = max(a.shape[0] for a in tree_leaves(args) if isinstance(a, torch.Tensor))
    results = [
        each_example(run, level - 1, *tree_map(partial(example, k), args)) for k in range(count)
    ]
    return tree_map(joined, *results)
