"""Layers of cells that others have written in torch."""

from typing import Any

import torch

from lstm_fused import cells
from lstm_fused.loading.arrays import fill, tensor


def from_torchrecurrent(layer: Any) -> torch.nn.RNNBase:
    """The layer of ours that computes what a layer of ``torchrecurrent`` does, with its weights.

    Args:
        layer: a ``PeepholeLSTM``, ``MGU`` or ``IndRNN`` of that package, of any number of layers,
            with the activations that are its defaults (an ``IndRNN`` may have relu).

    Returns:
        Our layer of the same name, in the weights' dtype, on the CPU.

    Raises:
        ValueError: the layer is of another class, or has another activation, or no bias.
    """
    kind = type(layer).__name__
    if kind not in ("PeepholeLSTM", "MGU", "IndRNN"):
        raise ValueError(f"from_torchrecurrent knows PeepholeLSTM, MGU and IndRNN, got a {kind}")
    parts, functions = [], set()
    for cell in layer.cells:
        given = {name: tensor(w) for name, w in cell.named_parameters()}
        if "bias_ih" not in given or "bias_hh" not in given:
            raise ValueError("the layer must have both biases")
        gate = type(getattr(cell, "gate_act", torch.nn.Sigmoid())).__name__
        functions.add((type(cell.act).__name__, gate))
        if kind == "PeepholeLSTM":
            given["weight_ph"] = given["weight_ph"].view(3, -1)
        if kind == "IndRNN":
            given["weight_u"] = given.pop("vector_u").unsqueeze(0)
            given["bias_ih"] = given["bias_ih"] + given.pop("bias_hh")
        parts.append(given)
    (act, gate), *others = functions
    allowed = ("Tanh", "ReLU") if kind == "IndRNN" else ("Tanh",)
    if others or act not in allowed or gate != "Sigmoid":
        raise ValueError(f"the activations must be {' or '.join(allowed)} and Sigmoid, got {act}")
    options = {"nonlinearity": act.lower()} if kind == "IndRNN" else {}
    module = getattr(cells, kind)(
        layer.input_size,
        layer.hidden_size,
        num_layers=len(parts),
        batch_first=layer.batch_first,
        dropout=layer.dropout,
        dtype=parts[0]["weight_ih"].dtype,
        **options,
    )
    return fill(module, parts)


def from_fastrnns(cell: Any, *, batch_first: bool = False) -> torch.nn.RNNBase:
    """The layer of ours of a ``LayerNormLSTMCell`` of torch's fastrnns benchmark.

    Args:
        cell: of that class in ``benchmarks/fastrnns/custom_lstms.py`` of torch's repository: a
            module with ``weight_ih`` (4*H, I), ``weight_hh`` (4*H, H) and ``layernorm_i``,
            ``layernorm_h`` (4*H,), ``layernorm_c`` (H,), each a ``torch.nn.LayerNorm`` or one of
            that file, without weights for ``decompose_layernorm``.
        batch_first: for the layer of ours.

    Returns:
        A ``LayerNormLSTM`` with ``carries_normalized=True``, in the weights' dtype, on the CPU.

    Raises:
        AttributeError: the cell has not these weights.
    """
    w_ih, w_hh = tensor(cell.weight_ih), tensor(cell.weight_hh)
    H = w_hh.shape[1]
    norms = [cell.layernorm_i, cell.layernorm_h, cell.layernorm_c]
    gammas = [tensor(norm.weight) for norm in norms]
    betas = [tensor(norm.bias) for norm in norms]
    module = cells.LayerNormLSTM(
        w_ih.shape[1],
        H,
        batch_first=batch_first,
        carries_normalized=True,
        eps=getattr(norms[0], "eps", 1e-5),
        dtype=w_ih.dtype,
    )
    part = {"weight_ih": w_ih, "weight_hh": w_hh, "bias_ih": betas[0], "bias_hh": betas[1]}
    part |= {"gamma_ih": gammas[0], "gamma_hh": gammas[1], "gamma_c": gammas[2]}
    return fill(module, [part | {"beta_c": betas[2]}])
