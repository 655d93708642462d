"""Naive pure-torch references: a step per cell, one Python loop over time.

Any floating dtype, any device, differentiable to any order. They share nothing with the kernels:
the tests hold the kernels to them in float64, and double backward is computed through them.
"""

from functools import partial

import torch

from lstm_fused import reference_steps


def _split_weights(cell, weights, directions):
    """Per direction (w_ih, w_hh, b_ih, b_hh, w_hr, vectors, masks), None for one left out."""
    each = len(weights) // directions
    own = (cell.vectors > 0) + (cell.masks > 0)
    if each - own not in (2, 3, 4, 5) or each * directions != len(weights):
        raise ValueError(
            f"weights must hold {2 + own} to {5 + own} tensors a direction, got {len(weights)} "
            f"for {directions} direction(s)"
        )
    for d in range(directions):
        w_ih, w_hh, *rest = weights[d * each : (d + 1) * each]
        masks = rest.pop() if cell.masks else None
        vectors = rest.pop() if cell.vectors else None
        w_hr = rest.pop() if len(rest) % 2 else None
        b_ih, b_hh = rest or (None, None)
        yield w_ih, w_hh, b_ih, b_hh, w_hr, vectors, masks


def _zeros(cell, x, rows, params):
    """The states of so many rows, zeros; params: a direction's, as _split_weights gives them."""
    w_ih, _, _, _, w_hr, *_ = params
    H = w_ih.shape[0] // cell.gates
    widths = [H if w_hr is None else w_hr.shape[0]] + [cell.cells * H] * (cell.cells > 0)
    return tuple(x.new_zeros(rows, width) for width in widths)


def _layer(
    cell,
    x,
    batch_sizes,
    state0,
    weights,
    directions=1,
    *,
    resets=None,
    cell_states=False,
):
    """One layer of a ``reference_steps.Cell``, the contract of ``ops.layer``.

    x: (T, N, I), or packed (S, I) with batch_sizes (T,), never increasing and batch_sizes[0] == N.
    A negative entry after those says how many rows of x follow that belong to no step. Or the rows
    (S, I) of N documents with batch_sizes (1, N + 1), where each begins, then S.
    state0: () for zeros, or the initial states, h0 (D, N, R) first, then c0 (D, N, K*H) of a cell
    with K cell states. A state of 2 * N rows holds those that resets put in behind the initial
    ones.
    weights: per direction w_ih (G*H, I), w_hh[, b_ih (G*H,), b_hh (G*H,)][, w_hr (R, H)]
    [, vectors (V, H)][, masks, x's shape with M*H for I]. w_hh as `reference_steps` has it.
    resets: None, or x's shape with 1 for I: not 0 where a row begins anew before that step.
    Returns y (T, N, D*R) or (S, D*R), the final states, each (D, N, its width), and with
    cell_states, of a cell that has them, those of all steps, (T, N, D*K*H) or (S, D*K*H).
    """
    if batch_sizes is not None and batch_sizes.dim() == 2:
        run = partial(_layer, cell, directions=directions, cell_states=cell_states)
        return _documents(run, cell, x, _numbers(batch_sizes), state0, weights, directions, resets)
    if batch_sizes is None:
        sizes, padding = [x.shape[1]] * x.shape[0], 0
    else:
        sizes = _numbers(batch_sizes)
        padding = -sizes.pop() if sizes[-1] < 0 else 0

    def by_step(t):
        return t.unbind(0) if batch_sizes is None else t[: sum(sizes)].split(sizes)

    rows, histories, ends = sizes[0], [], []
    for d, (*params, masks) in enumerate(_split_weights(cell, weights, directions)):
        if state0:
            state = tuple(s[d, :rows] for s in state0)
            after_reset = tuple(
                s[d, rows:] if s.shape[1] > rows else torch.zeros_like(s[d]) for s in state0
            )
        else:
            state = after_reset = _zeros(cell, x, rows, params)
        anew = None if resets is None else (by_step(resets.bool()), after_reset)
        each = [None] * len(sizes) if masks is None else by_step(masks)
        history, end = _direction(cell, by_step(x), state, params, each, anew, reverse=d == 1)
        histories.append(history)
        ends.append(end)
    join = torch.stack if batch_sizes is None else torch.cat

    def of_all_steps(k):
        """The state number k after each step, the directions side by side."""
        y = torch.cat([join([state[k] for state in history]) for history in histories], dim=-1)
        return torch.cat((y, y.new_zeros(padding, y.shape[-1]))) if padding else y

    found = of_all_steps(0), tuple(torch.stack(s) for s in zip(*ends, strict=True))
    return (*found, of_all_steps(1)) if cell_states else found


def _direction(cell, steps, state, params, masks, anew, reverse):
    """The states after each step, and the last of every row.

    steps, masks: the rows of each step; anew: None, or (the resets of each step, the state that
    they put in).
    """
    T = len(steps)
    history = [None] * T
    for t in reversed(range(T)) if reverse else range(T):
        # A reset lies between step t - 1 and step t, for the reverse direction too.
        boundary = t + 1 if reverse else t
        if anew is not None and boundary < T:
            state = _reset(state, anew[1], anew[0][boundary])
        n = steps[t].shape[0]
        here = masks[t]
        if here is not None:
            here = here.unflatten(1, (cell.masks, -1))
        after = cell.step(steps[t], tuple(s[:n] for s in state), *params, here)
        history[t] = after
        # Rows from n on have ended (forward), or have not begun (reverse): their state stays.
        state = tuple(torch.cat((new, old[n:])) for new, old in zip(after, state, strict=True))
    return history, state


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


def _documents(run, cell, x, begins, state0, weights, directions, resets):
    """run, a layer, of one document after the other; begins: (N + 1,), see ``_layer``."""
    N, each = len(begins) - 1, len(weights) // directions
    masks = each - 1 if cell.masks else None  # their place among a direction's weights
    if not state0:
        (params, *_) = _split_weights(cell, weights, directions)
        zeros = _zeros(cell, x, N, params)
        state0 = [s.expand(directions, -1, -1) for s in zeros]
    parts, ends = [], []
    for n, (begin, end) in enumerate(zip(begins, begins[1:], strict=False)):
        if begin == end:
            ends.append(tuple(s[:, n : n + 1] for s in state0))
            continue

        here = slice(begin, end)
        y, after, *cells = run(
            x[here].unsqueeze(1),
            None,
            tuple(s[:, n::N] for s in state0),  # the initial state, then that of resets
            [w[here].unsqueeze(1) if k % each == masks else w for k, w in enumerate(weights)],
            resets=None if resets is None else resets[here].unsqueeze(1),
        )
        parts.append((y, *cells))
        ends.append(after)
    y, *cells = (torch.cat(ts).squeeze(1) for ts in zip(*parts, strict=True))
    return y, tuple(torch.cat(ss, dim=1) for ss in zip(*ends, strict=True)), *cells


def rnn(activation):
    """``_layer`` of an RNN with this activation of a tensor (n, H), called once a step."""
    return partial(_layer, reference_steps.Cell(reference_steps.rnn(activation), gates=1))


CELLS = {name: partial(_layer, cell) for name, cell in reference_steps.CELLS.items()}
