"""Layers of other libraries as layers of ours, with their weights: one function a library.

None of these libraries is imported: what is read of a layer are its attributes and arrays.
"""

from lstm_fused.loading.haste import from_haste
from lstm_fused.loading.keras import from_keras
from lstm_fused.loading.onnx import from_onnx
from lstm_fused.loading.tensorflow import from_tensorflow
from lstm_fused.loading.torch import from_fastrnns, from_torchrecurrent

__all__ = [
    "from_fastrnns",
    "from_haste",
    "from_keras",
    "from_onnx",
    "from_tensorflow",
    "from_torchrecurrent",
]
