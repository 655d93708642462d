"""The layers of cells beyond torch.nn, as loops.by_steps takes them. Sizes are T, N, I, H."""

import torch
from torch.func import functional_call

from lstm_fused import cells
from lstm_fused.fallback import _warned

# {name: (class, options)} of every cell, with the options that decide which cell runs.
MODULES = {module.__name__: (module, {}) for module in cells.MODULES} | {
    "clips": (cells.RegularizedLSTM, {"clip": 0.6, "cell_clip": 0.5, "peepholes": True}),
    "zoneout": (cells.RegularizedLSTM, {"zoneout_h": 0.3, "zoneout_c": 0.2}),
    "GRU zoneout": (cells.RegularizedGRU, {"zoneout": 0.3, "clip": 0.6}),
    "carries LN(c)": (cells.LayerNormLSTM, {"carries_normalized": True}),
    "IndRNN tanh": (cells.IndRNN, {"nonlinearity": "tanh"}),
    "SRU rescaled": (cells.SRU, {"rescale": True, "highway_bias": -0.5}),
    "QRNN window": (cells.QRNN, {"window": 3}),
    "SLSTM": (cells.SLSTM, {"num_heads": 2}),
    "SLSTM one head": (cells.SLSTM, {"num_heads": 1}),
}

_BY_OPTIONS = sorted(MODULES.values(), key=lambda entry: -len(entry[1]))


def make(name, *sizes, **options):
    """The module, in float64 and, since masks are random, in evaluation mode."""
    cls, own = MODULES[name]
    return cls(*sizes, **{"dtype": torch.float64} | own | options).eval()


def one_layer(module, k, d, x):
    """A function (x (T, 1, I), hx) of layer k in direction d, by a module of this layer alone."""
    own = next(o for c, o in _BY_OPTIONS if c is type(module) and _has(module, o))
    options = {"bias": module.bias, "dtype": x.dtype} | own
    if module.proj_size:
        options["proj_size"] = module.proj_size
    with torch.random.fork_rng(devices=[]):
        layer = type(module)(x.shape[2], module.hidden_size, **options).eval()
    suffix = f"_l{k}{'_reverse' if d else ''}"
    weights = {
        name: getattr(module, name.removesuffix("_l0") + suffix) for name in layer.state_dict()
    }
    return lambda *given: functional_call(layer, weights, given)


def _has(module, options):
    return all(getattr(module, name) == value for name, value in options.items())


def allow_reference(monkeypatch):
    """Let the reference run without the warning that is an error in tests."""
    monkeypatch.setattr("lstm_fused.fallback._warned", _Everything(_warned))


class _Everything(set):
    def __contains__(self, message):
        return True
