"""Layers whose gates see the input alone: no product with the hidden state in the steps.

Sizes: T steps, N rows, I inputs, H hidden units, D directions, S rows of packed data or of
documents.
"""

import math
from typing import TYPE_CHECKING

import torch

from lstm_fused.cells import windows
from lstm_fused.cells.base import CellState, HiddenState

if TYPE_CHECKING:
    from torch.types import Device


class IndRNN(HiddenState):
    """Independently recurrent network: each unit sees its own hidden state alone.

    ``h' = act(W x + b + u * h)``, act being ``nonlinearity``. Arguments of a call, options, shapes
    and errors are those of ``lstm_fused.GRU``.

    Args:
        nonlinearity: ``"relu"`` or ``"tanh"``.

    Weights: ``weight_ih_l{k}`` (H, I), ``weight_u_l{k}`` (1, H), ``bias_ih_l{k}`` (H,). Of several
    layers the weights u begin uniform between 0 and 1, as in the paper.

    Raises:
        ValueError: nonlinearity is another.

    Li, Li, Cook, Zhu and Gao, Independently Recurrent Neural Network (IndRNN): Building A Longer
    and Deeper RNN, 2018.
    """

    gates = 1
    has_hidden_weight = False
    vectors = ("weight_u", 1)

    if TYPE_CHECKING:

        def __init__(
            self,
            input_size: int,
            hidden_size: int,
            num_layers: int = 1,
            bias: bool = True,
            batch_first: bool = False,
            dropout: float = 0.0,
            bidirectional: bool = False,
            device: Device = None,
            dtype: torch.dtype | None = None,
            *,
            nonlinearity: str = "relu",
            learned_initial_state: bool = False,
        ) -> None: ...

    else:

        def __init__(self, *args, nonlinearity: str = "relu", **kwargs):
            if nonlinearity not in ("relu", "tanh"):
                raise ValueError(f'nonlinearity must be "relu" or "tanh", got {nonlinearity!r}')
            self.nonlinearity = nonlinearity
            super().__init__(*args, **kwargs)

    def _cell(self):
        return "ind_rnn_tanh" if self.nonlinearity == "tanh" else "ind_rnn"

    def _init_own(self, own):
        own["weight_u"].uniform_(0, 1)

    def extra_repr(self):
        tanh = ", nonlinearity='tanh'" if self.nonlinearity == "tanh" else ""
        return super().extra_repr() + tanh


class MinGRU(HiddenState):
    """minGRU: a GRU whose gates do not see the hidden state.

    ``z = sigmoid(W_z x + b_z)``, ``h' = (1 - z) h + z g(W_h x + b_h)`` with g(v) = v + 0.5 where
    v >= 0 and sigmoid(v) elsewhere, as in the paper's log-space form. Arguments of a call, options,
    shapes and errors are those of ``lstm_fused.GRU``.

    Weights: ``weight_ih_l{k}`` (2*H, I) and ``bias_ih_l{k}`` (2*H,): z, then the candidate.

    Feng, Tung, Ahmed, Bengio and Hajimirsadeghi, Were RNNs All We Needed?, 2024.
    """

    cell = "min_gru"
    gates = 2
    has_hidden_weight = False


class MinLSTM(HiddenState):
    """minLSTM: an LSTM whose gates do not see the hidden state, and are normalized to a sum of 1.

    ``f, i = sigmoid(W_f x + b_f), sigmoid(W_i x + b_i)``, ``h' = (f h + i g(W_h x + b_h)) / (f +
    i)`` with g of ``MinGRU``. Arguments of a call, options, shapes and errors are those of
    ``lstm_fused.GRU``.

    Weights: ``weight_ih_l{k}`` (3*H, I) and ``bias_ih_l{k}`` (3*H,): f, i, then the candidate.

    Feng, Tung, Ahmed, Bengio and Hajimirsadeghi, Were RNNs All We Needed?, 2024.
    """

    cell = "min_lstm"
    gates = 3
    has_hidden_weight = False


