"""The states of a recurrent layer outside of its call: to begin with, to choose from, to cut off.

A state is what a call takes as hx and returns: ``(h, c)`` of an LSTM, ``h`` of a GRU or RNN, each
(L*D, N, width); the states of single-step cells, (N, width), serve as well. Sizes: N rows, H
``hidden_size``, R ``proj_size`` or else H, L ``num_layers``, D 2 if ``bidirectional`` else 1.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

S = TypeVar("S", Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor])


def select_state(state: S, rows: Tensor | Sequence[int]) -> S:
    """The state of some rows, in a new order, with repeats if there are: for beam search.

    Args:
        state: ``(h, c)`` or ``h``, each (L*D, N, width).
        rows: (M,), integers from 0 to N - 1: which row becomes row m.

    Returns:
        The state of M rows.

    Raises:
        TypeError: state is neither a tensor nor a tuple of tensors.
        IndexError, RuntimeError: a row is not from 0 to N - 1.
    """
    tensors = tensors_of(state)
    at = torch.as_tensor(rows, device=tensors[0].device)
    return _mapped(lambda s: s.index_select(-2, at), state)


def where_state(mask: Tensor, state: S, other: S | None = None) -> S:
    """state where mask is True and other elsewhere: for environments that end at their own time.

    Args:
        mask: (N,), bool.
        state: ``(h, c)`` or ``h``, each (L*D, N, width).
        other: as state, or (L*D, width) each for all rows; zeros if left out.

    Returns:
        A state as state is.

    Raises:
        TypeError: mask is not a bool tensor, or a state neither a tensor nor a tuple of tensors.
        ValueError: mask has another shape than (N,).
    """
    tensors = tensors_of(state)
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool Tensor (N,), got {got}")
    if mask.shape != tensors[0].shape[-2:-1]:
        raise ValueError(
            f"mask must have shape ({tensors[0].shape[-2]},), a value a row, "
            f"got {tuple(mask.shape)}"
        )
    column = mask.unsqueeze(1)
    if other is None:
        return _mapped(lambda s: torch.where(column, s, 0), state)

    def choose(s, o):
        return torch.where(column, s, o.unsqueeze(-2) if o.dim() < s.dim() else o)

    return _mapped(choose, state, other)


def detach_state(state: S) -> S:
    """The state without its history, so that backward ends there."""
    return _mapped(Tensor.detach, state)


def batch_first_state(state: S) -> S:
    """The state with the axes of layers and rows exchanged: (L*D, N, width) as (N, L*D, width).

    A second call gives the first form back. The result is a view. A TensorDict, a replay buffer and
    ``torch.utils.data`` want the rows first; a call takes the form (L*D, N, width).
    """
    return _mapped(lambda s: s.transpose(-3, -2), state)


def truncated_bptt(
    module: torch.nn.RNNBase,
    input: Tensor,
    steps: int,
    hx: Any = None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    resets: Tensor | None = None,
    **options: Any,
) -> Iterator[tuple[Any, ...]]:
    """A layer over a long sequence by chunks of ``steps`` steps, the state carried and detached.

    Truncated backpropagation through time: a loss of each chunk reaches back to the chunk's begin::

        for output, state in lstm_fused.truncated_bptt(lstm, x, 100):
            loss(output).backward()

    Args:
        module: an LSTM, GRU or RNN in one direction, with any other option.
        input: (T, N, I), or (N, T, I) if ``batch_first``, or (T, I) for one sequence.
        steps: the length of a chunk, at least 1. The last may be shorter.
        hx: the state to begin with, as the module takes it.
        lengths, resets: as the module takes them, for the whole input; cut as the input is.
        options: further keyword arguments of each call, such as ``reset_state``.

    Yields:
        What the module returns of each chunk, ``(output, state)``. The next chunk begins with that
        state, detached.

    Raises:
        TypeError: module is no such layer, or input is no tensor.
        ValueError: the module is bidirectional, steps is less than 1, or input is not 2-D or 3-D.
    """
    if not isinstance(module, torch.nn.RNNBase):
        raise TypeError(f"module must be an LSTM, GRU or RNN, got {type(module).__name__}")
    if module.bidirectional:
        raise ValueError("module must have one direction: the reverse one begins at the last step")
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a Tensor, got {type(input).__name__}")
    if input.dim() not in (2, 3):
        raise ValueError(f"input must be 2-D or 3-D, got {input.dim()}-D")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an int of at least 1, got {steps!r}")
    given: dict[str, Any] = dict(options)
    if lengths is not None:
        given["lengths"] = torch.as_tensor(lengths)
    if resets is not None:
        given["resets"] = resets
    return _chunks(module, input, steps, hx, given)


def _chunks(module, input, steps, state, given):
    time = 1 if module.batch_first and input.dim() == 3 else 0
    lengths, resets = given.get("lengths"), given.get("resets")
    for begin in range(0, input.shape[time], steps):
        count = min(steps, input.shape[time] - begin)
        more = dict(given)
        if lengths is not None:
            more["lengths"] = (lengths - begin).clamp(0, count)
        if resets is not None:
            more["resets"] = resets.narrow(time, begin, count)
        found = module(input.narrow(time, begin, count), state, **more)
        yield found
        state = detach_state(found[1])


def add_learned(module):
    """Give a new module parameters for its initial state, zeros at first."""
    layers = module.num_layers * (2 if module.bidirectional else 1)
    names = module._state_names
    like = module._weights()[0]
    for name, width in zip(names, module._state_widths(), strict=True):
        setattr(module, name, torch.nn.Parameter(like.new_zeros(layers, width)))
    module._learned = names


def reset_learned(module):
    for name in module._learned:
        torch.nn.init.zeros_(getattr(module, name))


def initial(module, rows):
    """What Recurrent.init_state returns."""
    learned = module._learned_state()
    if learned is not None:
        if rows is None:
            return learned
        return _mapped(lambda s: s.unsqueeze(1).expand(-1, rows, -1).contiguous(), learned)
    layers = module.num_layers * (2 if module.bidirectional else 1)
    weights, batch = module._weights(), () if rows is None else (rows,)
    dtype = module._input_dtype(weights)
    zeros = tuple(
        weights[0].new_zeros(layers, *batch, width, dtype=dtype) for width in module._state_widths()
    )
    return zeros[0] if len(zeros) == 1 else zeros


def for_call(module, input, cu_seqlens):
    """The learned initial state for a call without hx; None for an input that does not fit."""
    if isinstance(input, PackedSequence):
        order = input.sorted_indices
        return initial(module, int(input.batch_sizes[0]) if order is None else order.shape[0])
    if not isinstance(input, Tensor) or input.dim() not in (2, 3):
        return None
    if cu_seqlens is not None:
        fits = isinstance(cu_seqlens, Tensor) and cu_seqlens.dim() == 1 and len(cu_seqlens) > 1
        return initial(module, len(cu_seqlens) - 1) if fits else None
    if input.dim() == 2:
        return initial(module, None)
    return initial(module, input.shape[0 if module.batch_first else 1])


def tensors_of(state):
    tensors = (state,) if isinstance(state, Tensor) else state
    fits = isinstance(tensors, (tuple, list)) and all(isinstance(s, Tensor) for s in tensors)
    if not fits or not tensors:
        raise TypeError(f"state must be a Tensor or a tuple of them, got {type(state).__name__}")
    return tensors


def _mapped(change: Callable[..., Tensor], *states: Any) -> Any:
    """change of the tensors of states, in the form of the first."""
    found = tuple(change(*each) for each in zip(*map(tensors_of, states), strict=True))
    return found[0] if isinstance(states[0], Tensor) else found
