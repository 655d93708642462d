"""Writes keras_layers.json beside this file: Keras layers, their weights, an input, their outputs.

Run with KERAS_BACKEND=torch where keras is installed; test_loading.py reads the file.
"""

import json
from pathlib import Path

import keras
import numpy as np

L = keras.layers
LAYERS = {
    "LSTM": lambda: L.LSTM(3, return_sequences=True),
    "LSTM without bias": lambda: L.LSTM(3, return_sequences=True, use_bias=False),
    "LSTM recurrent_dropout": lambda: L.LSTM(3, return_sequences=True, recurrent_dropout=0.3),
    "GRU": lambda: L.GRU(3, return_sequences=True),
    "GRU reset before": lambda: L.GRU(3, return_sequences=True, reset_after=False),
    "GRU without bias": lambda: L.GRU(3, return_sequences=True, use_bias=False),
    "SimpleRNN": lambda: L.SimpleRNN(3, return_sequences=True),
    "SimpleRNN relu": lambda: L.SimpleRNN(3, return_sequences=True, activation="relu"),
    "Bidirectional": lambda: L.Bidirectional(L.GRU(3, return_sequences=True)),
}
ATTRIBUTES = "use_bias", "recurrent_dropout", "reset_after"


def rounded(array):
    """Nested lists of an array, in six decimals."""
    return np.asarray(array, "float64").round(6).tolist()


def described(layer):
    """What from_keras reads of a layer."""
    found = {"class": type(layer).__name__, "weights": [rounded(w) for w in layer.get_weights()]}
    if isinstance(layer, L.Bidirectional):
        both = layer.forward_layer, layer.backward_layer
        return found | {"merge_mode": layer.merge_mode, "directions": [described(d) for d in both]}
    for name in ("activation", "recurrent_activation"):
        if hasattr(layer, name):
            found[name] = getattr(layer, name).__name__
    return found | {name: getattr(layer, name) for name in ATTRIBUTES if hasattr(layer, name)}


def main():
    rng = np.random.default_rng(0)

    def draw(shape):
        return rng.normal(size=shape).round(2).astype("float32")

    x, cases = draw((2, 4, 2)), {}
    for name, make in LAYERS.items():
        layer = make()
        layer.build(x.shape)
        layer.set_weights([draw(w.shape) for w in layer.get_weights()])
        output = keras.ops.convert_to_numpy(layer(x, training=False))
        cases[name] = described(layer) | {"output": rounded(output)}
    file = Path(__file__).with_suffix(".json")
    file.write_text(json.dumps({"keras": keras.__version__, "x": rounded(x), "cases": cases}))


if __name__ == "__main__":
    main()
