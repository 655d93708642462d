"""One recurrent layer as a differentiable function.

`layer` calls the operator `lstm_fused::recurrent_forward`, in eager mode past its Autograd kernel.
Sizes: T steps, N rows, I inputs, H hidden units, R recurrent width (the projection's size, or H),
D directions, S rows of packed data.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, overload

import torch
from torch import Tensor

from lstm_fused import (
    _plan,
    autograd,
    batching,
    cuda,
    fakes,  # noqa: F401
    layer_weights,
    samples,
    tangents,
)
from lstm_fused.export import state_or_zeros
from lstm_fused.observed import is_captured, is_transformed
from lstm_fused.operators import forward_op
from lstm_fused.reference_derivatives import Layer

CELLS = _plan.cells()  # by name: id, gates, preacts, carry, ...; csrc/cells/cells.h
_IDS = {name: cell["id"] for name, cell in CELLS.items()}

cuda.load()
autograd.register()
batching.register()
samples.register()
tangents.register()


@overload
def layer(
    x: Tensor,
    batch_sizes: Tensor | None,
    state0: Sequence[Tensor],
    weights: Sequence[Tensor],
    cell: str = "lstm",
    directions: int = 1,
    *,
    resets: Tensor | None = None,
    cell_states: Literal[False] = False,
    save_every: int = 1,
) -> tuple[Tensor, tuple[Tensor, ...]]: ...
@overload
def layer(
    x: Tensor,
    batch_sizes: Tensor | None,
    state0: Sequence[Tensor],
    weights: Sequence[Tensor],
    cell: str = "lstm",
    directions: int = 1,
    *,
    resets: Tensor | None = None,
    cell_states: Literal[True],
    save_every: int = 1,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]: ...
def layer(
    x: Tensor,
    batch_sizes: Tensor | None,
    state0: Sequence[Tensor],
    weights: Sequence[Tensor],
    cell: str = "lstm",
    directions: int = 1,
    *,
    resets: Tensor | None = None,
    cell_states: bool = False,
    save_every: int = 1,
) -> Any:
    """Run one layer of a recurrent network in one or two directions.

    Args:
        x: (T, N, I), any strides; or (S, I), the data of a PackedSequence or the rows of N
            documents one after the other.
        batch_sizes: None, or the PackedSequence's (T,), int64 on the CPU, never growing. Of
            documents (1, N + 1), int64 on the CPU: where each begins, then S.
        state0: () for zeros, or (h0 (D, N, R),), with c0 (D, N, H) after it for "lstm". With
            resets, a state may have 2 * N rows: the initial states, then those that resets put in,
            which are zeros otherwise.
        weights: for each direction w_ih (G*H, I), w_hh (G*H, R), then b_ih (G*H,) and b_hh (G*H,)
            if there are biases, then w_hr (R, H) if there is a projection (of cells with a cell
            state); flat, as a sequence. G, the gates, are 4 of "lstm", 3 of "gru" and 1 of
            "rnn_tanh" and "rnn_relu". Of a described cell, its parameters of a unit (vectors, H)
            and its masks, as x with masks * H for I and without a gradient, follow if it has any;
            and w_hh may be (G*H, H / heads), for units that see the hidden units of their head
            alone, in whole blocks of 16, or (G*H, 0), for none.
        cell: a name of ``_plan.cells()``: "lstm", "gru", "rnn_tanh", "rnn_relu", or a described
            cell, whose cell states, if several, are side by side in c0 and c_n (D, N, cells * H).
        directions: 1, or 2: the second runs from the last step to the first.
        resets: None, or x's shape with 1 for I, uint8: 1 where a row begins anew before that step.
            The second direction begins anew after it.
        cell_states: whether the cell states of all steps are returned too, of "lstm" only.
        save_every: 1, or how many steps lie between two states that are kept for backward, which
            computes the steps between them again. Packed data and documents keep every step.

    Returns:
        y (T, N, D * R) or (S, D * R), and the final states (h_n (D, N, R),), with c_n (D, N, H)
        after it for "lstm". With cell_states, a third: (T, N, D * H) or (S, D * H).

    Everything is of one dtype, float32, float64, bfloat16 or float16, and on the CPU or one CUDA
    device. Gradients of any order are given. Raises RuntimeError on shapes, dtypes or devices that
    do not fit.
    """
    if not state0 and torch.compiler.is_exporting():
        # As torch.nn's layers do: AOTInductor's runtime, for one, takes no empty list of tensors.
        state0 = state_or_zeros(x, batch_sizes, (), weights, _IDS[cell], directions)
    args = x, batch_sizes, resets, state0, weights, _IDS[cell], directions, cell_states
    if is_captured() or is_transformed():
        # Whether anything is saved is known to the operator's Autograd kernel, how often is not.
        y, *ends, _, _ = forward_op(*args, 0 if save_every == 1 else save_every)
    elif torch.is_grad_enabled() and any([t.requires_grad for t in (*weights, x, *state0)]):
        call = _call(_IDS[cell], directions, len(state0), cell_states, save_every)
        y, *ends = autograd.record(None, call, x, batch_sizes, resets, *state0, *weights)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            y, *ends, _, _ = forward_op(*args, 0)
    if CELLS[cell]["carry"] != "cell":
        return y, (ends[0],)
    if not cell_states:
        return y, tuple(ends)
    _, width = layer_weights.widths(CELLS[cell], weights, directions)
    width *= directions
    return y[..., :width], tuple(ends), y[..., width:]


def step(x: Tensor, state0: Sequence[Tensor], weights: Sequence[Tensor], cell: str) -> Any:
    """One step of a single-step cell whose gradient is recorded, in eager mode.

    x (N, I) or (I,); state0: () for zeros, or each state (N, H) or (H,); weights: w_ih, w_hh, then
    b_ih and b_hh if there are biases; as `inference.infer_step` found them fit. Returns the states
    after the step, a tensor if the cell has one state, else a tuple.
    """
    call = _call(_IDS[cell], 1, len(state0), False, 1)
    return autograd.record_step(call, x, *state0, *weights)


@cache
def _call(cell, directions, states, cell_states, save_every):
    return Layer(cell, directions, states, cell_states, save_every)
