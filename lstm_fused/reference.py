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
    return (h if w_hr is None else _linear(h, w_hr, None)), c


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


def _layer(
    step,
    widths_of,
    x,
    batch_sizes,
    state0,
    weights,
    directions=1,
    *,
    resets=None,
    cell_states=False,
):
    """One layer, the contract of ``ops.layer``.

    x: (T, N, I), or packed (S, I) with batch_sizes (T,), never increasing and batch_sizes[0] == N.
    A negative entry after those says how many rows of x follow that belong to no step. Or the rows
    (S, I) of N documents with batch_sizes (1, N + 1), where each begins, then S.
    state0: () for zeros, or the initial states, h0 (D, N, R) first. A state of 2 * N rows holds
    those that resets put in behind the initial ones.
    weights: per direction w_ih (G*H, I), w_hh (G*H, R)[, b_ih (G*H,), b_hh (G*H,)][, w_hr (R, H)].
    step and widths_of are the cell's: one step of it, and its states' widths by (w_ih, w_hh).
    resets: None, or x's shape with 1 for I: not 0 where a row begins anew before that step.
    Returns y (T, N, D*R) or (S, D*R), the final states, each (D, N, its width), and with
    cell_states, of a cell that has them, those of all steps, (T, N, D*H) or (S, D*H).
    """
    if batch_sizes is not None and batch_sizes.dim() == 2:
        if not state0:
            widths = widths_of(*weights[:2])
            state0 = [x.new_zeros(directions, batch_sizes.numel() - 1, width) for width in widths]
        run = partial(_layer, step, widths_of, directions=directions, cell_states=cell_states)
        return _documents(run, x, _numbers(batch_sizes), state0, weights, resets)
    if batch_sizes is None:
        sizes, padding = [x.shape[1]] * x.shape[0], 0
        steps = x.unbind(0)
        anew = None if resets is None else resets.bool().unbind(0)
    else:
        sizes = _numbers(batch_sizes)
        padding = -sizes.pop() if sizes[-1] < 0 else 0
        steps = x[: sum(sizes)].split(sizes)
        anew = None if resets is None else resets[: sum(sizes)].bool().split(sizes)
    T, rows = len(sizes), sizes[0]
    histories, ends = [], []
    for d, params in enumerate(_split_weights(weights, directions)):
        if state0:
            state = tuple(s[d, :rows] for s in state0)
            after_reset = tuple(
                s[d, rows:] if s.shape[1] > rows else torch.zeros_like(s[d]) for s in state0
            )
        else:
            state = tuple(x.new_zeros(rows, width) for width in widths_of(*params[:2]))
            after_reset = state
        history = [None] * T
        for t in reversed(range(T)) if d else range(T):
            # A reset lies between step t - 1 and step t, for the reverse direction too.
            boundary = t + 1 if d else t
            if anew is not None and boundary < T:
                state = _reset(state, after_reset, anew[boundary])
            n = sizes[t]
            after = step(steps[t], tuple(s[:n] for s in state), *params)
            history[t] = after
            # Rows from n on have ended (forward), or have not begun (reverse): their state stays.
            state = tuple(torch.cat((new, old[n:])) for new, old in zip(after, state, strict=True))
        histories.append(history)
        ends.append(state)
    join = torch.stack if batch_sizes is None else torch.cat

    def of_all_steps(k):
        """The state number k after each step, the directions side by side."""
        y = torch.cat([join([state[k] for state in history]) for history in histories], dim=-1)
        return torch.cat((y, y.new_zeros(padding, y.shape[-1]))) if padding else y

    found = of_all_steps(0), tuple(torch.stack(s) for s in zip(*ends, strict=True))
    return (*found, of_all_steps(1)) if cell_states else found


def _numbers(batch_sizes):
    """The entries, one after the other: torch.compile knows those of a constant only so."""
    return [entry.item() for entry in batch_sizes.unbind(-1)]


def _reset(state, after_reset, anew):
    """The states (N, width) of which the first n rows are replaced where anew (n, 1) is set."""
    n = anew.shape[0]
    return tuple(
        torch.cat((torch.where(anew, new[:n], old[:n]), old[n:]))
        for new, old in zip(after_reset, state, strict=True)
    )


def _documents(run, x, begins, state0, weights, resets):
    """run, a layer, of one document after the other; begins: (N + 1,), see ``_layer``."""
    N = len(begins) - 1
    parts, ends = [], []
    for n, (begin, end) in enumerate(zip(begins, begins[1:], strict=False)):
        if begin == end:
            ends.append(tuple(s[:, n : n + 1] for s in state0))
            continue
        y, after, *cells = run(
            x[begin:end].unsqueeze(1),
            None,
            tuple(s[:, n::N] for s in state0),  # the initial state, then that of resets
            weights,
            resets=None if resets is None else resets[begin:end].unsqueeze(1),
        )
        parts.append((y, *cells))
        ends.append(after)
    y, *cells = (torch.cat(ts).squeeze(1) for ts in zip(*parts, strict=True))
    return y, tuple(torch.cat(ss, dim=1) for ss in zip(*ends, strict=True)), *cells


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
