"""Recurrent nodes of ONNX models."""

from typing import Any

import torch

from lstm_fused import cells, nn
from lstm_fused.loading.arrays import fill, gates, tensor

_IOFC = (0, 2, 3, 1)
_IOF = (0, 2, 1)
_ZRH = (1, 0, 2)
_ACTIVATIONS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh")}
# What the kernels have in place of it, or what is to be done outside.
_ATTRIBUTES = (
    "activations",
    "clip",
    "direction",
    "hidden_size",
    "input_forget",
    "layout",
    "linear_before_reset",
)


def from_onnx(model: Any, node: str | None = None) -> torch.nn.RNNBase:
    """The layer of ours that computes what an LSTM, GRU or RNN node of ONNX does.

    Args:
        model: an ``onnx.ModelProto``, whose initializers hold the node's weights.
        node: the node's name; needed where the model has several such nodes.

    Returns:
        A layer in one or two directions: ``LSTM``, ``GRU`` or ``RNN`` (tanh or relu); with P a
        ``PeepholeLSTM``, with ``input_forget`` a ``CoupledLSTM``, with ``linear_before_reset=0`` a
        ``ResetBeforeGRU``, with ``clip`` a ``RegularizedLSTM`` or ``RegularizedGRU``.
        ``batch_first`` for ``layout=1``. In the weights' dtype, on the CPU. The node's Y is our
        output with an axis for the directions, (T, D, N, H).

    Raises:
        ValueError: there is no such node, or several without a name; a weight is no initializer;
            the direction is ``reverse``; or an attribute has no counterpart.

    ONNX's gates are i o f c and z r h, its peepholes i o f.
    """
    found = [n for n in model.graph.node if n.op_type in ("LSTM", "GRU", "RNN")]
    if node is not None:
        found = [n for n in found if n.name == node]
    if len(found) != 1:
        named = "" if node is None else f" of the name {node!r}"
        raise ValueError(f"the model must have one LSTM, GRU or RNN node{named}, got {len(found)}")
    return _module(found[0], _weights(model, found[0]), _attributes(found[0]))


def _weights(model, node):
    """(W, R, B, P), None for what the node has not."""
    from onnx import numpy_helper

    known = {t.name: t for t in model.graph.initializer}
    for constant in model.graph.node:
        for attribute in constant.attribute if constant.op_type == "Constant" else ():
            if attribute.name == "value":
                known[constant.output[0]] = attribute.t
    found = []
    for k in (1, 2, 3, 7):
        name = node.input[k] if k < len(node.input) else ""
        if name and name not in known:
            raise ValueError(f"input {name!r} of the node is no initializer of the model")
        found.append(tensor(numpy_helper.to_array(known[name]).copy()) if name else None)
    return found


def _attributes(node):
    from onnx import helper

    found = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if unknown := sorted(set(found) - set(_ATTRIBUTES)):
        raise ValueError(f"the node's attributes {', '.join(unknown)} have no counterpart")
    direction = found.get("direction", b"forward").decode()
    if direction == "reverse":
        raise ValueError("a node of direction reverse has no counterpart: flip the input")
    found["directions"] = 2 if direction == "bidirectional" else 1
    return found


def _module(node, weights, attributes):
    w, r, b, p = weights
    kind, directions = node.op_type, attributes["directions"]
    make, order, options = _choose(kind, attributes, p is not None)
    parts = []
    for d in range(directions):
        part = {"weight_ih": gates(w[d], order, 0), "weight_hh": gates(r[d], order, 0)}
        if b is not None:
            b_ih, b_hh = b[d].chunk(2)
            part |= {"bias_ih": gates(b_ih, order), "bias_hh": gates(b_hh, order)}
        if p is not None:
            part["weight_ph"] = torch.stack([p[d].chunk(3)[k] for k in _IOF])
        if make is cells.CoupledLSTM:  # without the forget gate's rows, the second block
            part = {name: _without_second(value) for name, value in part.items()}
        parts.append(part)
    module = make(
        w.shape[2],
        r.shape[2],
        bias=b is not None,
        batch_first=attributes.get("layout", 0) == 1,
        bidirectional=directions == 2,
        dtype=w.dtype,
        **options,
    )
    return fill(module, parts)


def _without_second(w):
    first, _, *others = w.chunk(4)
    return torch.cat((first, *others))


def _choose(kind, attributes, has_peepholes):
    """(class of ours, order of gates, options)."""
    clip = attributes.get("clip")
    given = [a.decode().capitalize() for a in attributes.get("activations", ())]
    if kind == "RNN":
        functions = {g for g in given} or {"Tanh"}
        if clip is not None or len(functions) > 1 or not functions <= {"Tanh", "Relu"}:
            raise ValueError(f"an RNN node must have tanh or relu and no clip, got {attributes}")
        return nn.RNN, (0,), {"nonlinearity": functions.pop().lower()}
    expected = list(_ACTIVATIONS[kind]) * attributes["directions"]
    if given and given != expected:
        raise ValueError(f"the node's activations must be {expected}, got {given}")
    if kind == "GRU":
        if attributes.get("linear_before_reset", 0) == 0:
            if clip is not None:
                raise ValueError("clip with linear_before_reset=0 has no counterpart")
            return cells.ResetBeforeGRU, _ZRH, {}
        return (nn.GRU, _ZRH, {}) if clip is None else (cells.RegularizedGRU, _ZRH, {"clip": clip})
    if attributes.get("input_forget", 0):
        if clip is not None or has_peepholes:
            raise ValueError("input_forget with clip or peepholes has no counterpart")
        return cells.CoupledLSTM, _IOFC, {}
    if clip is not None:
        return cells.RegularizedLSTM, _IOFC, {"clip": clip, "peepholes": has_peepholes}
    return cells.PeepholeLSTM if has_peepholes else nn.LSTM, _IOFC, {}
