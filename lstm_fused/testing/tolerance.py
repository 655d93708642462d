"""The one table of tolerances. A result may be off by twice torch.nn's own error plus its floor.

A floor is counted in eps(dtype) times the largest value of the tensor. It stands for what twice
nn.LSTM's error cannot: functions of 2.5 ulp where torch's have 1, and tensors so small that nn.LSTM
happens to round to the right side.
"""

import math

import torch
from torch import Tensor

WIDE = {
    # o * tanh(c), two such functions and a product, after c.
    "y": 8,
    "h_n": 8,
    # f * c + i * g: three such functions, two products, a sum, and the steps before.
    "c_n": 8,
    # Products of the gates' slopes with weights: the errors of the states, and no long sum.
    "d_x": 8,
    "d_h0": 8,
    "d_c0": 8,
    # The same slopes summed over all T * N rows, where they may cancel.
    "d_weight": 12,
    "d_bias": 12,
    "d_vectors": 12,
    # A sum before relu, no function yet: a rounding error may make it change sides of 0.
    "relu_preact": 8,
}

# The kernel computes in float32, so that only the last rounding is left: half an ulp, which is up
# to one eps of the largest value.
NARROW = dict.fromkeys(WIDE, 1)

FLOOR = {
    torch.float32: WIDE,
    torch.float64: WIDE,
    torch.bfloat16: NARROW,
    torch.float16: NARROW,
}


def allowed(name: str, dtype: torch.dtype, torch_error: float, largest: float) -> float:
    """The largest absolute error that a tensor, such as y or d_weight_hh_l1_reverse, may have."""
    table = FLOOR[dtype]
    kind = name if name in table else "_".join(name.split("_")[:2])
    return 2 * torch_error + table[kind] * torch.finfo(dtype).eps * largest


def error_of(found: Tensor | None, exact: Tensor) -> float:
    """The largest absolute difference; infinite if a shape differs or anything is not finite."""
    if found is None or found.shape != exact.shape:
        return math.inf
    error = (found.double() - exact).abs().max().item() if exact.numel() else 0.0
    return error if error < math.inf else math.inf


# Losses of the first steps of a training and what the model then gives, relative to the largest:
# every step hands its rounding on to the next.
TRAINED = 1e-4
