"""A layer over a padded batch with lengths, in a graph: no shape depends on the lengths' values.

``lstm(x, lengths=lengths)`` packs its input in eager mode, and how many rows that gives depends on
the values, which torch.compile and torch.export do not know. Here the steps of all rows are moved
to the front of T * N + 1 rows, the padding behind them, and the operator runs the steps that the
batch sizes count.

Sizes: T steps, N rows, I inputs, H hidden units, R recurrent width, D directions.
"""

import torch

from lstm_fused import ops
from lstm_fused.export import state_or_zeros
from lstm_fused.operators import forward_op, library, padded_op


def layer(
    x,
    lengths,
    state0,
    weights,
    cell="lstm",
    directions=1,
    *,
    resets=None,
    cell_states=False,
    save_every=1,
):
    """``ops.layer`` of x (T, N, I) whose row n holds lengths[n] steps, then padding.

    lengths: (N,), int64, from 0 to T in any order. Returns y (T, N, D * R), zero in the padding,
    and the final states, each row's at its own end; a row of length 0 keeps its initial state.
    With cell_states (T, N, D * H) behind them, zero in the padding. save_every is of no effect, as
    for packed data.
    """
    number = ops.CELLS[cell]["id"]
    # An exported program keeps the operator, which ONNX export needs. A compiled graph must not
    # keep it: the compiler's cache outlives this version of the decomposition.
    compiled = torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()
    run = _padded if compiled else padded_op
    tensors = x, lengths, resets, list(state0), list(weights)
    y, h_n, c_n = run(*tensors, number, directions, cell_states)
    if ops.CELLS[cell]["carry"] != "cell":
        return y, (h_n,)
    if not cell_states:
        return y, (h_n, c_n)
    width = directions * weights[1].shape[-1]
    return y[..., :width], (h_n, c_n), y[..., width:]


@torch.library.impl(library, "recurrent_padded", "CompositeImplicitAutograd")
def _padded(x, lengths, resets, state0, weights, cell, directions, cell_states):
    T, N, _ = x.shape
    lengths = lengths.to("cpu", torch.int64)
    torch._assert_async(
        ((lengths >= 0) & (lengths <= T)).all(),
        "lengths must be from 0 to the input's length",
    )
    # A row without a step is run for one, of zeros, so that the first step has all rows; the result
    # is dropped.
    began = (lengths > 0).to(x.device).unsqueeze(1)
    x = torch.where(began, x, 0)
    # Given explicitly, so that the operator's results have N rows, which batch_sizes cannot show.
    state0 = state_or_zeros(x, None, state0, weights, cell, directions)
    initial = [s[:, :N] for s in state0]
    steps_of = lengths.clamp(min=1)
    order = steps_of.argsort(descending=True)
    alive = torch.arange(T, device="cpu").unsqueeze(1) < steps_of[order]  # (T, N), sorted rows
    flat = alive.flatten()
    total = flat.sum(0, keepdim=True)
    # The last entry counts the padding behind the packed data, negative: csrc/layer.h. One row more
    # than there is, so that it is never 0.
    batch_sizes = torch.cat((alive.sum(1), total - (T * N + 1)))
    # Packed data holds the active rows step by step; (t, n) becomes row at[t * N + n] of it.
    at = torch.where(flat, flat.cumsum(0), total + (~flat).cumsum(0)) - 1
    at = at.view(T, N)[:, order.argsort()].flatten()
    source = torch.cat((at.argsort(), at.new_zeros(1))).to(x.device)
    rows = x.flatten(0, 1).index_select(0, source)
    anew = None if resets is None else resets.flatten(0, 1).index_select(0, source)
    order, back, at = order.to(x.device), order.argsort().to(x.device), at.to(x.device)
    start = [torch.where(began, s, 0).index_select(1, order) for s in initial]
    if resets is not None:
        # Of 2 * N rows of a state the last N are those that resets put in.
        start = [
            torch.cat((s, given[:, N:].index_select(1, order)), 1) if given.shape[1] > N else s
            for s, given in zip(start, state0, strict=True)
        ]
    y, *ends, _, _ = forward_op(
        rows,
        batch_sizes,
        anew,
        start,
        weights,
        cell,
        directions,
        cell_states,
        0,
    )
    y = y.index_select(0, at).unflatten(0, (T, N)).masked_fill(~began, 0)
    ends = [
        torch.where(began, end.index_select(1, back), first)
        for end, first in zip(ends, initial, strict=False)
    ]
    return y, *(*ends, x.new_empty(0))[:2]
