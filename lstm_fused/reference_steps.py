"""One step of every cell in plain torch, each as its source writes it.

A step is ``step(x, state, w_ih, w_hh, b_ih, b_hh, w_hr, vectors, masks)`` and returns the state
after it. n rows, I inputs, H hidden units, R recurrent width, G gates, K cell states:

- x (n, I); state (h (n, R),), with c (n, K * H) behind it if the cell has cell states
- w_ih (G*H, I), or (G*H, 0): x (n, G*H) is the input's part of the pre-activations already
- w_hh (G*H, R), or (G*H, H / heads), block-diagonal, or (G*H, 0): there is no such part
- b_ih and b_hh (G*H,), or None; w_hr (R, H), a projection of h, or None
- vectors (V, H), parameters of a unit; masks (n, M, H), values of a unit for this step; or None
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid


class Cell(NamedTuple):
    """A cell's step, and what the layer has to know of it."""

    step: Callable
    gates: int
    cells: int = 0  # cell states
    vectors: int = 0
    masks: int = 0


def _linear(x, w, b):
    return x @ w.t() if b is None else x @ w.t() + b


def _of_input(x, w_ih, b_ih):
    """What x gives the pre-activations, (n, G*H), by each form of w_ih."""
    if w_ih.shape[1] or not x.shape[1]:
        return _linear(x, w_ih, b_ih)
    return x + _linear(x[:, :0], w_ih, b_ih)  # of no column the product is zeros


