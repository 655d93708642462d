"""Layers of haste, the library of lmnt-com."""

from typing import Any

import torch

from lstm_fused import cells, nn
from lstm_fused.loading.arrays import fill, gates, tensor

_IGFO = (0, 2, 1, 3)
_ZRG = (1, 0, 2)


def from_haste(layer: Any) -> torch.nn.RNNBase:
    """The layer of ours that computes what a layer of ``haste_pytorch`` does, with its weights.

    Args:
        layer: a ``haste_pytorch.LSTM``, ``GRU``, ``IndRNN``, ``LayerNormLSTM`` or
            ``LayerNormGRU``.

    Returns:
        An ``LSTM``, ``GRU``, ``IndRNN`` (tanh), ``LayerNormLSTM`` or ``LayerNormGRU``; with
        ``zoneout`` or ``dropout``, its DropConnect, a ``RegularizedLSTM`` or ``RegularizedGRU``.
        In the weights' dtype, on the CPU. ``return_state_sequence`` is not taken over.

    Raises:
        ValueError: the layer is of another class, or has zoneout or dropout and is none of the
            first two.

    haste's gates are i g f o and z r g, its kernels (I, G*H) and (H, G*H).
    """
    kind = type(layer).__name__
    if kind not in _PARTS:
        raise ValueError(f"from_haste knows {', '.join(_PARTS)}, got a {kind}")
    make, options, part = _PARTS[kind](layer)
    zoneout, drop = getattr(layer, "zoneout", 0), getattr(layer, "dropout", 0)
    if zoneout or drop:
        if kind not in ("LSTM", "GRU"):
            raise ValueError(f"zoneout and dropout of a {kind} have no counterpart")
        make = cells.RegularizedLSTM if kind == "LSTM" else cells.RegularizedGRU
        options = {"zoneout_h" if kind == "LSTM" else "zoneout": zoneout, "weight_dropout": drop}
    module = make(
        layer.input_size,
        layer.hidden_size,
        batch_first=layer.batch_first,
        dtype=part["weight_ih"].dtype,
        **options,
    )
    return fill(module, [part])


def _kernels(layer, order):
    return {
        "weight_ih": gates(tensor(layer.kernel), order).t(),
        "weight_hh": gates(tensor(layer.recurrent_kernel), order).t(),
        "bias_ih": gates(tensor(layer.bias), order),
    }


def _lstm(layer):
    return nn.LSTM, {}, _kernels(layer, _IGFO) | {"bias_hh": None}


def _gru(layer):
    b_hh = gates(tensor(layer.recurrent_bias), _ZRG)
    return nn.GRU, {}, _kernels(layer, _ZRG) | {"bias_hh": b_hh}


def _gammas(layer, order):
    gamma_ih, gamma_hh = gates(tensor(layer.gamma), order)
    return {"gamma_ih": gamma_ih, "gamma_hh": gamma_hh}


def _layer_norm_lstm(layer):
    part = _lstm(layer)[2] | _gammas(layer, _IGFO)
    part |= {"gamma_c": tensor(layer.gamma_h), "beta_c": tensor(layer.beta_h)}
    return cells.LayerNormLSTM, {}, part


def _layer_norm_gru(layer):
    return cells.LayerNormGRU, {}, _gru(layer)[2] | _gammas(layer, _ZRG)


def _ind_rnn(layer):
    part = {
        "weight_ih": tensor(layer.kernel).t(),
        "bias_ih": tensor(layer.bias),
        "weight_u": tensor(layer.recurrent_scale).unsqueeze(0),
    }
    return cells.IndRNN, {"nonlinearity": "tanh"}, part


_PARTS = {
    "LSTM": _lstm,
    "GRU": _gru,
    "IndRNN": _ind_rnn,
    "LayerNormLSTM": _layer_norm_lstm,
    "LayerNormGRU": _layer_norm_gru,
}
