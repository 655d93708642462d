"""The float64 oracle: models and inputs in float64, recurrent layers by the naive reference."""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils.rnn import PackedSequence

from lstm_fused import reference

Value = TypeVar("Value")


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A nested value (mappings, sequences, packed sequences) with change(tensor) for each tensor.

    The results are leaves that require gradients where the tensors did. Other values stay.
    """
    if isinstance(value, PackedSequence):
        return PackedSequence(map_tensors(value.data, change), *value[1:])
    if isinstance(value, torch.Tensor):
        return change(value).detach().requires_grad_(value.requires_grad)
    if isinstance(value, Mapping):
        return {key: map_tensors(part, change) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [map_tensors(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def in_float64(value: Value) -> Value:
    """A copy of a module or of a nested value, its floating-point tensors in float64."""
    if isinstance(value, torch.nn.Module):
        return copy.deepcopy(value).double()
    return map_tensors(value, lambda t: t.double() if t.is_floating_point() else t.clone())


class Oracle(torch.nn.Module):
    """A torch.nn.LSTM, GRU or RNN in float64, computed by lstm_fused.reference.

    Called as the module is, with float64 tensors: x (T, N, I), (N, T, I) with batch_first, or a
    PackedSequence; state None, h0 (L*D, N, R), or for an LSTM (h0, c0 (L*D, N, H)). Returns y,
    shaped as the module's, and the final states as a tuple, (L*D, N, R or H) each. Parameters are
    float64 copies under the module's own names, so that their gradients are found there. Dropout
    between layers draws torch's masks.
    """

    def __init__(self, module: torch.nn.RNNBase) -> None:
        super().__init__()
        self.inner = in_float64(module)
        self.layer = reference.CELLS[module.mode.lower()]

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Parameter]]:
        return self.inner.named_parameters(*args, **kwargs)

    def forward(self, x: Any, state: Any = None) -> tuple[Any, tuple[Tensor, ...]]:
        inner, packed = self.inner, isinstance(x, PackedSequence)
        directions = 2 if inner.bidirectional else 1
        transposed = inner.batch_first and not packed
        y, batch_sizes = (x.data, x.batch_sizes) if packed else (x, None)
        y = y.transpose(0, 1) if transposed else y
        states = () if state is None else (state,) if torch.is_tensor(state) else state
        finals = []
        for k in range(inner.num_layers):
            if k and inner.dropout and inner.training:
                y = torch.dropout(y, inner.dropout, True)
            rows = slice(k * directions, (k + 1) * directions)
            weights = [w for row in inner.all_weights[rows] for w in row]
            state0 = tuple(s[rows] for s in states)
            y, final = self.layer(y, batch_sizes, state0, weights, directions)
            finals.append(final)
        y = y.transpose(0, 1) if transposed else y
        states = tuple(torch.cat(parts) for parts in zip(*finals, strict=True))
        return PackedSequence(y, *x[1:]) if packed else y, states
