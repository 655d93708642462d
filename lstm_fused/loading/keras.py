"""Keras layers, of Keras 2 and 3 with any backend, and those of TF Addons."""

from typing import Any

import torch

from lstm_fused import cells, nn
from lstm_fused.loading.arrays import fill, gates, tensor

_LSTM = (0, 1, 2, 3)  # i f c o
_GRU = (1, 0, 2)  # z r h


def from_keras(layer: Any) -> torch.nn.RNNBase:
    """The layer of ours that computes what a Keras layer does, with its weights.

    Args:
        layer: a built ``LSTM``, ``GRU``, ``SimpleRNN``, or ``RNN`` around TF Addons'
            ``LayerNormLSTMCell``, or a ``Bidirectional`` with ``merge_mode="concat"`` around one of
            these; or a list of them, the layers of a stack with ``return_sequences=True``.

    Returns:
        An ``LSTM``, ``GRU``, ``RNN`` (tanh or relu), a ``ResetBeforeGRU`` for
        ``reset_after=False``, a ``LayerNormLSTM``; with ``recurrent_dropout`` a
        ``RegularizedLSTM`` or ``RegularizedGRU``. ``batch_first=True`` as in Keras, the dtype of
        the weights, on the CPU. It returns output and state; the output that Keras gives with
        ``return_sequences=False`` is the last layer's ``h_n``. ``dropout``, of the inputs of a
        Keras layer, is not taken over.

    Raises:
        ValueError: the layer is of another class, has not been built, or has an activation or an
            option that ours has not, or the layers of a list differ.

    Keras's gates are i f c o and z r h; its GRU has one bias, with ``reset_after=True`` two.
    """
    layers = list(layer) if isinstance(layer, (list, tuple)) else [layer]
    if not layers:
        raise ValueError("layer must be a layer or a list with at least one")
    described = [_describe(each) for each in layers]
    kinds = {(make, str(options), len(parts)) for make, options, _, parts in described}
    if len(kinds) != 1:
        raise ValueError("the layers of a list must be of one class, with the same options")
    make, options, (inputs, hidden), first = described[0]
    module = make(
        inputs,
        hidden,
        num_layers=len(layers),
        bidirectional=len(first) == 2,
        batch_first=True,
        dtype=first[0]["weight_ih"].dtype,
        **options,
    )
    return fill(module, [part for *_, parts in described for part in parts])


def _describe(layer):
    """(class of ours, its options, (I, H), the weights of each direction)."""
    if type(layer).__name__ != "Bidirectional":
        if getattr(layer, "go_backwards", False):
            raise ValueError("go_backwards=True has no counterpart: flip the input")
        make, options, sizes, part = _describe_one(layer)
        return make, options, sizes, [part]
    if layer.merge_mode != "concat":
        raise ValueError(f'merge_mode must be "concat", got {layer.merge_mode!r}')
    (make, options, sizes, one), (other, more, others, two) = (
        _describe_one(each) for each in (layer.forward_layer, layer.backward_layer)
    )
    if (make, options, sizes) != (other, more, others):
        raise ValueError("both directions of a Bidirectional must be of one class and size")
    return make, options, sizes, [one, two]


def _describe_one(layer):
    cell = getattr(layer, "cell", layer)
    kind = type(cell).__name__.removesuffix("Cell")
    if kind not in _KINDS:
        raise ValueError(f"from_keras knows {', '.join(_KINDS)}, got a {type(layer).__name__}")
    weights = [tensor(w) for w in layer.get_weights()]
    if not weights:
        raise ValueError(f"the {type(layer).__name__} has no weights: build it, or call it once")
    make, options, part = _KINDS[kind](cell, *weights)
    w_ih = part["weight_ih"]
    part["weight_ih"], part["weight_hh"] = w_ih.t(), part["weight_hh"].t()
    if not cell.use_bias:
        options["bias"] = False
        part = {name: w for name, w in part.items() if not name.startswith("bias")}
    return make, options, (w_ih.shape[0], part["weight_hh"].shape[1]), part


def _activations(cell, **expected):
    for name, allowed in expected.items():
        given = getattr(cell, name)
        given = getattr(given, "__name__", str(given))
        if given not in allowed:
            raise ValueError(f"{name} must be {' or '.join(allowed)}, got {given}")


def _regularized(cell, plain, regularized):
    """(class, options) by whether the cell has recurrent dropout."""
    p = getattr(cell, "recurrent_dropout", 0.0)
    return (regularized, {"recurrent_dropout": p}) if p else (plain, {})


def _lstm(cell, kernel, recurrent_kernel, bias=None):
    _activations(cell, activation=("tanh",), recurrent_activation=("sigmoid",))
    make, options = _regularized(cell, nn.LSTM, cells.RegularizedLSTM)
    part = {"weight_ih": kernel, "weight_hh": recurrent_kernel, "bias_ih": bias, "bias_hh": None}
    return make, options, part


def _gru(cell, kernel, recurrent_kernel, bias=None):
    _activations(cell, activation=("tanh",), recurrent_activation=("sigmoid",))
    make, options = _regularized(cell, nn.GRU, cells.RegularizedGRU)
    if not cell.reset_after:
        if options:
            raise ValueError("recurrent_dropout with reset_after=False has no counterpart")
        make = cells.ResetBeforeGRU
    both = [None, None]
    if bias is not None:
        both = list(bias) if bias.dim() == 2 else [bias, None]
    b_ih, b_hh = (None if b is None else gates(b, _GRU) for b in both)
    kernels = {"weight_ih": gates(kernel, _GRU), "weight_hh": gates(recurrent_kernel, _GRU)}
    return make, options, kernels | {"bias_ih": b_ih, "bias_hh": b_hh}


def _simple_rnn(cell, kernel, recurrent_kernel, bias=None):
    _activations(cell, activation=("tanh", "relu"))
    if getattr(cell, "recurrent_dropout", 0):
        raise ValueError("recurrent_dropout of a SimpleRNN has no counterpart")
    part = {"weight_ih": kernel, "weight_hh": recurrent_kernel, "bias_ih": bias, "bias_hh": None}
    return nn.RNN, {"nonlinearity": cell.activation.__name__}, part


def _layer_norm_lstm(cell, *_):
    """TF Addons', whose weights are read by name."""
    _activations(cell, activation=("tanh",), recurrent_activation=("sigmoid",))
    if getattr(cell, "recurrent_dropout", 0):
        raise ValueError("recurrent_dropout of a LayerNormLSTMCell has no counterpart")

    def value(of, name):
        found = getattr(of, name)
        return tensor(found.numpy() if hasattr(found, "numpy") else found)

    beta = value(cell.kernel_norm, "beta")
    if cell.use_bias:
        beta = beta + value(cell, "bias")
    part = {
        "weight_ih": value(cell, "kernel"),
        "weight_hh": value(cell, "recurrent_kernel"),
        "bias_ih": beta,
        "bias_hh": value(cell.recurrent_norm, "beta"),
        "gamma_ih": value(cell.kernel_norm, "gamma"),
        "gamma_hh": value(cell.recurrent_norm, "gamma"),
        "gamma_c": value(cell.state_norm, "gamma"),
        "beta_c": value(cell.state_norm, "beta"),
    }
    options = {"carries_normalized": True, "eps": cell.kernel_norm.epsilon}
    return cells.LayerNormLSTM, options, part


_KINDS = {
    "LSTM": _lstm,
    "GRU": _gru,
    "SimpleRNN": _simple_rnn,
    "LayerNormLSTM": _layer_norm_lstm,
}
