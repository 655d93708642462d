"""LSTMCell, GRUCell and RNNCell: one step of a layer, by the fused kernels."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lstm_fused import inference, ops
from lstm_fused.fallback import Fused, State

if TYPE_CHECKING:
    from torch.types import Device


class Cell(Fused[State]):
    """The fused forward of one step, before torch.nn's own class in the order of bases.

    What does not fit exactly goes to torch.nn's own forward: it decides what is an error, and words
    it, except for what it fails to notice.
    """

    _states = 1

    def _cell(self):
        """The name the op knows the cell by."""
        raise NotImplementedError

    def _state(self, input, hx):
        """hx as a tuple of states that have not been checked yet."""
        return (hx,)

    def forward(self, input: Tensor, hx: State | None = None) -> State:
        """Run one step.

        Args:
            input: (N, I), or (I,) for one row; float32, float64, bfloat16 or float16, the weights'
                dtype.
            hx: ``(h_0, c_0)`` of an LSTMCell, else ``h_0``; each (N, H), or (H,) for one row.
                Zeros if left out.

        Returns:
            ``(h_1, c_1)`` of an LSTMCell, else ``h_1``, of the shapes of hx.

        Raises:
            RuntimeError: a state has another rank than input; and whatever torch.nn's cell raises.
        """
        if not torch.compiler.is_compiling():
            found = inference.infer_step(self, input, hx)
            if type(found) is list:
                first = 1 if hx is None else 1 + self._states  # of the weights
                return ops.step(found[0], found[1:first], found[first:], self._cell())
            if found is not None:
                return found
        if type(input) is not Tensor and isinstance(input, torch.fx.Proxy):
            return self._fx_leaf(input, hx)
        state = () if hx is None else self._state(input, hx)
        if not self._fits(input, state):
            self._check_ranks(input, state)
            return super().forward(input, hx)
        weights = self._weights()
        if reason := self._fallback_reason(input, state, weights):
            return self._through_torch(reason, input, hx)
        single = input.dim() == 1
        x = input.view(1, 1, -1) if single else input.unsqueeze(0)
        state = tuple([s.view(1, 1, -1) if single else s.unsqueeze(0) for s in state])
        _, after = self._layer(ops.layer)(x, None, state, weights, self._cell(), 1)
        ends: Any = tuple([end.view(-1) if single else end.squeeze(0) for end in after])
        return ends[0] if len(ends) == 1 else ends

    if TYPE_CHECKING:

        def __call__(self, input: Tensor, hx: State | None = None) -> State: ...
        def __init__(
            self,
            input_size: int,
            hidden_size: int,
            bias: bool = True,
            device: Device = None,
            dtype: torch.dtype | None = None,
        ) -> None: ...

    def _weights(self):
        weights = [self.weight_ih, self.weight_hh]
        return [*weights, self.bias_ih, self.bias_hh] if self.bias else weights

    def _fallback_reason(self, x, hx, weights):
        if reason := super()._fallback_reason(x, hx, weights):
            return reason
        if _is_autocast_enabled(x):
            return "the fused step does not run under autocast"
        if self.input_size == 0 or self.hidden_size == 0:
            return "the fused step needs an input_size and a hidden_size of at least 1"
        return None

    def _fits(self, input, state):
        """input (N, I) or (I,), each state (N, H) or (H,), all of the weights' dtype."""
        dim = input.dim()
        if dim not in (1, 2) or input.shape[-1] != self.input_size:
            return False
        shape = (*input.shape[:-1], self.hidden_size)
        dtype = self._input_dtype(self._weights())
        any_dtype = _is_autocast_enabled(input)
        if (input.dtype is not dtype and not any_dtype) or len(state) not in (0, self._states):
            return False
        return all(
            isinstance(s, Tensor)
            and s.shape == shape
            and (s.dtype is dtype or any_dtype)
            and s.device == input.device
            for s in state
        )

    def _check_ranks(self, input, state):
        """Refuse states of another rank than the input's.

        torch.nn takes rows of states beside the input of one: its result has rows then, or it reads
        memory that is not there.
        """
        dim, *ranks = [t.dim() if isinstance(t, Tensor) else 0 for t in (input, *state)]
        if not {dim, *ranks} <= {1, 2} or len(ranks) < self._states:
            return  # torch.nn refuses that
        for k, rank in enumerate(ranks):
            if rank != dim:
                name = "hx" if self._states == 1 else f"hx[{k}]"
                raise RuntimeError(
                    f"For {dim}-D input, {name} should also be {dim}-D but got {rank}-D tensor"
                )


def _is_autocast_enabled(t):
    return t.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(t.device.type)


class LSTMCell(Cell[tuple[Tensor, Tensor]], torch.nn.LSTMCell):
    """``torch.nn.LSTMCell`` computed by a fused kernel: same constructor, weights and results.

    Args:
        input: (N, I), or (I,) for one row.
        hx: ``(h_0, c_0)``, each (N, H), or (H,); zeros if left out.

    Returns:
        ``(h_1, c_1)``, each (N, H), or (H,).

    Raises:
        RuntimeError: a state has another rank than input; and whatever ``torch.nn.LSTMCell``
            raises.

    Inputs without a fused path (see ``LSTM``; autocast; sizes of 0) run through
    ``torch.nn.LSTMCell``, with one warning for each reason.
    """

    _torch_class = torch.nn.LSTMCell
    _states = 2

    def _cell(self):
        return "lstm"

    def _state(self, input, hx):
        """Two states in a sequence, or for a single row also stacked in a tensor."""
        stacked = isinstance(hx, Tensor) and hx.dim() > 0 and input.dim() == 1
        return (tuple(hx) if stacked or isinstance(hx, (tuple, list)) else ()) or (hx,)


class GRUCell(Cell[Tensor], torch.nn.GRUCell):
    """``torch.nn.GRUCell`` computed by a fused kernel: input (N, I), hx (N, H) -> h_1 (N, H).

    As ``LSTMCell``, with one state.
    """

    _torch_class = torch.nn.GRUCell

    def _cell(self):
        return "gru"


class RNNCell(Cell[Tensor], torch.nn.RNNCell):
    """``torch.nn.RNNCell`` computed by a fused kernel: input (N, I), hx (N, H) -> h_1 (N, H).

    As ``LSTMCell``, with one state; ``nonlinearity`` is ``"tanh"`` or ``"relu"``.
    """

    _torch_class = torch.nn.RNNCell

    if TYPE_CHECKING:

        def __init__(
            self,
            input_size: int,
            hidden_size: int,
            bias: bool = True,
            nonlinearity: str = "tanh",
            device: Device = None,
            dtype: torch.dtype | None = None,
        ) -> None: ...

    def _cell(self):
        return f"rnn_{self.nonlinearity}"

    def _fits(self, input, state):
        return self.nonlinearity in ("tanh", "relu") and super()._fits(input, state)


MODULES: tuple[type[Cell[Any]], ...] = (LSTMCell, GRUCell, RNNCell)
