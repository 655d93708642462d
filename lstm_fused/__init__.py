"""torch.nn.LSTM, GRU and RNN, fused: drop-in modules on our own kernels."""

from lstm_fused import _loaded, integrations, loading, rl  # noqa: F401  _loaded first
from lstm_fused.cells import (
    MGU,
    QRNN,
    SLSTM,
    SRU,
    CoupledLSTM,
    IndRNN,
    LayerNormGRU,
    LayerNormLSTM,
    MinGRU,
    MinLSTM,
    PeepholeLSTM,
    RegularizedGRU,
    RegularizedLSTM,
    ResetBeforeGRU,
    replace_slstm,
    restore_slstm,
)
from lstm_fused.compile_cell import compile_cell
from lstm_fused.explain import explain
from lstm_fused.export import decompositions
from lstm_fused.gradient_flow import gradient_flow
from lstm_fused.nn import GRU, LSTM, RNN
from lstm_fused.quantization import dequantize_, quantize_
from lstm_fused.replace import replace, restore
from lstm_fused.single_step import GRUCell, LSTMCell, RNNCell
from lstm_fused.states import (
    batch_first_state,
    detach_state,
    select_state,
    truncated_bptt,
    where_state,
)
from lstm_fused.streams import stream

__version__ = "0.1.0"

__all__ = [
    "CoupledLSTM",
    "GRU",
    "GRUCell",
    "IndRNN",
    "LSTM",
    "LSTMCell",
    "LayerNormGRU",
    "LayerNormLSTM",
    "MGU",
    "MinGRU",
    "MinLSTM",
    "PeepholeLSTM",
    "QRNN",
    "RNN",
    "RNNCell",
    "RegularizedGRU",
    "RegularizedLSTM",
    "ResetBeforeGRU",
    "SLSTM",
    "SRU",
    "__version__",
    "batch_first_state",
    "compile_cell",
    "decompositions",
    "dequantize_",
    "detach_state",
    "explain",
    "gradient_flow",
    "quantize_",
    "replace",
    "replace_slstm",
    "restore",
    "restore_slstm",
    "select_state",
    "stream",
    "truncated_bptt",
    "where_state",
]

integrations.register()
