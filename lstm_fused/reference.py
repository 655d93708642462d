"""Naive pure-torch references: one function per cell, one Python loop over time.

Any floating dtype, any device, differentiable to any order. They share nothing with the kernels:
the tests hold the kernels to them in float64, and double backward is computed through them.
"""

from functools import partial

import torch


def _linear(x, w, b):
    return x @ w.t() if b is None else x @ w.t() + b


def _lstm_step(x, state, w_ih, w_hh, b_ih, b_hh, w_hr):
    """One step of n rows: x (n, I), state (h (n, R), c (n, H)) -> the state after it.

    Hochreiter & Schmidhuber 1997 in torch.nn.LSTM's form; the projection w_hr is Sak et al. 2014.
    """
    h, c = state
    i, f, g, o = (_linear(x, w_ih, b_ih) + _linear(h, w_hh, b_hh)).chunk(4, dim=1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return (h if w_hr is None else h @ w_hr.t()), c


def _gru_step(x, state, w_ih, w_hh, b_ih, b_hh, _):
    """Cho et al. 2014 in torch.nn.GRU's form: x (n, I), state (h (n, H),) -> the state after it."""
    (h,) = state
    r_x, z_x, n_x = _linear(x, w_ih, b_ih).chunk(3, dim=1)
    r_h, z_h, n_h = _linear(h, w_hh, b_hh).chunk(3, dim=1)
    r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
    n = torch.tanh(n_x + r * n_h)
    return ((1 - z) * n + z * h,)


def _rnn_step(activation):
    def step(x, state, w_ih, w_hh, b_ih, b_hh, _):
        """Elman 1990 in torch.nn.RNN's form: x (n, I), state (h (n, H),) -> the state after it."""
        return (activation(_linear(x, w_ih, b_ih) + _linear(state[0], w_hh, b_hh)),)

    return step


def _split_weights(weights, directions):
    """Per direction (w_ih, w_hh, b_ih, b_hh, w_hr), None where a weight is left out."""
    each = len(weights) // directions
    if each not in (2, 3, 4, 5) or each * directions != len(weights):
        raise ValueError(
            f"weights must hold 2 to 5 tensors a direction, got {len(weights)} "
            f"for {directions} direction(s)"
        )
    for d in range(directions):
        w_ih, w_hh, *rest = weights[d * each : (d + 1) * each]
        w_hr = rest.pop() if each in (3, 5) else None
        b_ih, b_hh = rest or (None, None)
        yield w_ih, w_hh, b_ih, b_hh, w_hr


def _layer(step, widths_of, x, batch_sizes, state0, weights, directions=1):
    """One layer, the contract of ``ops.layer``.

    x: (T, N, I), or packed (S, I) with batch_sizes (T,), never increasing and batch_sizes[0] == N.
    A negative entry after those says how many rows of x follow that belong to no step.
    state0: () for zeros, or the initial states, h0 (D, N, R) first.
    weights: per direction w_ih (G*H, I), w_hh (G*H, R)[, b_ih (G*H,), b_hh (G*H,)][, w_hr (R, H)].
    step and widths_of are the cell's: one step of it, and its states' widths by (w_ih, w_hh).
    Returns y (T, N, D*R) or (S, D*R) and the final states, each (D, N, its width).
    """
    if batch_sizes is None:
        steps = x.unbind(0)
        rows = x.shape[1]
    else:
        sizes = batch_sizes.tolist()
        padding = -sizes.pop() if sizes[-1] < 0 else 0
        steps = x[: sum(sizes)].split(sizes)
        rows = sizes[0]
    outputs, ends = [], []
    for d, params in enumerate(_split_weights(weights, directions)):
        if state0:
            state = tuple(s[d] for s in state0)
        else:
            state = tuple(x.new_zeros(rows, width) for width in widths_of(*params[:2]))
        ys = []
        for x_t in reversed(steps) if d else steps:
            n = x_t.shape[0]
            after = step(x_t, tuple(s[:n] for s in state), *params)
            ys.append(after[0])
            # Rows from n on have ended (forward), or have not begun (reverse): their state stays.
            state = tuple(torch.cat((new, old[n:])) for new, old in zip(after, state, strict=True))
        outputs.append(ys[::-1] if d else ys)
        ends.append(state)
    join = torch.stack if batch_sizes is None else torch.cat
    y = torch.cat([join(ys) for ys in outputs], dim=-1)
    if batch_sizes is not None and padding:
        y = torch.cat((y, y.new_zeros(padding, y.shape[-1])))
    return y, tuple(torch.stack(s) for s in zip(*ends, strict=True))


def _h_and_c(w_ih, w_hh):
    return w_hh.shape[1], w_ih.shape[0] // 4


def _h(w_ih, w_hh):
    return (w_hh.shape[1],)


def rnn(activation):
    """``_layer`` of an RNN with this activation of a tensor (n, H), called once a step."""
    return partial(_layer, _rnn_step(activation), _h)


CELLS = {
    "lstm": partial(_layer, _lstm_step, _h_and_c),
    "gru": partial(_layer, _gru_step, _h),
    "rnn_tanh": rnn(torch.tanh),
    "rnn_relu": rnn(torch.relu),
}
