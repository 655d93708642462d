"""What a call of a layer has beside its input and states: from the user's form to the operator's.

Sizes: T steps, N rows, I inputs, R recurrent width, S rows of packed data or of documents, L
layers, D directions.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lstm_fused import by_reference, checkpointing, errors, ops, padded


class Given(NamedTuple):
    """The options as the user gives them, but for the layout of the input."""

    resets: Tensor | PackedSequence | None = None
    reset_state: Any = None
    cell_states: bool = False
    checkpoint_every: int | str | None = None
    layer: Callable[..., Any] | None = None  # in place of ops.layer


class Options(NamedTuple):
    """The options of every layer of a call.

    resets: uint8, 1 where a row begins anew, shaped as x but for a last dimension of 1.
    """

    resets: Tensor | None
    cell_states: bool
    checkpoint_every: int | str | None
    layer: Callable[..., Any] | None


def from_call(
    module,
    lengths,
    *,
    resets=None,
    reset_state=None,
    return_cell_states=False,
    cu_seqlens=None,
    max_seqlen=None,
    checkpoint_every=None,
):
    """The Given of a call, None if it gives nothing, and (cu_seqlens, max_seqlen) or None."""
    states = bool(return_cell_states)
    errors.check_together(
        *(module, resets, reset_state, states, cu_seqlens, max_seqlen, lengths),
    )
    errors.check_checkpoint_every(checkpoint_every)
    given = Given(resets, reset_state, states, checkpoint_every)
    if cu_seqlens is not None:
        return given, (cu_seqlens, max_seqlen)
    nothing = resets is None and not states and checkpoint_every is None
    return None if nothing else given, None


def keywords(given):
    """given as the keyword arguments of a call."""
    if given is None:
        return {}
    resets, reset_state, cell_states, checkpoint_every, _ = given
    options = {
        "resets": resets,
        "reset_state": reset_state,
        "return_cell_states": cell_states,
        "checkpoint_every": checkpoint_every,
    }
    return {name: value for name, value in options.items() if value is not None}


def prepared(module, given, x, state, rows, resets, order=None):
    """The states with those that resets put in behind them, and the Options.

    x: the data as the operator takes it; state: () or each (L*D, rows, width) in the operator's
    order, which is the user's unless `order` permutes it; resets: bool, shaped as x without its
    last dimension, or None.
    """
    if resets is not None:
        resets = resets.to(torch.uint8).unsqueeze(-1)
        state = _with_reset_state(module, given.reset_state, x, state, rows, order)
    return state, Options(resets, given.cell_states, given.checkpoint_every, given.layer)


def _with_reset_state(module, reset_state, x, state, rows, order):
    if reset_state is None:
        reset_state = module._learned_state()
        if reset_state is None:
            return state
    reset = errors.check_reset_state(module, reset_state, rows)
    reset = module._as_state(reset[0] if len(reset) == 1 else reset)
    if order is not None:
        reset = [s.index_select(1, order) for s in reset]
    if not torch.is_autocast_enabled(x.device.type):
        errors.check_state_kind(x, reset, "reset_state")
        if state:
            errors.check_state_kind(x, state)
    initial = state or [x.new_zeros(s.shape) for s in reset]
    return tuple(torch.cat(pair, dim=1) for pair in zip(initial, reset, strict=True))


def dense_resets(resets, x, dims, batch_first):
    """resets of an input of dims dimensions as (T, N), where x is (T, N, I); None for None."""
    if resets is None:
        return None
    T, N, _ = x.shape
    if dims == 2:
        errors.check_resets(resets, (T,), "(T,)", x.device)
        return resets.unsqueeze(1)
    if batch_first:
        errors.check_resets(resets, (N, T), "(N, T)", x.device)
        return resets.t()
    errors.check_resets(resets, (T, N), "(T, N)", x.device)
    return resets


def packed_resets(resets, packed, rows, batch_first):
    """resets (S,) of a PackedSequence, in the order of its data; None for None.

    resets: a PackedSequence as packed is, or padded, (T, rows) in the order before packing, or
    (rows, T) with batch_first.
    """
    if resets is None:
        return None
    x, batch_sizes, sorted_indices, _ = packed
    if isinstance(resets, PackedSequence):
        errors.check_resets(resets.data, x.shape[:1], "(S,) as data", x.device)
        if not _packed_alike(resets, packed):
            raise ValueError(
                "resets must be packed as input is, got other lengths or another order"
            )
        return resets.data
    T = batch_sizes.shape[0]
    shape, axes = ((rows, T), "(N, T)") if batch_first else ((T, rows), "(T, N)")
    errors.check_resets(resets, shape, axes, x.device)
    resets = resets.t() if batch_first else resets
    if sorted_indices is not None:
        resets = resets.index_select(1, sorted_indices)
    # Row s of the data is step t of row n, and batch_sizes[t] rows have a step t.
    ends = batch_sizes.cumsum(0)
    s = torch.arange(x.shape[0], device=batch_sizes.device)
    t = torch.searchsorted(ends, s, right=True)
    at = t * rows + s - (ends - batch_sizes)[t]
    return resets.flatten().index_select(0, at.to(x.device))


def _packed_alike(a, b):
    if torch.compiler.is_compiling():
        return True
    same = a.batch_sizes is b.batch_sizes or torch.equal(a.batch_sizes, b.batch_sizes)
    orders = a.sorted_indices, b.sorted_indices
    if orders[0] is None or orders[1] is None:
        return same and orders[0] is orders[1]
    return same and (orders[0] is orders[1] or torch.equal(*orders))


def arguments(module, options, x, batch_sizes):
    """The function that runs each layer of x, and the keyword arguments that all layers have.

    x, batch_sizes: as Recurrent._run has them; options: its Options, or None, where only the
    module's checkpoint_every is to be heeded.
    """
    every = module.checkpoint_every
    layer = padded.layer if batch_sizes is not None and x.dim() == 3 else ops.layer
    more = {}
    if options is not None:
        if options.checkpoint_every is not None:
            every = options.checkpoint_every
        layer = options.layer or layer
        if options.resets is not None:
            more["resets"] = options.resets
    H, R = module.hidden_size, module.proj_size or module.hidden_size
    if every is not None and x.dim() == 3 and module._cell() in ops.CELLS:
        more["save_every"] = checkpointing.interval(every, module._cell(), *x.shape[:2], H, R)
    else:
        errors.check_checkpoint_every(every)
    return layer, more


def for_fallback(module, x, reason, given):
    """given for a call that the kernels do not run, for a reason: its layers by the reference.

    None where torch.nn's own forward gives what was asked for, which it never does for a cell that
    torch.nn does not have. x: the input's data.
    """
    if module._torch_class is None:
        by_reference.announce(module, x, reason)
        return (given or Given())._replace(layer=by_reference.layer)
    every = module.checkpoint_every
    if given is not None:
        every = given.checkpoint_every or every
    if given is None or (given.resets is None and not given.cell_states):
        if every is None or not torch.is_grad_enabled():
            return None  # only the memory of backward would differ
        given = Given(checkpoint_every=every)
    by_reference.announce(module, x, reason)
    return given._replace(layer=by_reference.layer)
