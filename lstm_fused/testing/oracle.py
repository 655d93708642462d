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
    """A torch.nn.LSTM, GRU or RNN, or one of ours, in float64, computed by lstm_fused.reference.

    Called as the module is, with float64 tensors: x (T, N, I), (N, T, I) with batch_first, (T, I),
    or a PackedSequence; state None, h0 (L*D, N, R), or for an LSTM (h0, c0 (L*D, N, H)). The
    options are those of our modules' calls: ``lengths``, ``resets``, ``reset_state``,
    ``cu_seqlens`` and ``return_cell_states``. Returns y, shaped as the module's, the final states
    as a tuple, (L*D, N, R or H) each, and the cell states if they are asked for. Parameters are
    float64 copies under the module's own names, so that their gradients are found there. Dropout
    between layers draws torch's masks.
    """

    def __init__(self, module: torch.nn.RNNBase) -> None:
        super().__init__()
        self.inner = in_float64(module)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Parameter]]:
        return self.inner.named_parameters(*args, **kwargs)

    def forward(self, x: Any, state: Any = None, **options: Any) -> tuple[Any, ...]:
        return _by_reference(self.inner, x, state, **options)


def by_reference(model: Module) -> Module:
    """model, in which LSTM, GRU and RNN, torch.nn's or ours, compute by lstm_fused.reference."""

    def forward(
        layer: torch.nn.RNNBase, input: Any, hx: Any = None, **options: Any
    ) -> tuple[Any, ...]:
        y, states, *cells = _by_reference(layer, input, hx, **options)
        return y, states if len(states) == 2 else states[0], *cells

    for module in model.modules():
        if isinstance(module, torch.nn.RNNBase):
            module.forward = functools.partial(forward, module)
    return model


def _by_reference(
    layer: torch.nn.RNNBase,
    x: Any,
    state: Any,
    lengths: Any = None,
    *,
    resets: Any = None,
    reset_state: Any = None,
    return_cell_states: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Any, ...]:
    """What Oracle says, of the layer itself."""
    rows = _rows_of(layer, x, lengths, cu_seqlens)
    anew = None if resets is None else rows.resets(resets).unsqueeze(-1)
    directions = 2 if layer.bidirectional else 1
    learned = [getattr(layer, name) for name in getattr(layer, "_learned", ())]
    states = rows.states(learned if state is None else state)
    if anew is not None and (after := rows.states(learned if reset_state is None else reset_state)):
        states = states or [torch.zeros_like(s) for s in after]
        states = [torch.cat(pair, dim=1) for pair in zip(states, after, strict=True)]
    y, finals = rows.data, []
    for k in range(layer.num_layers):
        if k and layer.dropout and layer.training:
            y = torch.dropout(y, layer.dropout, True)
        of_layer = slice(k * directions, (k + 1) * directions)
        y, final, *cells = reference.CELLS[layer.mode.lower()](
            y,
            rows.batch_sizes,
            tuple(s[of_layer] for s in states),
            [w for row in layer.all_weights[of_layer] for w in row],
            directions,
            resets=anew,
            cell_states=return_cell_states,
        )
        finals.append(final)
    ends = tuple(rows.end(torch.cat(parts)) for parts in zip(*finals, strict=True))
    return rows.output(y), ends, *map(rows.output, cells)


def _rows_of(layer: torch.nn.RNNBase, x: Any, lengths: Any, cu_seqlens: Tensor | None) -> "_Rows":
    if isinstance(x, PackedSequence):
        return _Packed(layer.batch_first, x)
    if cu_seqlens is not None:
        return _Documents(x, cu_seqlens)
    if lengths is not None:
        return _Lengths(layer.batch_first, x, list(map(int, lengths)))
    return _Unbatched(x) if x.dim() == 2 else _Rows(layer.batch_first, x)


