"""Layers of cells that torch.nn does not have, with everything that a call of ``LSTM`` takes."""

from typing import Any

from lstm_fused.cells.base import DescribedLayer
from lstm_fused.cells.elementwise import QRNN, SRU, IndRNN, MinGRU, MinLSTM
from lstm_fused.cells.layer_norm import LayerNormGRU, LayerNormLSTM
from lstm_fused.cells.regularized import RegularizedGRU, RegularizedLSTM
from lstm_fused.cells.slstm import SLSTM
from lstm_fused.cells.variants import MGU, CoupledLSTM, PeepholeLSTM, ResetBeforeGRU
from lstm_fused.cells.xlstm import replace_slstm, restore_slstm

MODULES: tuple[type[DescribedLayer[Any]], ...] = (
    RegularizedLSTM,
    RegularizedGRU,
    LayerNormLSTM,
    LayerNormGRU,
    PeepholeLSTM,
    CoupledLSTM,
    ResetBeforeGRU,
    MGU,
    IndRNN,
    MinGRU,
    MinLSTM,
    SRU,
    QRNN,
    SLSTM,
)
__all__ = ["MODULES", "replace_slstm", "restore_slstm"]
__all__ += [module.__name__ for module in MODULES]
