"""The recurrent layers of the examples, by name: fused ones, or torch's own to compare with."""

import torch

import lstm_fused

KINDS = ("rnn", "gru", "lstm")
BACKENDS = ("fused", "torch")


def layer(kind: str, backend: str) -> type[torch.nn.RNNBase]:
    """The class of a layer: lstm_fused's or torch.nn's RNN, GRU or LSTM, all called alike.

    Raises:
        KeyError: no such backend.
        AttributeError: no such layer.
    """
    return getattr({"fused": lstm_fused, "torch": torch.nn}[backend], kind.upper())


def hidden_of(state):
    """h_n (L*D, N, R) of the state that a layer returns: an LSTM's holds c_n as well."""
    return state[0] if isinstance(state, tuple) else state
