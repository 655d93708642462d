"""Writes haste_layers.json: weights of layers of haste_pytorch 0.5.0rc0, and what they compute.

haste builds with CUDA only, so that no test can require it. On a CPU its layers run as Python, in
the files that this is given the folder of: frameworks/pytorch of the source distribution.
"""

import importlib.util
import json
import sys
import types
from pathlib import Path

import torch

sys.modules["haste_pytorch_lib"] = types.ModuleType("haste_pytorch_lib")
folder = Path(sys.argv[1])
spec = importlib.util.spec_from_file_location("haste_pytorch", folder / "__init__.py")
haste = sys.modules["haste_pytorch"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(haste)

torch.manual_seed(0)
T, N, INPUTS, H = 4, 2, 3, 4
LAYERS = {
    "LSTM": {},
    "LSTM with zoneout": {"zoneout": 0.25},
    "GRU": {},
    "GRU with zoneout": {"zoneout": 0.25},
    "IndRNN": {},
    "LayerNormLSTM": {},
    "LayerNormGRU": {},
}
found = {}
for name, options in LAYERS.items():
    layer = getattr(haste, name.partition(" ")[0])(INPUTS, H, **options).double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
            parameter.copy_(parameter.half())  # short numbers
    x = torch.randn(T, N, INPUTS).half().double().requires_grad_()
    y, state = layer(x)
    states = state if isinstance(state, tuple) else (state,)
    (y * torch.linspace(-1, 1, H, dtype=x.dtype)).sum().backward()
    arrays = {"x": x, "y": y, "d_x": x.grad} | dict(zip(("h_n", "c_n"), states, strict=False))
    weights = {key: w.tolist() for key, w in layer.named_parameters()}
    arrays = {key: t.tolist() for key, t in arrays.items()}
    found[name] = {"options": options, "weights": weights, "arrays": arrays}
text = ",\n".join(f"{json.dumps(name)}: {json.dumps(each)}" for name, each in found.items())
Path(__file__).with_name("haste_layers.json").write_text("{" + text + "}\n")
