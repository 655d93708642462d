"""Layers of cells that torch.nn does not have, and xlstm's: their modules, Python loops, oracle."""

import functools
import importlib.util

import torch

from bench.cases import DTYPES, LAYERS, XLSTM, Workload
from lstm_fused import by_reference, cells


class XlstmLayer(torch.nn.Module):
    """The package's sLSTM layer without a convolution, as TiRex has it, called as a torch.nn layer.

    Its vanilla backend is a Python loop.
    """

    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        from xlstm.blocks.slstm.layer import sLSTMLayer, sLSTMLayerConfig

        options = {"backend": "vanilla", "recurrent_weight_init": "standard"}
        self.layer = sLSTMLayer(
            sLSTMLayerConfig(embedding_dim=width, num_heads=heads, conv1d_kernel_size=0, **options)
        )

        # A sum over what is normalized with equal weights is constant: its gradients are rounding.
        torch.nn.init.normal_(self.layer.group_norm.weight)

    def forward(self, x, state=None):
        """x (T, N, H), state None -> y (T, N, H) and the cell's state (4, N, H)."""
        y, states = self.layer(x.transpose(0, 1), return_last_state=True)
        return y.transpose(0, 1), states["slstm_state"]

    def flatten_parameters(self):
        """As modules of torch.nn have it."""


def build(work: Workload, device: str) -> torch.nn.Module:
    """Evaluated, so that zoneout is its expectation and every provider computes the same."""
    if work.cell == XLSTM:
        module = XlstmLayer(work.I)
    else:
        module = getattr(cells, work.cell)(work.I, work.H, **LAYERS[work.cell])
        for name, w in module.named_parameters():
            if name.startswith("gamma_hh"):
                # With weights of 1 the recurrence is chaotic before it is trained: any rounding
                # error grows a thousandfold in 100 steps.
                torch.nn.init.constant_(w, 0.25)
    return module.to(device, DTYPES[work.dtype]).eval()


def _by_loop(module, run):
    return type(module)._layer(module, by_reference.layer)


def looped(module: torch.nn.Module) -> torch.nn.Module:
    """module, whose layers of ours run as a Python loop over the reference's step."""
    for each in module.modules():
        if hasattr(each, "_layer"):
            each._layer = functools.partial(_by_loop, each)
    return module


def absent_reason(work: Workload) -> str | None:
    if work.cell == XLSTM:
        return None if importlib.util.find_spec("xlstm") else "xlstm is not installed"
    return None if hasattr(cells, work.cell) else f"lstm_fused.cells has no {work.cell}"
