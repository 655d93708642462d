"""recurrent_backward_samples: the backward pass with a gradient of each weight for every sample.

The recurrence runs once for all rows. The gradients of the pre-activations that it leaves, times
each sample's own inputs and states, are the gradients of the weights.

Sizes as in `ops`. Rows are (n, sample), the sample innermost; K rows of all steps to a sample.
"""

import torch

from lstm_fused import models
from lstm_fused.cuda import CELLS
from lstm_fused.operators import backward_op, library, run_directly


def run(x, batch_sizes, state0, weights, y, *rest):
    """As recurrent_backward, every gradient of a weight with a first dimension of samples.

    y is needed for the gradient of w_hh. Weights may be those of several models, no projections.
    """
    if models.several(weights):
        return models.each(run, x, batch_sizes, state0, weights, y, *rest)
    *saved_and_d_out, cell, directions, mask, samples = rest
    each = len(weights) // directions
    if each % 2:
        raise RuntimeError("recurrent_backward_samples has no gradient of a projection")
    only_rows = [*mask[:3], *[False] * len(weights), True]
    dx, dh0, dc0, _, d_preacts = run_directly(
        backward_op,
        x,
        batch_sizes,
        state0,
        weights,
        y,
        *saved_and_d_out,
        cell,
        directions,
        only_rows,
    )
    part = _Products(x, batch_sizes, state0, y, d_preacts, CELLS[cell], directions, samples)
    dweights = [
        part.gradient(*divmod(k, each)).to(x.dtype) if want else x.new_empty(0)
        for k, want in enumerate(mask[3:-1])
    ]
    return dx, dh0, dc0, dweights, x.new_empty(0)


class _Products:
    """The gradients of the weights, each a product over the K rows of a sample."""

    def __init__(self, x, batch_sizes, state0, y, d_preacts, cell, directions, samples):
        self.x, self.batch_sizes, self.state0, self.y = x, batch_sizes, state0, y
        self.d_preacts, self.D, self.samples = d_preacts, directions, samples
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
        if of_input:
            factor = self.x.reshape(-1, self.x.shape[-1])
        else:
            factor = states_before(self.x, self.batch_sizes, self.state0, self.y, d, self.D)
        return part.mT @ self._by_sample(factor.to(self.compute))

    def _by_sample(self, rows):
        """(S, width) as (samples, K, width)."""
        return rows.unflatten(0, (-1, self.samples)).transpose(0, 1)


def states_before(x, batch_sizes, state0, y, d, directions):
    """h before each row's step in direction d, (S, R), of y (T, N, D * R) or (S, D * R)."""
    width = y.shape[-1] // directions
    y = y.reshape(-1, directions, width)[:, d]
    sizes = [x.shape[1]] * x.shape[0] if batch_sizes is None else batch_sizes.tolist()
    padding = -sizes.pop() if sizes[-1] < 0 else 0  # rows of no step, csrc/layer.h
    y = y[: y.shape[0] - padding]
    h0 = state0[0][d] if state0 else y.new_zeros(sizes[0], width)
    steps = y.split(sizes)
    if d == 0:
        before = [h0]
        before += [step[:rows] for step, rows in zip(steps, sizes[1:], strict=False)]
    else:
        before = [
            torch.cat((steps[t + 1], h0[sizes[t + 1] : sizes[t]])) for t in range(len(sizes) - 1)
        ]
        before.append(h0[: sizes[-1]])
    return torch.cat((*before, y.new_zeros(padding, width)))


def register():
    """Register `run` as the operator's kernel, on every device."""
    library.impl("recurrent_backward_samples", run, "CompositeExplicitAutograd")
