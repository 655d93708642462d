"""The recurrent layers of the examples by name, from lstm_fused or from torch.nn."""

import torch

import lstm_fused

KINDS = ("rnn", "gru", "lstm")
BACKENDS = ("fused", "torch")


def layer(kind: str, backend: str) -> type[torch.nn.RNNBase]:
    """The class RNN, GRU or LSTM of lstm_fused (backend "fused") or of torch.nn ("torch").

    Raises:
        KeyError: no such backend.
        AttributeError: no such layer.
    """
    return getattr({"fused": lstm_fused, "torch": torch.nn}[backend], kind.upper())


def hidden_of(state):
    """h_n (L*D, N, R) of the state that a layer returns, which is (h_n, c_n) for an LSTM."""
    return state[0] if isinstance(state, tuple) else state
