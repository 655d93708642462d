"""torch.nn.LSTM, fused: a drop-in module on our own kernels."""

from lstm_fused.explain import explain
from lstm_fused.nn import LSTM
from lstm_fused.replace import replace, restore

__version__ = "0.1.0"

__all__ = ["LSTM", "__version__", "explain", "replace", "restore"]
