"""What LSTM, GRU and RNN share: from a module's call to the operator of each layer."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lstm_fused import autocast, call_options, cuda, errors, inference, ops, padded, states
from lstm_fused.fallback import CALLED_BY_TORCH, State, fallback_reason, overridden
from lstm_fused.sequences import Sequences

if TYPE_CHECKING:
    from typing_extensions import Unpack

Lengths = Sequence[int] | Tensor
_NOT_PROFILED = nullcontext()


class Options(TypedDict, total=False):
    """Keyword arguments of a call, for type checkers; see Recurrent.forward."""

    resets: Tensor | PackedSequence | None
    reset_state: Any
    cu_seqlens: Tensor | None
    max_seqlen: int | None
    checkpoint_every: int | Literal["auto"] | None


class Recurrent(Sequences[State]):
    """The fused forward of a recurrent layer, before torch.nn's own class in the order of bases.

    A subclass names the number of its final states as ``_states``. Inside, the states of a call
    are always a tuple, (h,) or (h, c), and () if none were given.

    checkpoint_every: what forward's argument of that name is where a call leaves it out.
    """

    checkpoint_every: int | Literal["auto"] | None = None
    _states = 1
    _state_names: tuple[str, ...] = ("initial_h",)
    # Names of the parameters of a learned initial state, as states.add_learned sets them.
    _learned: tuple[str, ...] = ()
    # Names of CALLED_BY_TORCH: a subclass's, or of the instance as well.
    _overridden: tuple[str, ...] = ()

    def __init__(self, *args: Any, learned_initial_state: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if learned_initial_state:
            states.add_learned(self)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls._torch_class is not None:
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

    def _cudnn_reason(self, x, T, N, state, weights):
        """Why a call without options beyond torch.nn runs torch.nn's forward by plan, or None."""
        if self.weights_dtype is not None or self.checkpoint_every is not None:
            return None
        sizes = (T, N, self.hidden_size, self.proj_size or self.hidden_size)
        directions = 2 if self.bidirectional else 1
        return cuda.cudnn_reason(ops.CELLS[self._cell()], x, sizes, directions, (*state, *weights))

    def _cell(self):
        """The name the op knows the cell by."""
        return self.mode.lower()

    def _state_widths(self):
        """The widths of the states that the user passes and receives, h first."""
        return (self.proj_size or self.hidden_size, self.hidden_size)[: self._states]

    def _has_cell_state(self):
        """Whether return_cell_states has something to return."""
        return self._states == 2

    def _weight_shape(self, name, inputs):
        """The shape of the weights of this name, such as weight_ih, of a layer of `inputs`."""
        width = self.proj_size or self.hidden_size
        gates = ops.CELLS[self._cell()]["gates"] * self.hidden_size
        shapes = {
            "weight_ih": (gates, inputs),
            "weight_hh": (gates, width),
            "weight_hr": (width, self.hidden_size),
        }
        return shapes.get(name, (gates,))

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
        self,
        input: Tensor,
        hx: State | None = None,
        lengths: Lengths | None = None,
        *,
        return_cell_states: Literal[False] = False,
        **options: "Unpack[Options]",
    ) -> tuple[Tensor, State]: ...
    @overload
    def forward(
        self,
        input: Tensor,
        hx: State | None = None,
        lengths: Lengths | None = None,
        *,
        return_cell_states: Literal[True],
        **options: "Unpack[Options]",
    ) -> tuple[Tensor, State, Tensor]: ...
    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: State | None = None,
        *,
        return_cell_states: Literal[False] = False,
        **options: "Unpack[Options]",
    ) -> tuple[PackedSequence, State]: ...
    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: State | None = None,
        *,
        return_cell_states: Literal[True],
        **options: "Unpack[Options]",
    ) -> tuple[PackedSequence, State, PackedSequence]: ...
    def forward(self, input, hx=None, lengths=None, **options):
        """Run all layers over a sequence.

        Sizes: T length, N batch, I ``input_size``, H ``hidden_size``, R ``proj_size`` or else H,
        L ``num_layers``, D 2 if ``bidirectional`` else 1. From ``resets`` on the arguments are
        keywords.

        Args:
            input: (T, N, I), or (N, T, I) if ``batch_first``, or (T, I) for one sequence, or a
                ``PackedSequence``. float32, float64, bfloat16 or float16, on the CPU or a CUDA
                device; the weights' dtype unless autocast is on.
            hx: the initial states, zeros if left out: ``(h_0, c_0)`` of an LSTM, shapes
                (L*D, N, R) and (L*D, N, H); ``h_0`` (L*D, N, H) of a GRU or RNN. Without N for a
                (T, I) input.
            lengths: N integers from 0 to T in any order, a list or a tensor: row n of a padded
                (T, N, I) or (N, T, I) input ends after ``lengths[n]`` steps. ``output`` is zero in
                the padding. On a CUDA device nothing waits for their values.
            resets: where rows begin anew, a bool tensor: True at step t puts ``reset_state`` in
                place of the state before step t. (T, N), or (N, T) if ``batch_first``, (T,) for one
                sequence, (S,) for documents; for a ``PackedSequence`` padded as one of those two,
                in the order before packing, or packed as it is. Nothing passes a reset in either
                direction, forward or backward: the reverse direction begins anew at step t - 1.
            reset_state: the state that resets put in, zeros if left out, or the learned initial
                state: in the form of hx, each (L*D, N, width), or (L*D, width) for all rows.
            return_cell_states: also return c of every step, of the last layer (LSTM only).
            cu_seqlens: (N + 1,), int32 or int64: input (S, I) is N documents one after the other,
                document n the rows from ``cu_seqlens[n]`` to ``cu_seqlens[n + 1]``. The first is
                0, the last S. A document without a row keeps its initial state.
            max_seqlen: with cu_seqlens on a CUDA device, at least the longest document's rows.
                Given, nothing waits for the values of cu_seqlens.
            checkpoint_every: keep the states of every so many steps for backward, which computes
                the steps between them again: less memory, more time, the same results. "auto"
                chooses the number for the least memory. Packed data and documents keep every step.

        Returns:
            ``(output, (h_n, c_n))`` of an LSTM, ``(output, h_n)`` of a GRU or RNN: output
            (T, N, D*R) laid out as the input, h_n (L*D, N, R), c_n (L*D, N, H), in the dtype of
            input. With ``lengths``, final states are those at each row's own end; N is that of the
            documents with ``cu_seqlens``, and output (S, D*R). With ``return_cell_states`` a third,
            (T, N, D*H) laid out as output.

        Raises:
            ValueError: input is not 2-D or 3-D or not of the weights' dtype; ``lengths``,
                ``resets`` or ``cu_seqlens`` does not fit input; options exclude each other.
            RuntimeError: a size, device or dtype of input, hx, reset_state or a weight does not
                fit, or T is 0; or an option beyond torch.nn in a call that only torch.nn can run.
            TypeError, IndexError, AttributeError: an argument is of the wrong kind.
        """
        # Not written out in the signature: torch.onnx on TorchScript passes the default of each
        # parameter by position.
        if hx is None and self._learned:
            hx = states.for_call(self, input, options.get("cu_seqlens"))
        given = None
        if options:
            given, documents = call_options.from_call(self, lengths, **options)
            if documents is not None:
                return self._forward_documents(input, hx, *documents, given)
        if lengths is not None:
            return self._forward_padded(input, hx, lengths, given)
        if given is None and not self._overridden and not torch.compiler.is_compiling():
            found = inference.infer(self, input, hx)
            if type(found) is list:
                return self._forward_recorded(*found)
            if found is not None:
                return found
        if type(input) is not Tensor:
            if isinstance(input, PackedSequence):
                return self._forward_packed(input, hx, given)
            if isinstance(input, torch.fx.Proxy):
                return self._fx_leaf(input, hx, **call_options.keywords(given))
        dim = input.dim()
        if dim != 3 and dim != 2:
            return super().forward(input, hx)  # raises torch.nn's error
        weights = self._weights()
        if reason := self._fallback_reason(input, hx, weights):
            given = call_options.for_fallback(self, input, reason, given)
            if given is None:
                return self._through_torch(reason, input, hx)
        x = input
        if dim == 2:
            x = input.unsqueeze(1)
        elif self.batch_first:
            x = input.transpose(0, 1)
        length, rows, width = x.shape
        plain = width == self.input_size and length and x.dtype is self._input_dtype(weights)
        if not plain or self._overridden:
            errors.check_input(self, input, None)
        state = () if hx is None else self._check_state(hx, dim, rows)
        options = None
        if given is None and x.is_cuda and self._cudnn_reason(x, length, rows, state, weights):
            return super().forward(input, hx)
        if given is not None:
            resets = call_options.dense_resets(given.resets, x, dim, self.batch_first)
            state, options = call_options.prepared(self, given, x, state, rows, resets)
        y, state, *cells = self._run(x, None, state, weights, options)
        if dim == 2:
            y, *cells = (t.squeeze(1) for t in (y, *cells))
            return y, self._as_given(tuple([s.squeeze(1) for s in state])), *cells
        if self.batch_first:
            y, *cells = (t.transpose(0, 1) for t in (y, *cells))
        return y, self._as_given(state), *cells

    if TYPE_CHECKING:  # as forward, where torch.nn.Module's gives Any

        @overload
        def __call__(
            self,
            input: Tensor,
            hx: State | None = None,
            lengths: Lengths | None = None,
            *,
            return_cell_states: Literal[False] = False,
            **options: Unpack[Options],
        ) -> tuple[Tensor, State]: ...
        @overload
        def __call__(
            self,
            input: Tensor,
            hx: State | None = None,
            lengths: Lengths | None = None,
            *,
            return_cell_states: Literal[True],
            **options: Unpack[Options],
        ) -> tuple[Tensor, State, Tensor]: ...
        @overload
        def __call__(
            self,
            input: PackedSequence,
            hx: State | None = None,
            *,
            return_cell_states: Literal[False] = False,
            **options: Unpack[Options],
        ) -> tuple[PackedSequence, State]: ...
        @overload
        def __call__(
            self,
            input: PackedSequence,
            hx: State | None = None,
            *,
            return_cell_states: Literal[True],
            **options: Unpack[Options],
        ) -> tuple[PackedSequence, State, PackedSequence]: ...
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def _forward_recorded(self, x, *tensors):
        """With gradients: x (T, N, I), the states if any, the weights, as inference.infer found."""
        count = len(tensors) - len(self._flat_weights_names)
        y, state = self._run(x, None, tensors[:count], tensors[count:])
        return (y.transpose(0, 1) if self.batch_first else y), self._as_given(state)

    def init_state(self, batch_size: int | None = None) -> State:
        """The state to begin with: zeros, or the learned initial state if the module has one.

        Args:
            batch_size: N, the number of rows; None for the state of one sequence without rows.

        Returns:
            What a call takes as hx, of the weights' dtype and device: ``(h_0, c_0)`` of an LSTM,
            (L*D, N, R) and (L*D, N, H), else ``h_0``; (L*D, width) each if batch_size is None.
            Gradients flow into a learned one.
        """
        return states.initial(self, batch_size)

    @property
    def learned_initial_state(self) -> bool:
        """Whether the initial state is a parameter: ``initial_h``, of an LSTM ``initial_c`` too."""
        return bool(self._learned)

    def extra_repr(self):
        learned = ", learned_initial_state=True" if self._learned else ""
        every = self.checkpoint_every
        return super().extra_repr() + learned + (f", checkpoint_every={every!r}" if every else "")

    def reset_parameters(self):
        super().reset_parameters()
        states.reset_learned(self)

    def _learned_state(self):
        """The learned initial state as a call takes it, each (L*D, width), or None."""
        if not self._learned:
            return None
        learned = tuple(getattr(self, name) for name in self._learned)
        return learned[0] if len(learned) == 1 else learned

    def _weights(self):
        """The current weights, in the order of _flat_weights_names."""
        params = self._parameters
        try:
            return [params[name] for name in self._flat_weights_names]
        except KeyError:  # parametrized, pruned, weight-normed, or a replica: plain attributes
            return [getattr(self, name) for name in self._flat_weights_names]

    def _run(self, x, batch_sizes, state, weights, options=None):
        """All layers: x (T, N, I) or packed (S, I), state () or each (L*D, N, R or H).

        batch_sizes: None for all steps of all rows, else the packed data's, or of documents
        cu_seqlens (1, N + 1); of a padded (T, N, I) the lengths (N,). options: of call_options, and
        state has 2 * N rows where these have resets to a state. Returns y, the final states and,
        where options say so, the cell states.
        """
        if torch.is_autocast_enabled(x.device.type):
            return self._run_autocast(x, batch_sizes, state, weights, options)
        for s in state:
            if s.dtype is not x.dtype or s.device != x.device:
                errors.check_state_kind(x, state)
        more = None
        if options is None and self.checkpoint_every is None:
            layer = padded.layer if batch_sizes is not None and x.dim() == 3 else ops.layer
        else:
            layer, more = call_options.arguments(self, options, x, batch_sizes)
        layer = self._layer(layer)
        cell, directions, layers = self._cell(), 2 if self.bidirectional else 1, self.num_layers
        each = len(weights) // layers
        dropout = self.dropout if self.training else 0.0
        ends, cells = [], ()
        try:
            for k in range(layers):
                if k and dropout:
                    x = torch.dropout(x, dropout, True)
                part = weights if layers == 1 else weights[k * each : (k + 1) * each]
                state0 = state
                if state and layers > 1:
                    state0 = [s.narrow(0, k * directions, directions) for s in state]
                with self._profiled(k):
                    if more is None:
                        x, end = layer(x, batch_sizes, state0, part, cell, directions)
                    else:
                        if options is not None and options.cell_states:
                            more["cell_states"] = k == layers - 1
                        x, end, *cells = layer(
                            x, batch_sizes, state0, part, cell, directions, **more
                        )
                ends.append(end)
        except RuntimeError:
            if self.weights_dtype is None:
                errors.check_weights(self, weights, x.dtype)
            raise
        if layers == 1:
            return x, end, *cells
        return x, tuple([torch.cat(s) for s in zip(*ends, strict=True)]), *cells

    def _profiled(self, k):
        """A context that names layer k to a running profiler."""
        if torch.compiler.is_compiling() or not torch._C._autograd._profiler_enabled():
            return _NOT_PROFILED
        return torch.profiler.record_function(f"lstm_fused.{self._kind()} layer {k}")

    def _run_autocast(self, x, batch_sizes, state, weights, options):
        packed, grad = batch_sizes is not None, torch.is_grad_enabled()
        dtype, h_dtype = self._autocast_dtypes(x, packed, state, weights, grad)
        state = tuple(s.to(dtype) for s in state)
        with torch.autocast(x.device.type, enabled=False):
            weights = [w.to(dtype) for w in weights]
            x = x.to(dtype)
            y, (h_n, *c_n), *cells = self._run(x, batch_sizes, state, weights, options)
        return y.to(h_dtype), (h_n.to(h_dtype), *c_n), *cells

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
