"""The inputs of several steps side by side, for every form of input; see QRNN.

Sizes: T steps, N rows, I inputs, S rows of packed data or of documents.
"""

import torch


def of(x, batch_sizes, resets, count, directions):
    """x with the inputs of the count - 1 steps before each, the oldest first, in front of it.

    With two directions the inputs of the count - 1 steps after it follow behind it. Zeros stand for
    steps that a row does not have, or that a reset separates.

    x, batch_sizes, resets: as ops.layer or padded.layer takes them. Returns (..., count * I), or
    (..., (2 * count - 1) * I) with two directions.
    """
    if count == 1:
        return x
    at = _neighbours(x, batch_sizes)
    anew = None if resets is None else resets.bool()
    before, after, parts = x, x, [x]
    for _ in range(count - 1):
        before = _earlier(before, at, anew)
        parts.insert(0, before)
        if directions == 2:
            after = _later(after, at, anew)
            parts.append(after)
    return torch.cat(parts, dim=-1)


def _neighbours(x, batch_sizes):
    """None for dense x (T, N, I), whose lengths end rows; else for rows (S, I) of x the indices
    (S,) of the step before and of that after, S where there is none."""
    if batch_sizes is None:
        return None
    if x.dim() == 3:  # lengths (N,)
        steps = torch.arange(len(x), device=x.device).unsqueeze(1)
        return (steps < batch_sizes.to(x.device)).unsqueeze(2)
    S = len(x)
    s = torch.arange(S)
    if batch_sizes.dim() == 2:  # (1, N + 1), where each document begins
        document = torch.searchsorted(batch_sizes[0, 1:].contiguous(), s, right=True)
        first = batch_sizes[0][document] == s
        last = batch_sizes[0][document + 1] == s + 1
        before, after = s - 1, s + 1
    else:
        ends = batch_sizes.cumsum(0)
        t = torch.searchsorted(ends, s, right=True)
        row = s - (ends - batch_sizes)[t]
        first = t == 0
        before = s - batch_sizes[(t - 1).clamp(min=0)]
        later = batch_sizes[(t + 1).clamp(max=len(batch_sizes) - 1)]
        last = (t + 1 == len(batch_sizes)) | (row >= later)
        after = s + batch_sizes[t]
    none = torch.full_like(s, S)
    pairs = (first, before), (last, after)
    return tuple(torch.where(gone, none, place).to(x.device) for gone, place in pairs)


def _earlier(x, at, anew):
    """x of the step before; anew: where a row begins anew before a step, or None."""
    if x.dim() == 3:
        moved = torch.cat((torch.zeros_like(x[:1]), x[:-1]))
    else:
        moved = _with_zeros(x).index_select(0, at[0])
    return moved if anew is None else torch.where(anew, 0, moved)


def _later(x, at, anew):
    """x of the step after."""
    if x.dim() == 3:
        x = x if at is None else torch.where(at, x, 0)
        moved = torch.cat((x[1:], torch.zeros_like(x[:1])))
        if anew is None:
            return moved
        return torch.where(torch.cat((anew[1:], torch.zeros_like(anew[:1]))), 0, moved)
    moved = _with_zeros(x).index_select(0, at[1])
    if anew is None:
        return moved
    return torch.where(_with_zeros(anew).index_select(0, at[1]), 0, moved)


def _with_zeros(x):
    """x (S, I) with a row of zeros behind it."""
    return torch.cat((x, torch.zeros_like(x[:1])))
