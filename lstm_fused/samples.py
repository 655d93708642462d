"""recurrent_backward_samples: the backward pass with a gradient of each weight for every sample.

The recurrence runs once for all rows. The gradients of the pre-activations that it leaves, times
each sample's own inputs and states, are the gradients of the weights.

Sizes as in `ops`. Rows are (n, sample), the sample innermost; K rows of all steps to a sample.
"""

from functools import partial

import torch

from lstm_fused import models
from lstm_fused.cuda import CELLS
from lstm_fused.dynamo import untraced
from lstm_fused.operators import backward_op, library, run_directly


def run(x, batch_sizes, resets, state0, weights, y, *rest):
    """As recurrent_backward, every gradient of a weight with a first dimension of samples.

    y is needed for the gradient of w_hh. Weights may be those of several models, no projections.
    """
    if models.several(weights):
        return models.each(run, x, batch_sizes, resets, state0, weights, y, *rest)
    *saved_and_d_out, cell, directions, save_every, mask, samples = rest
    each = len(weights) // directions
    if CELLS[cell]["described"] or each % 2:
        raise RuntimeError("recurrent_backward_samples has no gradient of a projection")
    if batch_sizes is not None and batch_sizes.dim() == 2:
        raise RuntimeError("recurrent_backward_samples takes no documents")
    only_rows = [*mask[:3], *[False] * len(weights), True]
    dx, dh0, dc0, _, d_preacts = run_directly(
        backward_op,
        x,
        batch_sizes,
        resets,
        state0,
        weights,
        y,
        *saved_and_d_out,
        cell,
        directions,
        save_every,
        only_rows,
    )
    H = weights[1].shape[-1]
    before = partial(states_before, x, batch_sizes, resets, state0, y, H)
    part = _Products(x, before, d_preacts, CELLS[cell], samples)
    dweights = [
        part.gradient(*divmod(k, each)).to(x.dtype) if want else x.new_empty(0)
        for k, want in enumerate(mask[3:-1])
    ]
    return dx, dh0, dc0, dweights, x.new_empty(0)


class _Products:
    """The gradients of the weights, each a product over the K rows of a sample."""

    def __init__(self, x, before, d_preacts, cell, samples):
        """before: h before each row's step in a direction, (S, H)."""
        self.x, self.before = x, before
        self.d_preacts, self.samples = d_preacts, samples
        self.compute = torch.float64 if x.dtype is torch.float64 else torch.float32
        self.G, self.input_gates, self.hidden_gates = (
            cell[key] for key in ("gates", "input_gates", "hidden_gates")
        )

    def gradient(self, d, which):
        """(samples, *shape) of a direction's weight: 0 w_ih, 1 w_hh, 2 b_ih, 3 b_hh."""
        d_preacts = self.d_preacts[:, d]  # (S, P, H)
        of_input = which % 2 == 0
        part = d_preacts[:, : self.G] if of_input else d_preacts[:, -self.G :]
        order = self.input_gates if of_input else self.hidden_gates
        if order != sorted(order):
            part = part[:, [order.index(gate) for gate in range(self.G)]]
        part = self._by_sample(part.flatten(1)).to(self.compute)  # (samples, K, G * H)
        if which >= 2:
            return part.sum(1)
        factor = self.x.reshape(-1, self.x.shape[-1]) if of_input else self.before(d)
        return part.mT @ self._by_sample(factor.to(self.compute))

    def _by_sample(self, rows):
        """(S, width) as (samples, K, width)."""
        return rows.unflatten(0, (-1, self.samples)).transpose(0, 1)


def states_before(x, batch_sizes, resets, state0, y, R, d):
    """h before each row's step in direction d, (S, R), of y (T, N, width) or (S, width)."""
    y = y.reshape(-1, y.shape[-1])[:, d * R : (d + 1) * R]
    rows = _rows_of(x, batch_sizes)
    given = state0[0][d] if state0 else y.new_zeros(rows.N, R)
    before = rows.before(y, given[: rows.N], d)
    if resets is None:
        return before
    anew = resets.reshape(-1, 1).bool()
    if d == 1:  # the boundary before step t + 1 is the one that step t comes after
        anew = rows.before(anew, anew.new_zeros(rows.N, 1), d)
    reset = rows.each(given[rows.N :]) if len(given) > rows.N else 0
    return torch.where(anew, reset, before)


def _rows_of(x, batch_sizes):
    if batch_sizes is None:
        return _Steps([x.shape[1]] * x.shape[0])
    if batch_sizes.dim() == 2:
        return _Documents(batch_sizes.tolist()[0])
    sizes = batch_sizes.tolist()
    padding = -sizes.pop() if sizes[-1] < 0 else 0  # rows of no step, csrc/layer.h
    return _Steps(sizes, padding)


class _Steps:
    """The rows of all steps, step by step; sizes: how many each has."""

    def __init__(self, sizes, padding=0):
        self.sizes, self.padding, self.N = sizes, padding, sizes[0]

    def before(self, ts, first, d):
        """The row of ts (S, width) at the step before each one's, first (N, width) at a first."""
        sizes = self.sizes
        steps = ts[: len(ts) - self.padding].split(sizes)
        if d == 0:
            found = [first]
            found += [step[:rows] for step, rows in zip(steps, sizes[1:], strict=False)]
        else:
            found = [
                torch.cat((steps[t + 1], first[sizes[t + 1] : sizes[t]]))
                for t in range(len(sizes) - 1)
            ]
            found.append(first[: sizes[-1]])
        return self._with_padding(found, ts)

    def each(self, ts):
        """ts (N, width) at every step, (S, width)."""
        return self._with_padding([ts[:rows] for rows in self.sizes], ts)

    def _with_padding(self, steps, like):
        return torch.cat((*steps, like.new_zeros(self.padding, like.shape[1])))


class _Documents:
    """The rows of N documents, one after the other; begins: (N + 1,)."""

    def __init__(self, begins):
        self.spans, self.N = list(zip(begins, begins[1:], strict=False)), len(begins) - 1

    def before(self, ts, first, d):
        """As of _Steps."""
        found = []
        for n, (begin, end) in enumerate(self.spans):
            if begin < end:
                own = first[n : n + 1]
                found += [own, ts[begin : end - 1]] if d == 0 else [ts[begin + 1 : end], own]
        return torch.cat(found)

    def each(self, ts):
        """As of _Steps."""
        return torch.cat([ts[n : n + 1].expand(e - b, -1) for n, (b, e) in enumerate(self.spans)])


def register():
    """Register `run` as the operator's kernel, on every device."""
    library.impl("recurrent_backward_samples", untraced(run), "CompositeExplicitAutograd")
