"""LSTM cells of TensorFlow 1, whose checkpoints are still in use."""

from typing import Any

import torch

from lstm_fused import cells, nn
from lstm_fused.loading.arrays import fill, gates, tensor

_ICFO = (0, 2, 1, 3)  # i c f o


def from_tensorflow(
    kernel: Any,
    bias: Any,
    *,
    forget_bias: float = 1.0,
    peepholes: tuple[Any, Any, Any] | None = None,
    projection: Any = None,
    cell_clip: float | None = None,
    proj_clip: float | None = None,
    batch_first: bool = True,
) -> torch.nn.RNNBase:
    """The LSTM of one cell of TensorFlow 1: ``BasicLSTMCell``, ``LSTMCell``, ``LSTMBlockCell``.

    Sizes: I inputs, H hidden units, R the projection's size or else H.

    Args:
        kernel: (I + R, 4*H), the variable ``kernel``: gates i c f o, the inputs' rows first.
        bias: (4*H,), the variable ``bias``.
        forget_bias: what the cell was constructed with: it adds that to the forget gate in each
            step, and it is not in ``bias``. Added to the weights here.
        peepholes: ``w_i_diag, w_f_diag, w_o_diag`` (H,) each, of a cell with ``use_peepholes``.
        projection: (H, R), the variable ``projection/kernel``, of a cell with ``num_proj``.
        cell_clip, proj_clip: what the cell was constructed with.
        batch_first: for the layer of ours.

    Returns:
        An ``LSTM``; with peepholes a ``PeepholeLSTM``; with a clip a ``RegularizedLSTM``. In the
        weights' dtype, on the CPU.

    Raises:
        ValueError: a shape does not fit.
    """
    kernel, bias, w_hr = tensor(kernel), tensor(bias), tensor(projection)
    H = bias.shape[0] // 4
    R = H if w_hr is None else w_hr.shape[1]
    inputs = kernel.shape[0] - R
    if kernel.dim() != 2 or inputs < 1 or kernel.shape[1] != 4 * H or bias.shape != (4 * H,):
        raise ValueError(
            "kernel must be (I + R, 4 * H) and bias (4 * H,), "
            f"got {tuple(kernel.shape)} and {tuple(bias.shape)}"
        )
    kernel, bias = gates(kernel, _ICFO), gates(bias, _ICFO)
    bias[H : 2 * H] += forget_bias
    part = {"weight_ih": kernel[:inputs].t(), "weight_hh": kernel[inputs:].t()}
    part |= {"bias_ih": bias, "bias_hh": None}
    options: dict[str, Any] = {"proj_size": 0 if w_hr is None else R}
    if w_hr is not None:
        part["weight_hr"] = w_hr.t()
    make: Any = nn.LSTM
    if peepholes is not None:
        make, part["weight_ph"] = cells.PeepholeLSTM, torch.stack([tensor(p) for p in peepholes])
    if cell_clip is not None or proj_clip is not None:
        make = cells.RegularizedLSTM
        options |= {"cell_clip": cell_clip, "proj_clip": proj_clip}
        options["peepholes"] = peepholes is not None
    module = make(inputs, H, batch_first=batch_first, dtype=kernel.dtype, **options)
    return fill(module, [part])
