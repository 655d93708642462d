"""The one table of tolerances. A result may be off by twice nn.LSTM's own error plus its floor.

A floor is counted in units of eps(dtype) times the largest value of the tensor. It covers what
nn.LSTM's error cannot: a tensor so small that nn.LSTM happens to round to the right side.
"""

import torch

FLOOR = {
    # Three rounded functions (two of 2.5 ulp each) and their product.
    "y": 8,
    # The same, through a last step.
    "h_n": 8,
    # No output function, one sum.
    "c_n": 8,
    # A sum over 4H products of factors that themselves took six roundings.
    "d_x": 16,
    "d_h0": 16,
    # The same recurrence without the matrix product.
    "d_c0": 16,
    # Sums over all T * N rows.
    "d_weight": 16,
    "d_bias": 16,
}


def kind(name):
    """The row of the table for a tensor: d_weight_hh_l1_reverse is a d_weight."""
    return name if name in FLOOR else "_".join(name.split("_")[:2])


def allowed(name, dtype, torch_error, largest):
    """The largest absolute error a tensor called name may have."""
    return 2 * torch_error + FLOOR[kind(name)] * torch.finfo(dtype).eps * largest
