"""What LSTM, GRU and RNN share: from a module's call to the operator of each layer."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lstm_fused import autocast, errors, inference, ops, padded
from lstm_fused.fallback import (
    CALLED_BY_TORCH,
    TRACED,
    Fused,
    State,
    fallback_reason,
    overridden,
)

Lengths = Sequence[int] | Tensor
_NOT_PROFILED = nullcontext()


class Recurrent(Fused[State]):
    """The fused forward of a recurrent layer, before torch.nn's own class in the order of bases.

    A subclass names the number of its final states as ``_states``. Inside, the states of a call
    are always a tuple, (h,) or (h, c), and () if none were given.
    """

    _states = 1
    # Names of CALLED_BY_TORCH: a subclass's, or of the instance as well.
    _overridden: tuple[str, ...] = ()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._overridden = overridden(cls, cls._torch_class)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in CALLED_BY_TORCH:
            self._find_overridden()

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        if name in CALLED_BY_TORCH:
            self._find_overridden()

    def _find_overridden(self):
        """Set _overridden of an instance that may override methods."""
        self.__dict__.pop("_overridden", None)
        if own := [name for name in CALLED_BY_TORCH if name in self.__dict__]:
            self.__dict__["_overridden"] = tuple(dict.fromkeys([*self._overridden, *own]))

    def _fallback_reason(self, x, hx, weights):
        if self._overridden:
            names = [name for name in self._overridden if name != "check_input"]
            if names:
                return (
                    f"{type(self).__name__} overrides {', '.join(names)}, "
                    "which the fused forward does not call"
                )
        return fallback_reason(x, hx, weights)

    def _cell(self):
        """The name the op knows the cell by."""
        return self.mode.lower()

    def _check_state(self, hx, dims, rows):
        """hx as a tuple of states (L*D, rows, ...); dims as for errors.check_state."""
        return (errors.check_hidden(self, hx, dims, rows),)

    def _as_given(self, state):
        """States in the form in which the user passes and receives them."""
        return state[0]

    def _as_state(self, given):
        return (given,)

    @overload
    def forward(
        self, input: Tensor, hx: State | None = None, *, lengths: Lengths | None = None
    ) -> tuple[Tensor, State]: ...
    @overload
    def forward(
        self, input: PackedSequence, hx: State | None = None
    ) -> tuple[PackedSequence, State]: ...
    def forward(self, input, hx=None, lengths=None):
        """Run all layers over a sequence.

        Sizes: T length, N batch, I ``input_size``, H ``hidden_size``, R ``proj_size`` or else H,
        L ``num_layers``, D 2 if ``bidirectional`` else 1.

        Args:
            input: (T, N, I), or (N, T, I) if ``batch_first``, or (T, I) for one sequence, or a
                ``PackedSequence``. float32, float64, bfloat16 or float16, on the CPU or a CUDA
                device; the weights' dtype unless autocast is on.
            hx: the initial states, zeros if left out: ``(h_0, c_0)`` of an LSTM, shapes
                (L*D, N, R) and (L*D, N, H); ``h_0`` (L*D, N, H) of a GRU or RNN. Without N for a
                (T, I) input.
            lengths: N integers from 0 to T in any order, a list or a tensor: row n of a padded
                (T, N, I) or (N, T, I) input ends after ``lengths[n]`` steps. ``output`` is zero in
                the padding.

        Returns:
            ``(output, (h_n, c_n))`` of an LSTM, ``(output, h_n)`` of a GRU or RNN: output
            (T, N, D*R) laid out as the input, h_n (L*D, N, R), c_n (L*D, N, H), in the dtype of
            input. With ``lengths``, final states are those at each row's own end.

        Raises:
            ValueError: input is not 2-D or 3-D or not of the weights' dtype, or ``lengths`` does
                not fit input.
            RuntimeError: a size, device or dtype of input, hx or a weight does not fit, or T is 0.
            TypeError, IndexError, AttributeError: an argument is of the wrong kind.
        """
        if lengths is not None:
            return self._forward_padded(input, hx, lengths)
        if not self._overridden and not torch.compiler.is_compiling():
            found = inference.infer(self, input, hx)
            if type(found) is list:
                return self._forward_recorded(*found)
            if found is not None:
                return found
        if type(input) is not Tensor:
            if isinstance(input, PackedSequence):
                return self._forward_packed(input, hx)
            if isinstance(input, torch.fx.Proxy):
                return self._fx_leaf(input, hx)
        dim = input.dim()
        if dim != 3 and dim != 2:
            return super().forward(input, hx)  # raises torch.nn's error
        weights = self._weights()
        if reason := self._fallback_reason(input, hx, weights):
            return self._through_torch(reason, input, hx)
        x = input
        if dim == 2:
            x = input.unsqueeze(1)
        elif self.batch_first:
            x = input.transpose(0, 1)
        length, rows, width = x.shape
        plain = width == self.input_size and length and x.dtype is weights[0].dtype
        if not plain or self._overridden:
            errors.check_input(self, input, None)
        state = () if hx is None else self._check_state(hx, dim, rows)
        y, state = self._run(x, None, state, weights)
        if dim == 2:
            return y.squeeze(1), self._as_given(tuple([s.squeeze(1) for s in state]))
        return (y.transpose(0, 1) if self.batch_first else y), self._as_given(state)

    if TYPE_CHECKING:  # as forward, where torch.nn.Module's gives Any

        @overload
        def __call__(
            self, input: Tensor, hx: State | None = None, *, lengths: Lengths | None = None
        ) -> tuple[Tensor, State]: ...
        @overload
        def __call__(
            self, input: PackedSequence, hx: State | None = None
        ) -> tuple[PackedSequence, State]: ...
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def _forward_recorded(self, x, *tensors):
        """With gradients: x (T, N, I), the states if any, the weights, as inference.infer found."""
        count = len(tensors) - len(self._flat_weights_names)
        y, state = self._run(x, None, tensors[:count], tensors[count:])
        return (y.transpose(0, 1) if self.batch_first else y), self._as_given(state)

    def _forward_packed(self, packed, hx):
        x, batch_sizes, sorted_indices, unsorted_indices = packed
        weights = self._weights()
        # torch.onnx on TorchScript looks for torch's operator between packing and padding.
        if reason := TRACED if torch.jit.is_tracing() else self._fallback_reason(x, hx, weights):
            return self._through_torch(reason, packed, hx)
        errors.check_batch_sizes(batch_sizes)
        plain = x.dim() == 2 and x.shape[1] == self.input_size and x.dtype is weights[0].dtype
        if not plain or self._overridden:
            errors.check_input(self, x, batch_sizes)
        state = ()
        if hx is not None:
            if sorted_indices is not None:
                rows = sorted_indices.shape[0]
            elif _is_captured():
                rows = self._as_state(hx)[0].shape[1]  # the operator compares
            else:
                rows = int(batch_sizes[0])
            state = _permuted(self._check_state(hx, None, rows), sorted_indices)
        y, state = self._run(x, batch_sizes, state, weights)
        state = self._as_given(_permuted(state, unsorted_indices))
        return PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices), state

    def _forward_padded(self, input, hx, lengths):
        """input (T, N, I) or (N, T, I) whose row n holds lengths[n] steps, then padding."""
        if isinstance(input, torch.fx.Proxy):
            return self._fx_leaf(input, hx, lengths=lengths)
        lengths = errors.check_lengths(input, lengths, self.batch_first)
        x = input.transpose(0, 1) if self.batch_first else input
        total, count, width = x.shape
        plain = width == self.input_size and total and x.dtype is self._weights()[0].dtype
        if not plain or self._overridden:
            errors.check_input(self, input, None)
        state = () if hx is None else self._check_state(hx, 3, count)
        if _is_captured():
            return self._forward_padded_graph(x, lengths, state)
        if count == 0 or int(lengths.min()) == total:
            return self.forward(input, hx)
        rows = lengths.nonzero().squeeze(1)
        if len(rows) == 0:
            y, state = self._no_steps(x, state)
        elif len(rows) == count:
            y, state = self._forward_rows(x, lengths, state)
        else:
            at = rows.to(x.device)
            part_state = tuple(s.index_select(1, at) for s in state)
            part, ends = self._forward_rows(x.index_select(1, at), lengths[rows], part_state)
            y, zeros = self._zeros(part, total, count)
            y = y.index_copy(1, at, part)
            state = tuple(
                s.to(end.dtype).index_copy(1, at, end)
                for s, end in zip(state or zeros, ends, strict=True)
            )
        return (y.transpose(0, 1) if self.batch_first else y), self._as_given(state)

    def _forward_padded_graph(self, x, lengths, state):
        """As _forward_padded, x (T, N, I), where the lengths' values are not known yet."""
        weights = self._weights()
        if reason := self._fallback_reason(x, None, weights):
            raise RuntimeError(f"lengths= cannot be recorded in a graph: {reason}")
        y, state = self._run(x, lengths, state, weights)
        return (y.transpose(0, 1) if self.batch_first else y), self._as_given(state)

    def _forward_rows(self, x, lengths, state):
        """x (T, N, I), lengths (N,) from 1 to T, in any order; state as _run takes it."""
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        y, state = self._forward_packed(packed, self._as_given(state) if state else None)
        return pad_packed_sequence(y, total_length=x.shape[0])[0], self._as_state(state)

    def _no_steps(self, x, state):
        """The result of _forward_rows for x (T, N, I) without a row of at least one step."""
        y, zeros = self._zeros(x, *x.shape[:2])
        h_n, *c_n = state or zeros
        if not torch.is_autocast_enabled(x.device.type):
            return y, (h_n, *c_n)
        grad = torch.is_grad_enabled()
        dtype, h_dtype = self._autocast_dtypes(x, True, state, self._weights(), grad)
        return y.to(h_dtype), (h_n.to(h_dtype), *(c.to(dtype) for c in c_n))

    def _zeros(self, like, total, count):
        """Zeros for y (T, N, D*R) and the final states."""
        directions = 2 if self.bidirectional else 1
        width = self.proj_size or self.hidden_size
        layers = self.num_layers * directions
        y = like.new_zeros(total, count, directions * width)
        widths = (width, self.hidden_size)[: self._states]
        return y, tuple(like.new_zeros(layers, count, w) for w in widths)

    def _weights(self):
        """The current weights, in the order of _flat_weights_names."""
        params = self._parameters
        try:
            return [params[name] for name in self._flat_weights_names]
        except KeyError:  # parametrized, pruned, weight-normed, or a replica: plain attributes
            return [getattr(self, name) for name in self._flat_weights_names]

    def _run(self, x, batch_sizes, state, weights):
        """All layers: x (T, N, I) or packed (S, I), state () or each (L*D, N, R or H).

        batch_sizes: None for all steps of all rows, else the packed data's; of a padded (T, N, I)
        the lengths (N,).
        """
        if torch.is_autocast_enabled(x.device.type):
            return self._run_autocast(x, batch_sizes, state, weights)
        for s in state:
            if s.dtype is not x.dtype or s.device != x.device:
                errors.check_state_kind(x, state)
        layer = padded.layer if batch_sizes is not None and x.dim() == 3 else ops.layer
        cell, directions, layers = self._cell(), 2 if self.bidirectional else 1, self.num_layers
        each = len(weights) // layers
        dropout = self.dropout if self.training else 0.0
        ends = []
        try:
            for k in range(layers):
                if k and dropout:
                    x = torch.dropout(x, dropout, True)
                part = weights if layers == 1 else weights[k * each : (k + 1) * each]
                state0 = state
                if state and layers > 1:
                    state0 = [s.narrow(0, k * directions, directions) for s in state]
                with self._profiled(k):
                    x, end = layer(x, batch_sizes, state0, part, cell, directions)
                ends.append(end)
        except RuntimeError:
            errors.check_weights(self, weights, x.dtype)
            raise
        if layers == 1:
            return x, end
        return x, tuple([torch.cat(s) for s in zip(*ends, strict=True)])

    def _profiled(self, k):
        """A context that names layer k to a running profiler."""
        if torch.compiler.is_compiling() or not torch._C._autograd._profiler_enabled():
            return _NOT_PROFILED
        return torch.profiler.record_function(f"lstm_fused.{self._torch_class.__name__} layer {k}")

    def _run_autocast(self, x, batch_sizes, state, weights):
        packed, grad = batch_sizes is not None, torch.is_grad_enabled()
        dtype, h_dtype = self._autocast_dtypes(x, packed, state, weights, grad)
        state = tuple(s.to(dtype) for s in state)
        with torch.autocast(x.device.type, enabled=False):
            weights = [w.to(dtype) for w in weights]
            y, (h_n, *c_n) = self._run(x.to(dtype), batch_sizes, state, weights)
        return y.to(h_dtype), (h_n.to(h_dtype), *c_n)

    def _autocast_dtypes(self, x, packed, state, weights, grad):
        """The dtypes of (c_n and everything computed, output and h_n) under autocast.

        cuDNN's layers run wholly in autocast's dtype. On the CPU autocast leaves float64 alone; for
        the rest see autocast.dtypes.
        """
        tensors = (x, *state, *weights)
        double = [t.dtype is torch.float64 for t in tensors]
        if all(double):
            return torch.float64, torch.float64
        if any(double):
            raise RuntimeError(
                "autocast does not cast float64, so that input, hx and weights must be float64 "
                f"all or none, got {sorted({str(t.dtype) for t in tensors})}"
            )
        narrow = torch.get_autocast_dtype(x.device.type)
        if x.is_cuda:
            return narrow, narrow
        call = autocast.Call(
            ops.CELLS[self._cell()]["carry"],
            x.dtype,
            state[-1].dtype if state else x.dtype,
            packed,
            self.proj_size > 0,
            x.numel() == 0,
            grad,
        )
        return autocast.dtypes(call, narrow, autocast.onednn())


def _is_captured():
    """Whether a graph is being captured, so that no tensor's values may be read."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _permuted(state, permutation):
    return state if permutation is None else tuple(s.index_select(1, permutation) for s in state)
