"""Our operators in terms of torch's own, for what takes an exported program but not lstm_fused.

Sizes: T steps, N rows, I inputs, H hidden units, R recurrent width, D directions.
"""

import torch

from lstm_fused import reference
from lstm_fused.cuda import CELLS
from lstm_fused.operators import forward_op, padded_op


def decompositions():
    """The table that makes torch's operators of ours in an exported program.

    A program of ``torch.export.export`` holds a layer of ours as one operator that only lstm_fused
    knows. ExecuTorch, OpenVINO and others that take programs need torch's::

        program = torch.export.export(model, (x,))
        program = program.run_decompositions(lstm_fused.decompositions())

    A layer becomes ``aten.lstm``, ``aten.gru``, ``aten.rnn_tanh`` or ``aten.rnn_relu``, what an
    export of torch.nn's layer holds. With ``lengths=``, for which torch has no operator, it becomes
    the basic operators of each step, which needs a fixed T.

    ``torch.onnx.export`` and AOTInductor need no table. A model that was not exported yet can be
    given torch's layers by ``lstm_fused.restore`` as well.

    Returns:
        A dict for ``torch.export.ExportedProgram.run_decompositions``.
    """
    return {
        forward_op: _forward,
        padded_op: _padded,
    }


def state_or_zeros(x, batch_sizes, state0, weights, cell, directions):
    """state0 as a list, zeros for ()."""
    if state0:
        return list(state0)
    info = CELLS[cell]
    rows = x.shape[-2] if batch_sizes is None else batch_sizes[0].item()
    widths = [weights[1].shape[1], weights[0].shape[0] // info["gates"]]
    return [x.new_zeros(directions, rows, w) for w in widths[: 1 + (info["memory"] == "cell")]]


def _forward(x, batch_sizes, state0, weights, cell, directions, training):
    """``recurrent_forward`` by torch's operator; nothing is saved for backward."""
    state0 = state_or_zeros(x, batch_sizes, state0, weights, cell, directions)
    has_biases = len(weights) // directions > 3
    options = (has_biases, 1, 0.0, False, directions == 2)
    op = getattr(torch.ops.aten, CELLS[cell]["name"])
    state = state0 if len(state0) > 1 else state0[0]
    if batch_sizes is None:
        y, *ends = op.input(x, state, weights, *options, False)
    else:
        y, *ends = op.data(x, batch_sizes, state, weights, *options)
    none = x.new_empty(0)
    return y, *(*ends, none)[:2], none, none


def _padded(x, lengths, state0, weights, cell, directions):
    """``recurrent_padded`` step by step, where a row that has ended keeps its state."""
    T = x.shape[0]
    if not isinstance(T, int):
        raise NotImplementedError(
            "lengths= has no operator of torch's for a dynamic number of time steps: export with a "
            "fixed one"
        )
    state0 = state_or_zeros(x, None, state0, weights, cell, directions)
    step = reference.CELLS[CELLS[cell]["name"]]
    steps, outputs, ends = x.unbind(0), [], []
    for d in range(directions):
        each = len(weights) // directions
        state = [s[d : d + 1] for s in state0]
        ys = [None] * T
        for t in reversed(range(T)) if d else range(T):
            here = (lengths > t).to(x.device).unsqueeze(1)
            _, after = step(steps[t].unsqueeze(0), None, state, weights[d * each : (d + 1) * each])
            ys[t] = torch.where(here, after[0][0], 0)
            state = [torch.where(here, new, old) for new, old in zip(after, state, strict=True)]
        outputs.append(torch.stack(ys))
        ends.append(state)
    ends = [torch.cat(states) for states in zip(*ends, strict=True)]
    return torch.cat(outputs, dim=-1), *(*ends, x.new_empty(0))[:2]
