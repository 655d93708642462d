"""Writes sru_layers.json: weights of the package sru's SRUCell, 2.6.0, and what it computes.

Importing it compiles C++ for a minute, so that it is no requirement of the tests.
"""

import json
import warnings
from pathlib import Path

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that it compiles no CUDA kernels
    import sru

torch.manual_seed(0)
T, N, H = 4, 2, 4
found = {}
for name, inputs in {"identity": H, "skip": 3}.items():
    layer = sru.SRUCell(inputs, H, rescale=False).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_((0.5 * torch.randn_like(parameter)).half())  # short numbers
    x = torch.randn(T, N, inputs).half().double().requires_grad_()
    y, c = layer(x)
    (y * torch.linspace(-1, 1, H, dtype=x.dtype)).sum().backward()
    arrays = {"x": x, "y": y, "h_n": c[None], "d_x": x.grad}
    weights = {key: w.tolist() for key, w in layer.named_parameters()}
    found[name] = {"weights": weights, "arrays": {key: t.tolist() for key, t in arrays.items()}}
text = ",\n".join(f"{json.dumps(name)}: {json.dumps(each)}" for name, each in found.items())
Path(__file__).with_name("sru_layers.json").write_text("{" + text + "}\n")
