"""Writes tirex_slstm.json: what an sLSTM cell of the package tirex-ts 1.4.2 computes on a CPU.

In bfloat16, as its torch backend does, and by the same function in float32. The package is no
requirement of the tests, since it brings a dozen others.
"""

import json
from pathlib import Path

import torch
from tirex.models.slstm.cell import sLSTMBlockConfig, sLSTMCell, sLSTMCellTorch

torch.manual_seed(0)
N, T, HEADS, D = 2, 5, 2, 3
cell = sLSTMCell(sLSTMBlockConfig(embedding_dim=HEADS * D, num_heads=HEADS), "torch")
with torch.no_grad():
    for parameter in cell.parameters():
        parameter.copy_(torch.randn(parameter.shape).bfloat16())
x = torch.randn(N, T, 4 * HEADS * D).bfloat16().float()
with torch.no_grad():
    output, state = cell(x, None)
    by_gate = cell._bias_.view(HEADS, 4, D).transpose(0, 1).reshape(-1)
    x_first = cell._get_input(x).flatten(2)
    found = sLSTMCellTorch.slstm_forward(
        x_first, cell._get_state(x_first, None), cell._recurrent_kernel_, by_gate
    )
arrays = {
    "input": x,
    "recurrent_kernel": cell._recurrent_kernel_,
    "bias": cell._bias_,
    "bfloat16_output": output,
    "bfloat16_state": state,
    "float32_output": cell._permute_output(found[0]),
    "float32_state": found[1],
}
text = ",\n".join(f'"{name}": {json.dumps(t.tolist())}' for name, t in arrays.items())
Path(__file__).with_name("tirex_slstm.json").write_text("{" + text + "}\n")