class _Rows:
    """The input of a call as the reference takes it: (T, N, I), of one that may be (N, T, I).

    N: the number of rows; data, batch_sizes: as the reference takes them.
    """

    batch_sizes: Tensor | None = None

    def __init__(self, batch_first: bool, x: Tensor) -> None:
        self.batch_first = batch_first
        self.data = self._steps_first(x)
        self.N = self.data.shape[1]

    def _steps_first(self, t: Tensor) -> Tensor:
        return t.transpose(0, 1) if self.batch_first else t

    def resets(self, given: Any) -> Tensor:
        """The user's resets, as data without its last dimension."""
        return self._steps_first(given)

    def states(self, given: Any) -> list[Tensor]:
        """The user's states, each (L*D, N, width); one without N is for all rows."""
        states = [given] if torch.is_tensor(given) else list(given)
        return [s.unsqueeze(1).expand(-1, self.N, -1) if s.dim() == 2 else s for s in states]

    def end(self, state: Tensor) -> Tensor:
        """A final state, as the user receives it."""
        return state

    def output(self, y: Tensor) -> Any:
        """y of the reference, as the user receives it."""
        return self._steps_first(y)


class _Unbatched(_Rows):
    """(T, I)."""

    def __init__(self, x: Tensor) -> None:
        super().__init__(False, x.unsqueeze(1))

    def resets(self, given: Any) -> Tensor:
        return given.unsqueeze(1)

    def end(self, state: Tensor) -> Tensor:
        return state.squeeze(1)

    def output(self, y: Tensor) -> Any:
        return y.squeeze(1)


class _Documents(_Rows):
    """(S, I) with cu_seqlens."""

    def __init__(self, x: Tensor, cu_seqlens: Tensor) -> None:
        self.data, self.N = x, len(cu_seqlens) - 1
        self.batch_sizes = cu_seqlens.to("cpu", torch.int64).unsqueeze(0)

    def resets(self, given: Any) -> Tensor:
        return given

    def output(self, y: Tensor) -> Any:
        return y


class _Lengths(_Rows):
    """A padded input with lengths: its rows are documents."""

    def __init__(self, batch_first: bool, x: Tensor, lengths: list[int]) -> None:
        super().__init__(batch_first, x)
        self.T, self.lengths = len(self.data), lengths
        self.data = self._without_padding(self.data)
        self.batch_sizes = torch.tensor([0, *lengths]).cumsum(0).unsqueeze(0)

    def _without_padding(self, t: Tensor) -> Tensor:
        return torch.cat([t[:length, n] for n, length in enumerate(self.lengths)])

    def resets(self, given: Any) -> Tensor:
        return self._without_padding(self._steps_first(given))

    def output(self, y: Tensor) -> Any:
        parts = y.split(self.lengths)
        padded = [torch.cat((p, p.new_zeros(self.T - len(p), p.shape[1]))) for p in parts]
        return self._steps_first(torch.stack(padded, dim=1))


class _Packed(_Rows):
    """A PackedSequence, whose states are in the order before packing."""

    def __init__(self, batch_first: bool, packed: PackedSequence) -> None:
        self.packed, self.batch_first = packed, batch_first
        self.data, self.batch_sizes = packed.data, packed.batch_sizes
        self.N = int(packed.batch_sizes[0])

    def resets(self, given: Any) -> Tensor:
        if isinstance(given, PackedSequence):
            return given.data
        steps = self._sorted(self._steps_first(given))
        sizes = self.packed.batch_sizes.tolist()
        return torch.cat([step[:n] for step, n in zip(steps, sizes, strict=True)])

    def _sorted(self, t: Tensor) -> Tensor:
        order = self.packed.sorted_indices
        return t if order is None else t.index_select(1, order)

    def states(self, given: Any) -> list[Tensor]:
        return [self._sorted(s) for s in super().states(given)]

    def end(self, state: Tensor) -> Tensor:
        back = self.packed.unsorted_indices
        return state if back is None else state.index_select(1, back)

    def output(self, y: Tensor) -> Any:
        return PackedSequence(y, *self.packed[1:])
