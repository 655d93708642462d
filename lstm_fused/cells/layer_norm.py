"""LSTM and GRU with layer normalization inside of the recurrence.

Sizes: I inputs, H hidden units, R recurrent width.
"""

from typing import TYPE_CHECKING, Any

import torch

from lstm_fused.cells.base import DescribedLayer, HiddenState, TwoStates
from lstm_fused.fallback import State

if TYPE_CHECKING:
    from torch.types import Device


class _Normalized(DescribedLayer[State]):
    """What both classes share: a gain for each number of both products, which are normalized."""

    eps: float

    def _weight_names(self):
        return (*super()._weight_names(), "gamma_ih", "gamma_hh", *self._cell_norm_names())

    def _cell_norm_names(self):
        return ()

    def _weight_shape(self, name, inputs):
        if name in self._cell_norm_names():
            return (self.hidden_size,)
        return super()._weight_shape(name, inputs)

    def _operator_weights(self, own, x, direction):
        """The biases are among the vectors: the operator's would be added before normalization."""
        weights = {k: w for k, w in own.items() if k not in ("bias_ih", "bias_hh")}
        rows = [own["gamma_ih"], own["gamma_hh"], *self._biases(own)]
        rows += [own[name] for name in self._cell_norm_names()]
        rows += [x.new_full((self.hidden_size,), self.eps)]
        weights["vectors"] = torch.cat([row.view(-1, self.hidden_size) for row in rows])
        return super()._operator_weights(weights, x, direction)

    def _biases(self, own):
        """The rows of the biases, or of zeros."""
        raise NotImplementedError

    def _vectors(self, own):
        return own["vectors"]

    def _init_own(self, own):
        for name in own:
            if name.startswith("gamma"):
                own[name].fill_(1)
            elif name.startswith("beta"):
                own[name].zero_()


class LayerNormLSTM(_Normalized[Any], TwoStates):
    """LSTM whose products and cell state are normalized in each step.

    ``i f g o = LN(W x; gamma_ih) + b_ih + LN(R h; gamma_hh) + b_hh``, each over all 4*H numbers,
    ``c' = f c + i g``, ``h' = o tanh(LN(c'; gamma_c, beta_c))``. Arguments of a call, shapes and
    errors are those of ``lstm_fused.LSTM``.

    Args:
        carries_normalized: whether the next step sees LN(c') in place of c'. False is the paper's
            and haste's ``LayerNormLSTM``; True that of torch's fastrnns benchmark
            (``LayerNormLSTMCell``) and of TF Addons.
        eps: added to the variance; TF Addons has 1e-3, the others 1e-5.

    Weights: those of ``LSTM``, the biases being those of the normalization, and ``gamma_ih_l{k}``,
    ``gamma_hh_l{k}`` (4*H,), ``gamma_c_l{k}``, ``beta_c_l{k}`` (H,).

    Ba, Kiros and Hinton, Layer Normalization, 2016.
    """

    gates = 4

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
            proj_size: int = 0,
            device: Device = None,
            dtype: torch.dtype | None = None,
            *,
            carries_normalized: bool = False,
            eps: float = 1e-5,
            learned_initial_state: bool = False,
        ) -> None: ...

    else:

        def __init__(
            self, *args: Any, carries_normalized: bool = False, eps: float = 1e-5, **kwargs: Any
        ) -> None:
            self.carries_normalized, self.eps = bool(carries_normalized), float(eps)
            super().__init__(*args, **kwargs)

    def _cell_norm_names(self):
        return "gamma_c", "beta_c"

    def _cell(self):
        return "layer_norm_lstm_carried" if self.carries_normalized else "layer_norm_lstm"

    def _biases(self, own):
        if not self.bias:
            return [torch.zeros_like(own["gamma_ih"])]
        return [own["bias_ih"] + own["bias_hh"]]

    def extra_repr(self):
        more = ", carries_normalized=True" if self.carries_normalized else ""
        return super().extra_repr() + more + (f", eps={self.eps}" if self.eps != 1e-5 else "")


class LayerNormGRU(_Normalized[Any], HiddenState):
    """GRU whose products are normalized in each step.

    ``lstm_fused.GRU`` with ``LN(W x; gamma_ih) + b_ih`` in place of ``W x + b_ih`` and ``LN(R h;
    gamma_hh) + b_hh`` in place of ``R h + b_hh``, each over all 3*H numbers. Arguments of a call,
    shapes and errors are those of ``GRU``.

    Args:
        eps: added to the variance.

    Weights: those of ``GRU``, and ``gamma_ih_l{k}``, ``gamma_hh_l{k}`` (3*H,).

    Ba, Kiros and Hinton, Layer Normalization, 2016; haste's ``LayerNormGRU``.
    """

    cell = "layer_norm_gru"
    gates = 3

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
            eps: float = 1e-5,
            learned_initial_state: bool = False,
        ) -> None: ...

    else:

        def __init__(self, *args: Any, eps: float = 1e-5, **kwargs: Any) -> None:
            self.eps = float(eps)
            super().__init__(*args, **kwargs)

    def _biases(self, own):
        if not self.bias:
            return [torch.zeros_like(own["gamma_ih"])] * 2
        return [own["bias_ih"], own["bias_hh"]]

    def extra_repr(self):
        return super().extra_repr() + (f", eps={self.eps}" if self.eps != 1e-5 else "")
