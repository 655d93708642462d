"""sLSTM: the LSTM of xLSTM, with heads and exponential gates.

Sizes: T steps, N rows, I inputs, H hidden units, D units of a head.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lstm_fused import errors, ops
from lstm_fused.cells.base import DescribedLayer

if TYPE_CHECKING:
    from torch.types import Device

_HEAD_MULTIPLE = 16  # the kernels' block-diagonal W_hh has heads of so many units
_States = tuple[Tensor, Tensor, Tensor, Tensor]


class SLSTM(DescribedLayer[_States]):
    """sLSTM: an LSTM with exponential gates, a normalizer state n and a stabilizer state m.

    ``i, f, z, o`` are ``W x + R h + b``, R being block-diagonal: a unit sees the hidden units of
    its head. ``m' = max(i, log(sigmoid(f)) + m)``, or i where n is 0, before a first step;
    ``i' = exp(i - m')``, ``f' = exp(log(sigmoid(f)) + m - m')``, ``c' = f' c + i' tanh(z)``,
    ``n' = f' n + i'``, ``h = sigmoid(o) c' / n'``. Arguments of a call, options and errors are
    those of ``lstm_fused.LSTM``; the state is ``(h, c, n, m)``, (L*D, N, H) each for L layers and D
    directions, and ``return_cell_states`` gives c, n and m of each step side by side.

    Args:
        num_heads: how many heads, a divisor of hidden_size.

    Weights: ``weight_ih_l{k}`` (4*H, I), ``weight_hh_l{k}`` (4*H, H / num_heads), ``bias_ih_l{k}``
    and ``bias_hh_l{k}`` (4*H,): i, f, z, o. As in the package xlstm, ``weight_hh`` and the biases
    begin with zeros, but b_f, which falls from 5 to -7 over the units of a head.

    Raises:
        ValueError: num_heads does not divide hidden_size.

    Beck, Poeppel, Spanring, Auer, Prudnikova, Kopp, Klambauer, Brandstetter and Hochreiter, xLSTM:
    Extended Long Short-Term Memory, 2024. ``replace_slstm`` puts the cell into models built with
    the packages xlstm and tirex.
    """

    cell = "slstm"
    gates = 4
    _states = 4
    _state_names = ("initial_h", "initial_c", "initial_n", "initial_m")

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
            num_heads: int = 4,
            learned_initial_state: bool = False,
        ) -> None: ...

    else:

        def __init__(self, input_size: int, hidden_size: int, *args, num_heads: int = 4, **kwargs):
            whole = isinstance(num_heads, int) and not isinstance(num_heads, bool) and num_heads > 0
            if not whole or hidden_size % num_heads:
                raise ValueError(
                    "num_heads must be a divisor of hidden_size, "
                    f"got {num_heads!r} of {hidden_size}"
                )
            self.num_heads = num_heads
            super().__init__(input_size, hidden_size, *args, **kwargs)

    def _weight_shape(self, name, inputs):
        if name == "weight_hh":
            return 4 * self.hidden_size, self.hidden_size // self.num_heads
        return super()._weight_shape(name, inputs)

    def _operator_weights(self, own, x, direction):
        D = self.hidden_size // self.num_heads
        w_hh = recurrent_weight(own["weight_hh"].view(4, self.num_heads, D, D))
        return super()._operator_weights(own | {"weight_hh": w_hh}, x, direction)

    def _init_own(self, own):
        own["weight_ih"].normal_(std=math.sqrt(2 / (5 * own["weight_ih"].shape[1])))
        own["weight_hh"].zero_()
        if "bias_ih" in own:
            own["bias_hh"].zero_()
            units = torch.linspace(0, 1, self.hidden_size // self.num_heads)
            own["bias_ih"].zero_().view(4, self.num_heads, -1)[1] = 5 - 12 * units**0.3

    # States.

    def _state_widths(self):
        return (self.hidden_size,) * 4

    def _has_cell_state(self):
        return True

    def _check_state(self, hx, dims, rows):
        if not isinstance(hx, (tuple, list)) or len(hx) != 4:
            kind = f"{len(hx)} states" if isinstance(hx, (tuple, list)) else type(hx).__name__
            raise TypeError(f"hx must be a tuple (h, c, n, m), got {kind}")
        return self._as_state(tuple(errors.check_hidden(self, t, dims, rows) for t in hx))

    def _as_given(self, state):
        h, cells = state
        return (h, *cells.chunk(3, dim=-1))

    def _as_state(self, given):
        h, *cells = given
        return h, torch.cat(cells, dim=-1)

    def extra_repr(self):
        return super().extra_repr() + f", num_heads={self.num_heads}"


def recurrent_weight(blocks):
    """W_hh of blocks (4, heads, D, D), of each gate and head the weights of a unit by hidden units.

    (4*H, D), block-diagonal, or (4*H, H) for heads of which the kernels have no blocks.
    """
    if blocks.shape[-1] % _HEAD_MULTIPLE == 0 or blocks.shape[1] == 1:
        return blocks.flatten(0, 2)
    return torch.cat([torch.block_diag(*gate) for gate in blocks])


def recurrence(preacts, state0, blocks, bias, run=ops.layer):
    """A layer whose input projections are made: what other packages call an sLSTM cell.

    preacts: (T, N, 4*H), gates i, f, z, o; state0: (), or h (1, N, H) and (c, n, m) (1, N, 3*H);
    blocks: as recurrent_weight takes them; bias: (4*H,); run: ops.layer, or what stands for it.
    Returns y (T, N, H) and the state after the last step, as state0.
    """
    projected = bias.new_empty(len(bias), 0)  # W_ih without columns
    weights = projected, recurrent_weight(blocks), bias, torch.zeros_like(bias)
    return run(preacts, None, state0, weights, "slstm", 1)