class SRU(CellState):
    """Simple recurrent unit, with its highway connection around the recurrence.

    ``f = sigmoid(W_f x + v_f * c + b_f)``, ``r = sigmoid(W_r x + v_r * c + b_r)``, ``c' = f c +
    (1 - f) W x``, ``h = r c' + (1 - r) a skip``, c being that before the step in both gates. skip
    is the layer's input where it is as wide as the output, of a layer in two directions its half
    for each; ``W_s x`` elsewhere. Arguments of a call, options and errors are those of
    ``lstm_fused.GRU``; the state is c, (L*D, N, H), and ``return_cell_states`` gives all of c.

    Args:
        rescale: a is ``sqrt(1 + 2 exp(highway_bias))``, else 1.
        highway_bias: the initial b_r.

    Weights: ``weight_ih_l{k}`` (3*H, I), or (4*H, I) with a W_s: W, W_f, W_r, W_s;
    ``weight_c_l{k}`` (2, H): v_f, v_r; ``bias_ih_l{k}`` (2*H,): b_f, b_r. The matrices begin
    uniform with the variance 1 / I, v likewise with 1 / H, b_f with 0.

    Lei, Zhang, Wang, Dai and Artzi, Simple Recurrent Units for Highly Parallelizable Recurrence,
    2018; the package sru's ``SRUCell``, whose columns are interleaved.
    """

    cell = "sru"
    gates = 4
    has_hidden_weight = False
    vectors = ("weight_c", 2)

    if TYPE_CHECKING:

        def __init__(
            self,
            input_size: int,
            hidden_size: int,
            num_layers: int = 1,
            bias: bool = True,
            batch_first: bool = False,
            dropout: float = 0.0,
            bidirectional: bool = False,
            device: Device = None,
            dtype: torch.dtype | None = None,
            *,
            rescale: bool = False,
            highway_bias: float = 0.0,
            learned_initial_state: bool = False,
        ) -> None: ...

    else:

        def __init__(self, *args, rescale: bool = False, highway_bias: float = 0.0, **kwargs):
            self.rescale, self.highway_bias = rescale, float(highway_bias)
            super().__init__(*args, **kwargs)

    def _has_identity(self, inputs):
        return inputs == self.hidden_size * (2 if self.bidirectional else 1)

    def _weight_shape(self, name, inputs):
        if name == "weight_ih":
            return (3 if self._has_identity(inputs) else 4) * self.hidden_size, inputs
        if name == "bias_ih":
            return (2 * self.hidden_size,)
        return super()._weight_shape(name, inputs)

    def _operator_weights(self, own, x, direction):
        H, w_ih, own = self.hidden_size, own["weight_ih"], dict(own)
        scale = math.sqrt(1 + 2 * math.exp(self.highway_bias)) if self.rescale else 1.0
        if self._has_identity(w_ih.shape[1]):
            skip = torch.eye(w_ih.shape[1], dtype=w_ih.dtype, device=w_ih.device)
            skip = skip[direction * H : (direction + 1) * H]
            own["weight_ih"] = torch.cat((w_ih, skip * scale))
        elif self.rescale:
            own["weight_ih"] = torch.cat((w_ih[: 3 * H], w_ih[3 * H :] * scale))
        if "bias_ih" in own:
            none = own["bias_ih"].new_zeros(H)
            own["bias_ih"] = torch.cat((none, own["bias_ih"], none))
        return super()._operator_weights(own, x, direction)

    def _init_own(self, own):
        for name in ("weight_ih", "weight_c"):  # (rows, inputs), (2, H)
            bound = math.sqrt(3 / own[name].shape[1])
            own[name].uniform_(-bound, bound)
        if "bias_ih" in own:
            own["bias_ih"].zero_()[self.hidden_size :].fill_(self.highway_bias)

    def extra_repr(self):
        more = ", rescale=True" if self.rescale else ""
        more += f", highway_bias={self.highway_bias}" if self.highway_bias else ""
        return super().extra_repr() + more


class QRNN(CellState):
    """Quasi-recurrent network: gates by a convolution over time, then fo-pooling.

    ``z, f, o = W [x(t - window + 1), ..., x(t)] + b``, ``c' = sigmoid(f) c + (1 - sigmoid(f))
    tanh(z)``, ``h = sigmoid(o) c'``. Steps before a row's first are zeros, and so are those behind
    a reset; the reverse direction sees the steps after t. Arguments of a call, options and errors
    are those of ``lstm_fused.GRU``; the state is c, (L*D, N, H), and ``return_cell_states`` gives c
    of each step. A call does not see the inputs of the call before.

    Args:
        window: the steps that a gate sees, at least 1.

    Weights: ``weight_ih_l{k}`` (3*H, window*I), the columns of the oldest step first, and
    ``bias_ih_l{k}`` (3*H,): z, f, o.

    Raises:
        ValueError: window is no int of at least 1.

    Bradbury, Merity, Xiong and Socher, Quasi-Recurrent Neural Networks, 2017.
    """

    cell = "qrnn"
    gates = 3
    has_hidden_weight = False

    if TYPE_CHECKING:

        def __init__(
            self,
            input_size: int,
            hidden_size: int,
            num_layers: int = 1,
            bias: bool = True,
            batch_first: bool = False,
            dropout: float = 0.0,
            bidirectional: bool = False,
            device: Device = None,
            dtype: torch.dtype | None = None,
            *,
            window: int = 1,
            learned_initial_state: bool = False,
        ) -> None: ...

    else:

        def __init__(self, *args, window: int = 1, **kwargs):
            if isinstance(window, bool) or not isinstance(window, int) or window < 1:
                raise ValueError(f"window must be an int of at least 1, got {window!r}")
            self.window = window
            super().__init__(*args, **kwargs)

    def _weight_shape(self, name, inputs):
        return super()._weight_shape(name, inputs * self.window)

    def _operator_weights(self, own, x, direction):
        # x is [oldest step, ..., this one] and, in two directions, [..., the latest] behind it: the
        # columns that a direction does not see are zeros.
        if self.bidirectional and self.window > 1:
            w = own["weight_ih"]
            each = w.shape[1] // self.window
            none = w.new_zeros(len(w), each * (self.window - 1))
            if direction:
                w = torch.cat((none, w.unflatten(1, (self.window, each)).flip(1).flatten(1)), 1)
            else:
                w = torch.cat((w, none), 1)
            own = own | {"weight_ih": w}
        return super()._operator_weights(own, x, direction)

    def _run_layer(self, run, x, batch_sizes, state0, weights, directions, **more):
        x = windows.of(x, batch_sizes, more.get("resets"), self.window, directions)
        return super()._run_layer(run, x, batch_sizes, state0, weights, directions, **more)

    def extra_repr(self):
        return super().extra_repr() + (f", window={self.window}" if self.window > 1 else "")
