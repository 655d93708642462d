"""Naive pure-torch references: one function per cell, one Python loop over time.

Any floating dtype, any device, differentiable to any order. They share nothing with the kernels:
the tests hold the kernels to them in float64, and double backward is computed through them.
"""

import torch


def _lstm_step(x, h, c, w_ih, w_hh, b_ih, b_hh, w_hr):
    """One step of n rows: x (n, I), h (n, R), c (n, H) -> h (n, R), c (n, H).

    Hochreiter & Schmidhuber 1997 in torch.nn.LSTM's form; the projection w_hr is Sak et al. 2014.
    """
    gates = x @ w_ih.t() + h @ w_hh.t()
    if b_ih is not None:
        gates = gates + b_ih + b_hh
    i, f, g, o = gates.chunk(4, dim=1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return (h if w_hr is None else h @ w_hr.t()), c


def _split_lstm_weights(weights, directions):
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


def lstm_layer(x, batch_sizes, state0, weights, directions=1):
    """One LSTM layer, the contract of ``ops.layer``.

    x: (T, N, I), or packed (S, I) with batch_sizes (T,), never increasing and batch_sizes[0] == N.
    state0: () for zeros, or (h0 (D, N, R), c0 (D, N, H)).
    weights: per direction w_ih (4H, I), w_hh (4H, R)[, b_ih (4H,), b_hh (4H,)][, w_hr (R, H)].
    Returns (y (T, N, D*R) or (S, D*R), (h_n (D, N, R), c_n (D, N, H))).
    """
    if batch_sizes is None:
        steps = x.unbind(0)
        rows = x.shape[1]
    else:
        sizes = batch_sizes.tolist()
        steps = x.split(sizes)
        rows = sizes[0]
    outputs, h_n, c_n = [], [], []
    for d, params in enumerate(_split_lstm_weights(weights, directions)):
        if state0:
            h, c = state0[0][d], state0[1][d]
        else:
            h = x.new_zeros(rows, params[1].shape[1])
            c = x.new_zeros(rows, params[1].shape[0] // 4)
        ys = []
        for x_t in reversed(steps) if d else steps:
            n = x_t.shape[0]
            h_t, c_t = _lstm_step(x_t, h[:n], c[:n], *params)
            ys.append(h_t)
            # Rows from n on have ended (forward), or have not begun (reverse): their state stays.
            h, c = torch.cat((h_t, h[n:])), torch.cat((c_t, c[n:]))
        outputs.append(ys[::-1] if d else ys)
        h_n.append(h)
        c_n.append(c)
    join = torch.stack if batch_sizes is None else torch.cat
    y = torch.cat([join(ys) for ys in outputs], dim=-1)
    return y, (torch.stack(h_n), torch.stack(c_n))


CELLS = {"lstm": lstm_layer}
