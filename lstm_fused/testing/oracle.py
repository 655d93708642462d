"""The float64 oracle: models and inputs in float64, recurrent layers by the naive reference."""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils.rnn import PackedSequence

from lstm_fused import reference

Value = TypeVar("Value")
Module = TypeVar("Module", bound=torch.nn.Module)


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A nested value (mappings, sequences, packed sequences, dataclasses), its tensors changed.

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
    if is_dataclass(value) and not isinstance(value, type):
        named = {f.name: getattr(value, f.name) for f in fields(value) if f.init}
        return replace(value, **map_tensors(named, change))
    return value


def copy_of(module: Module) -> Module:
    """A deep copy, also of a module whose weights a hook computes, such as weight norm's."""
    for each in module.modules():
        for name, value in vars(each).items():
            if isinstance(value, torch.Tensor) and not value.is_leaf:  # deepcopy refuses these
                vars(each)[name] = value.detach()
    return copy.deepcopy(module)


def in_float64(value: Value) -> Value:
    """A copy of a module or of a nested value, its floating-point tensors in float64."""
    if isinstance(value, torch.nn.Module):
        return copy_of(value).double()
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

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Parameter]]:
        return self.inner.named_parameters(*args, **kwargs)

    def forward(self, x: Any, state: Any = None) -> tuple[Any, tuple[Tensor, ...]]:
        return _by_reference(self.inner, x, state)


def by_reference(model: Module) -> Module:
    """model, in which torch.nn's LSTM, GRU and RNN compute by lstm_fused.reference from now on."""

    def forward(layer: torch.nn.RNNBase, x: Any, hx: Any = None) -> tuple[Any, Any]:
        y, states = _by_reference(layer, x, hx)
        return y, states if len(states) == 2 else states[0]

    for module in model.modules():
        if isinstance(module, torch.nn.RNNBase):
            module.forward = functools.partial(forward, module)
    return model


def _by_reference(layer: torch.nn.RNNBase, x: Any, state: Any) -> tuple[Any, tuple[Tensor, ...]]:
    """What Oracle says, of the layer itself."""
    packed = isinstance(x, PackedSequence)
    directions = 2 if layer.bidirectional else 1
    transposed = layer.batch_first and not packed
    y, batch_sizes = (x.data, x.batch_sizes) if packed else (x, None)
    y = y.transpose(0, 1) if transposed else y
    states = () if state is None else (state,) if torch.is_tensor(state) else state
    finals = []
    for k in range(layer.num_layers):
        if k and layer.dropout and layer.training:
            y = torch.dropout(y, layer.dropout, True)
        rows = slice(k * directions, (k + 1) * directions)
        weights = [w for row in layer.all_weights[rows] for w in row]
        state0 = tuple(s[rows] for s in states)
        cell = reference.CELLS[layer.mode.lower()]
        y, final = cell(y, batch_sizes, state0, weights, directions)
        finals.append(final)
    y = y.transpose(0, 1) if transposed else y
    states = tuple(torch.cat(parts) for parts in zip(*finals, strict=True))
    return PackedSequence(y, *x[1:]) if packed else y, states
