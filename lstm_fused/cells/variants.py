"""Variants of LSTM and GRU with other gates.

Sizes: I inputs, H hidden units, R recurrent width.
"""

from lstm_fused.cells.base import HiddenState, TwoStates


class PeepholeLSTM(TwoStates):
    """LSTM whose gates see the cell state: those of input and forgetting the one before the step,
    that of output the new one.

    ``i = sigmoid(W_i x + R_i h + b_i + p_i * c)``, ``f`` likewise, ``g = tanh(W_g x + R_g h +
    b_g)``, ``c' = f c + i g``, ``o = sigmoid(W_o x + R_o h + b_o + p_o * c')``, ``h' = o
    tanh(c')``. Arguments of the constructor and of a call, shapes and errors are those of
    ``lstm_fused.LSTM``.

    Weights: those of ``LSTM``, gates i f g o, and ``weight_ph_l{k}`` (3, H): p_i, p_f, p_o.

    Gers and Schmidhuber, Recurrent Nets that Time and Count, 2000; ONNX's LSTM with P.
    """

    cell = "peephole_lstm"
    gates = 4
    vectors = ("weight_ph", 3)


class CoupledLSTM(TwoStates):
    """LSTM whose forget gate is 1 - i, so that it has three gates (CIFG).

    ``i = sigmoid(W_i x + R_i h + b_i)``, ``g`` and ``o`` as in ``LSTM``, ``c' = (1 - i) c + i g``,
    ``h' = o tanh(c')``. Arguments of the constructor and of a call, shapes and errors are those of
    ``lstm_fused.LSTM``.

    Weights: those of ``LSTM`` with the gates i g o.

    Greff, Srivastava, Koutnik, Steunebrink and Schmidhuber, LSTM: A Search Space Odyssey, 2017;
    ONNX's LSTM with ``input_forget``.
    """

    cell = "coupled_lstm"
    gates = 3


class ResetBeforeGRU(HiddenState):
    """GRU whose reset gate multiplies h before the product with the candidate's weights.

    ``r = sigmoid(W_r x + R_r h + b_r)``, ``z`` likewise, ``n = tanh(W_n x + R_n (r * h) + b_n)``,
    ``h' = (1 - z) n + z h``. ``lstm_fused.GRU`` multiplies the product, as torch and cuDNN do.
    Arguments of the constructor and of a call, shapes and errors are those of ``GRU``, and so are
    the weights, gates r z n.

    Cho et al., Learning Phrase Representations using RNN Encoder-Decoder for Statistical Machine
    Translation, 2014; Keras with ``reset_after=False``, ONNX with ``linear_before_reset=0``.
    """

    cell = "reset_before_gru"
    gates = 3


class MGU(HiddenState):
    """Minimal gated unit: one gate, which resets and updates.

    ``f = sigmoid(W_f x + R_f h + b_f)``, ``n = tanh(W_n x + R_n (f * h) + b_n)``, ``h' = (1 - f)
    h + f n``. Arguments of the constructor and of a call, shapes and errors are those of
    ``lstm_fused.GRU``; the weights are those of two gates, f n.

    Zhou, Wu, Zhang and Zhou, Minimal Gated Unit for Recurrent Neural Networks, 2016.
    """

    cell = "mgu"
    gates = 2