def _recurrent(h, w_hh, b_hh, gates):
    """What the hidden state gives the pre-activations, (n, G*H), by each form of w_hh."""
    H, width = w_hh.shape[0] // gates, w_hh.shape[1]
    if width in (0, h.shape[1]):
        return _linear(h[:, :width], w_hh, b_hh)
    # Unit u of head k sees the hidden units of its head alone.
    by_head = w_hh.unflatten(0, (gates, H // width, width))
    product = torch.einsum("nkj,gkuj->ngku", h.unflatten(1, (-1, width)), by_head).flatten(1)
    return product if b_hh is None else product + b_hh


def _preacts(x, h, w_ih, w_hh, b_ih, b_hh, gates):
    """The pre-activations of a cell that sums both parts: (n, H) of each gate."""
    sums = _of_input(x, w_ih, b_ih) + _recurrent(h, w_hh, b_hh, gates)
    return sums.chunk(gates, dim=1)


def _of_hidden(h, w_hh, b_hh, gates, count):
    """What h gives the pre-activations of the first `count` gates, (n, H) each; zeros for the
    others."""
    H = w_hh.shape[0] // gates
    b = None if b_hh is None else b_hh[: count * H]
    sums = _recurrent(h, w_hh[: count * H], b, count).split(H, dim=1) if count else ()
    return [*sums, *[torch.zeros_like(h)] * (gates - count)]


def _last_gate(operand, w_hh, b_hh, gates):
    """What an operand in the place of h gives the last gate, (n, H)."""
    H = w_hh.shape[0] // gates
    return _linear(operand, w_hh[-H:], None if b_hh is None else b_hh[-H:])


def _projected(h, w_hr):
    return h if w_hr is None else _linear(h, w_hr, None)


def _clipped(x, bound):
    """x within [-bound, bound]; the bound has no gradient."""
    return torch.clamp(x, -bound.detach(), bound.detach())


def _lstm(x, state, w_ih, w_hh, b_ih, b_hh, w_hr, *_):
    """Hochreiter & Schmidhuber 1997 in torch.nn.LSTM's form; the projection is Sak et al. 2014."""
    h, c = state
    i, f, g, o = (_linear(x, w_ih, b_ih) + _linear(h, w_hh, b_hh)).chunk(4, dim=1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return _projected(h, w_hr), c


def _gru(x, state, w_ih, w_hh, b_ih, b_hh, *_):
    """Cho et al. 2014 in torch.nn.GRU's form."""
    (h,) = state
    r_x, z_x, n_x = _linear(x, w_ih, b_ih).chunk(3, dim=1)
    r_h, z_h, n_h = _linear(h, w_hh, b_hh).chunk(3, dim=1)
    r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
    n = torch.tanh(n_x + r * n_h)
    return ((1 - z) * n + z * h,)


def rnn(activation):
    """The step of Elman 1990 in torch.nn.RNN's form; activation: of a tensor (n, H)."""

    def step(x, state, w_ih, w_hh, b_ih, b_hh, *_):
        return (activation(_linear(x, w_ih, b_ih) + _linear(state[0], w_hh, b_hh)),)

    return step


def _peephole_lstm(x, state, w_ih, w_hh, b_ih, b_hh, w_hr, vectors, _):
    """Gers & Schmidhuber 2000: gates see the cell state, the output gate the new one."""
    h, c = state
    p_i, p_f, p_o = vectors
    i, f, g, o = _preacts(x, h, w_ih, w_hh, b_ih, b_hh, 4)
    c_new = torch.sigmoid(f + p_f * c) * c + torch.sigmoid(i + p_i * c) * torch.tanh(g)
    return _projected(torch.sigmoid(o + p_o * c_new) * torch.tanh(c_new), w_hr), c_new


def _regularized_lstm(x, state, w_ih, w_hh, b_ih, b_hh, w_hr, vectors, masks, hidden=None):
    """Peepholes, clips, dropout of the update (Semeniuta et al. 2016), zoneout (Krueger et al.
    2017), whose h is that of the cell state before zoneout. hidden: what W_hh sees in place of h.
    """
    h, c = state
    p_i, p_f, p_o, clip, cell_clip = vectors
    update, zone_c, zone_h = masks.unbind(1)
    i, f, g, o = _preacts(x, h if hidden is None else hidden, w_ih, w_hh, b_ih, b_hh, 4)
    i = torch.sigmoid(_clipped(i + p_i * c, clip))
    f = torch.sigmoid(_clipped(f + p_f * c, clip))
    g = torch.tanh(_clipped(g, clip))
    c_new = _clipped(f * c + i * (update * g), cell_clip)
    h_new = torch.sigmoid(_clipped(o + p_o * c_new, clip)) * torch.tanh(c_new)
    return zone_h * h + (1 - zone_h) * h_new, zone_c * c + (1 - zone_c) * c_new


def _variational_lstm(x, state, w_ih, w_hh, b_ih, b_hh, w_hr, vectors, masks):
    """Gal & Ghahramani 2016: W_hh sees h under a mask. h is the last cell state, the state before
    it the masked h."""
    hidden, cells = state
    c, h = cells.chunk(2, dim=1)
    weights = w_ih, w_hh, b_ih, b_hh, w_hr
    h, c = _regularized_lstm(x, (h, c), *weights, vectors, masks[:, :3], hidden)
    return masks[:, 3] * h, torch.cat((c, h), dim=1)


def _regularized_gru(x, state, w_ih, w_hh, b_ih, b_hh, w_hr, vectors, masks, hidden=None):
    """As _regularized_lstm, of torch.nn.GRU's form."""
    (h,) = state
    (clip,) = vectors
    update, zone_h = masks.unbind(1)
    r_x, z_x, n_x = _of_input(x, w_ih, b_ih).chunk(3, dim=1)
    seen = h if hidden is None else hidden
    r_h, z_h, n_h = _recurrent(seen, w_hh, b_hh, 3).chunk(3, dim=1)
    r = torch.sigmoid(_clipped(r_x + r_h, clip))
    z = torch.sigmoid(_clipped(z_x + z_h, clip))
    n = torch.tanh(_clipped(n_x + r * n_h, clip))
    h_new = (1 - z) * (update * n) + z * h
    return (zone_h * h + (1 - zone_h) * h_new,)


def _variational_gru(x, state, w_ih, w_hh, b_ih, b_hh, w_hr, vectors, masks):
    """As _variational_lstm."""
    hidden, h = state
    weights = w_ih, w_hh, b_ih, b_hh, w_hr
    (h,) = _regularized_gru(x, (h,), *weights, vectors, masks[:, :2], hidden)
    return masks[:, 2] * h, h


def _coupled_lstm(x, state, w_ih, w_hh, b_ih, b_hh, w_hr, *_):
    """Greff et al. 2017, CIFG: the forget gate is 1 - i."""
    h, c = state
    i, g, o = _preacts(x, h, w_ih, w_hh, b_ih, b_hh, 3)
    i = torch.sigmoid(i)
    c = (1 - i) * c + i * torch.tanh(g)
    return _projected(torch.sigmoid(o) * torch.tanh(c), w_hr), c


def _reset_before_gru(x, state, w_ih, w_hh, b_ih, b_hh, *_):
    """Cho et al. 2014 as the paper has it: the reset gate multiplies h before the product."""
    (h,) = state
    r_x, z_x, n_x = _of_input(x, w_ih, b_ih).chunk(3, dim=1)
    r_h, z_h, _ = _of_hidden(h, w_hh, b_hh, 3, 2)
    r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
    n = torch.tanh(n_x + _last_gate(r * h, w_hh, b_hh, 3))
    return ((1 - z) * n + z * h,)


def _mgu(x, state, w_ih, w_hh, b_ih, b_hh, *_):
    """Zhou et al. 2016: one gate f, and a candidate that sees f * h."""
    (h,) = state
    f_x, n_x = _of_input(x, w_ih, b_ih).chunk(2, dim=1)
    f = torch.sigmoid(f_x + _of_hidden(h, w_hh, b_hh, 2, 1)[0])
    n = torch.tanh(n_x + _last_gate(f * h, w_hh, b_hh, 2))
    return ((1 - f) * h + f * n,)


def _ind_rnn(activation):
    def step(x, state, w_ih, w_hh, b_ih, b_hh, w_hr, vectors, _):
        """Li et al. 2018: a unit sees no hidden unit but itself."""
        (h,) = state
        (preact,) = _preacts(x, h, w_ih, w_hh, b_ih, b_hh, 1)
        return (activation(preact + vectors[0] * h),)

    return step


def _sru(x, state, w_ih, w_hh, b_ih, b_hh, w_hr, vectors, _):
    """Lei et al. 2018: both gates see the cell state before the step."""
    h, c = state
    v_f, v_r = vectors
    candidate, f, r, skip = _preacts(x, h, w_ih, w_hh, b_ih, b_hh, 4)
    f, r = torch.sigmoid(f + v_f * c), torch.sigmoid(r + v_r * c)
    c = f * c + (1 - f) * candidate
    return _projected(r * c + (1 - r) * skip, w_hr), c


def _qrnn(x, state, w_ih, w_hh, b_ih, b_hh, w_hr, *_):
    """Bradbury et al. 2017, fo-pooling."""
    h, c = state
    z, f, o = _preacts(x, h, w_ih, w_hh, b_ih, b_hh, 3)
    f = torch.sigmoid(f)
    c = f * c + (1 - f) * torch.tanh(z)
    return _projected(torch.sigmoid(o) * c, w_hr), c


def _positive(x):
    """g of Feng et al. 2024: what is positive, so that its logarithm exists."""
    return torch.where(x >= 0, x + 0.5, torch.sigmoid(x))


def _min_gru(x, state, w_ih, w_hh, b_ih, b_hh, *_):
    """Feng et al. 2024, minGRU."""
    (h,) = state
    z, candidate = _preacts(x, h, w_ih, w_hh, b_ih, b_hh, 2)
    z = torch.sigmoid(z)
    return ((1 - z) * h + z * _positive(candidate),)


def _min_lstm(x, state, w_ih, w_hh, b_ih, b_hh, *_):
    """Feng et al. 2024, minLSTM: f and i are divided by their sum, here by their logarithms."""
    (h,) = state
    f, i, candidate = _preacts(x, h, w_ih, w_hh, b_ih, b_hh, 3)
    difference = logsigmoid(f) - logsigmoid(i)
    return (torch.sigmoid(difference) * h + torch.sigmoid(-difference) * _positive(candidate),)


def _slstm(x, state, w_ih, w_hh, b_ih, b_hh, w_hr, *_):
    """Beck et al. 2024, sLSTM, stabilised as in their package xlstm.

    n is 0 before the first step alone: after it, one of both gates is 1.
    """
    h, cells = state
    c, n, m = cells.chunk(3, dim=1)
    i, f, z, o = _preacts(x, h, w_ih, w_hh, b_ih, b_hh, 4)
    f = logsigmoid(f) + m
    m = torch.where(n == 0, i, torch.maximum(i, f))
    zero = torch.zeros_like(m)
    i, f = (torch.exp(torch.minimum(gate - m, zero)) for gate in (i, f))
    c, n = f * c + i * torch.tanh(z), f * n + i
    return _projected(torch.sigmoid(o) * c / n, w_hr), torch.cat((c, n, m), dim=1)


def _normalized(x, epsilon, parts):
    """Each row of x (n, parts * H) without its mean, over its standard deviation: (n, H) of each
    part; epsilon (H,)."""
    x = x.unflatten(1, (parts, -1))
    x = x - x.mean((1, 2), keepdim=True)
    variance = x.square().mean((1, 2), keepdim=True)
    return (x / (variance + epsilon.detach()).sqrt()).unbind(1)


def _layer_norm_lstm(carries_normalized):
    def step(x, state, w_ih, w_hh, b_ih, b_hh, w_hr, vectors, _):
        """Ba et al. 2016; the cell state that is carried is normalized, or the one before it."""
        h, c = state
        x = _normalized(_of_input(x, w_ih, b_ih), vectors[14], 4)
        h = _normalized(_recurrent(h, w_hh, b_hh, 4), vectors[14], 4)
        i, f, g, o = (vectors[j] * x[j] + vectors[4 + j] * h[j] + vectors[8 + j] for j in range(4))
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        (normalized,) = _normalized(c, vectors[14], 1)
        normalized = vectors[12] * normalized + vectors[13]
        h = torch.sigmoid(o) * torch.tanh(normalized)
        return _projected(h, w_hr), normalized if carries_normalized else c

    return step


def _layer_norm_gru(x, state, w_ih, w_hh, b_ih, b_hh, w_hr, vectors, _):
    """Ba et al. 2016; the reset gate multiplies the hidden state's part of the candidate."""
    (h,) = state
    x = _normalized(_of_input(x, w_ih, b_ih), vectors[12], 3)
    x = [vectors[j] * x[j] + vectors[6 + j] for j in range(3)]
    y = _normalized(_recurrent(h, w_hh, b_hh, 3), vectors[12], 3)
    y = [vectors[3 + j] * y[j] + vectors[9 + j] for j in range(3)]
    r, z = torch.sigmoid(x[0] + y[0]), torch.sigmoid(x[1] + y[1])
    return ((1 - z) * torch.tanh(x[2] + r * y[2]) + z * h,)


CELLS = {
    "lstm": Cell(_lstm, gates=4, cells=1),
    "gru": Cell(_gru, gates=3),
    "rnn_tanh": Cell(rnn(torch.tanh), gates=1),
    "rnn_relu": Cell(rnn(torch.relu), gates=1),
    "peephole_lstm": Cell(_peephole_lstm, gates=4, cells=1, vectors=3),
    "regularized_lstm": Cell(_regularized_lstm, gates=4, cells=1, vectors=5, masks=3),
    "regularized_gru": Cell(_regularized_gru, gates=3, vectors=1, masks=2),
    "variational_lstm": Cell(_variational_lstm, gates=4, cells=2, vectors=5, masks=4),
    "variational_gru": Cell(_variational_gru, gates=3, cells=1, vectors=1, masks=3),
    "coupled_lstm": Cell(_coupled_lstm, gates=3, cells=1),
    "reset_before_gru": Cell(_reset_before_gru, gates=3),
    "mgu": Cell(_mgu, gates=2),
    "ind_rnn": Cell(_ind_rnn(torch.relu), gates=1, vectors=1),
    "ind_rnn_tanh": Cell(_ind_rnn(torch.tanh), gates=1, vectors=1),
    "sru": Cell(_sru, gates=4, cells=1, vectors=2),
    "qrnn": Cell(_qrnn, gates=3, cells=1),
    "min_gru": Cell(_min_gru, gates=2),
    "min_lstm": Cell(_min_lstm, gates=3),
    "slstm": Cell(_slstm, gates=4, cells=3),
    "layer_norm_lstm": Cell(_layer_norm_lstm(False), gates=4, cells=1, vectors=15),
    "layer_norm_lstm_carried": Cell(_layer_norm_lstm(True), gates=4, cells=1, vectors=15),
    "layer_norm_gru": Cell(_layer_norm_gru, gates=3, vectors=13),
}
