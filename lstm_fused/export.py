"""Our operators in terms of torch's own, for what takes an exported program but not lstm_fused.

Sizes: T steps, N rows, I inputs, H hidden units, R recurrent width, D directions.
"""

from collections.abc import Callable
from typing import Any

import torch

from lstm_fused import layer_weights, reference
from lstm_fused.cuda import CELLS
from lstm_fused.operators import forward_op, padded_op, quantized_op
from lstm_fused.panels import plain_weights


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The decompositions of our operators into torch's, for an exported program.

    A program of ``torch.export.export`` holds a layer of ours as one operator that only lstm_fused
    knows. ExecuTorch, OpenVINO and others that take programs need torch's::

        program = torch.export.export(model, (x,))
        program = program.run_decompositions(lstm_fused.decompositions())

    A layer becomes ``aten.lstm``, ``aten.gru``, ``aten.rnn_tanh`` or ``aten.rnn_relu``, as in an
    export of torch.nn's layer. With ``lengths=``, for which torch has no operator, it becomes the
    basic operators of each step. N may be dynamic, T may not: torch unrolls its operators over the
    number of steps that it sees. A ``PackedSequence`` has none, ``lengths=`` takes its place.

    ``torch.onnx.export`` and AOTInductor need no table. A model that was not exported yet can be
    given torch's layers by ``lstm_fused.restore`` as well.

    Returns:
        A dict for ``torch.export.ExportedProgram.run_decompositions``, which raises
        NotImplementedError for what has no decomposition.
    """
    return {
        forward_op: _forward,
        padded_op: _padded,
        quantized_op: _quantized,
    }


def state_or_zeros(x, batch_sizes, state0, weights, cell, directions):
    """state0 as a list, zeros for ()."""
    if state0:
        return list(state0)
    info = CELLS[cell]
    widths = layer_weights.state_widths(info, weights, directions)
    return zeros_state(x, batch_sizes, widths, directions)


def zeros_state(x, batch_sizes, widths, directions):
    """Zeros for the initial states of these widths."""
    if batch_sizes is None:
        rows = x.shape[-2]
    else:
        documents = batch_sizes.dim() == 2
        rows = batch_sizes.shape[1] - 1 if documents else batch_sizes[0].item()
    return [x.new_zeros(directions, rows, w) for w in widths]


def _check_steps(x, batch_sizes=None):
    if batch_sizes is not None and batch_sizes.dim() == 2:
        raise NotImplementedError(
            "documents (cu_seqlens=) have no decomposition into torch's operators: "
            "give the layer a padded input and lengths="
        )
    if batch_sizes is not None:
        raise NotImplementedError(
            "packed data has no decomposition into torch's operators: "
            "give the layer a padded input and lengths="
        )
    if not isinstance(x.shape[0], int):
        raise NotImplementedError(
            "a dynamic number of time steps has no decomposition into torch's operators: "
            "export with a fixed one"
        )


def _forward(x, batch_sizes, resets, state0, weights, cell, directions, cell_states, save_every):
    """``recurrent_forward`` by torch's operator; nothing is saved for backward.

    Step by step with resets or all cell states, for which torch has no operator.
    """
    _check_steps(x, batch_sizes)
    state0 = state_or_zeros(x, None, state0, weights, cell, directions)
    none = x.new_empty(0)
    if resets is not None or cell_states or CELLS[cell]["described"]:
        layer = reference.CELLS[CELLS[cell]["name"]]
        options = {"resets": resets, "cell_states": cell_states}
        y, ends, *cells = layer(x, None, state0, weights, directions, **options)
        return torch.cat((y, *cells), -1), *(*ends, none)[:2], none, none
    has_biases = len(weights) // directions > 3
    op = getattr(torch.ops.aten, CELLS[cell]["name"]).input
    state = state0 if len(state0) > 1 else state0[0]
    y, *ends = op(x, state, weights, has_biases, 1, 0.0, False, directions == 2, False)
    return y, *(*ends, none)[:2], none, none


def _quantized(x, batch_sizes, resets, state0, weights, *options):
    """``quantized_forward`` by torch's operator, in float32 with the values of the weights."""
    hidden_size, proj_size, cell, directions, cell_states = options
    plain = plain_weights(weights, cell, directions, x.shape[-1], hidden_size, proj_size)
    return _forward(x, batch_sizes, resets, state0, plain, cell, directions, cell_states, 0)[:3]


def _padded(x, lengths, resets, state0, weights, cell, directions, cell_states):
    """``recurrent_padded`` step by step, where a row that has ended keeps its state."""
    _check_steps(x)
    T, N, _ = x.shape
    state0 = state_or_zeros(x, None, state0, weights, cell, directions)
    step = reference.CELLS[CELLS[cell]["name"]]
    steps, histories, ends = x.unbind(0), [], []
    for d in range(directions):
        each = len(weights) // directions
        *own, last = weights[d * each : (d + 1) * each]
        has_masks = CELLS[cell]["masks"] > 0  # the last weight: of a step its own
        state = [s[d : d + 1, :N] for s in state0]
        reset = [s[d : d + 1, N:] if s.shape[1] > N else 0 for s in state0]
        history = [None] * T
        for t in reversed(range(T)) if d else range(T):
            here = (lengths > t).to(x.device).unsqueeze(1)
            before, boundary = state, t + 1 if d else t  # of the boundary before that step
            if resets is not None and boundary < T:
                # Behind a row's end, in the padding, the reverse direction has not begun yet.
                anew = resets[boundary].bool() & (lengths > boundary).to(x.device).unsqueeze(1)
                before = [torch.where(anew, new, s) for new, s in zip(reset, state, strict=True)]
            of_step = [*own, last[t : t + 1] if has_masks else last]
            _, after = step(steps[t].unsqueeze(0), None, before, of_step)
            history[t] = [torch.where(here, new[0], 0) for new in after]
            state = [torch.where(here, new, old) for new, old in zip(after, state, strict=True)]
        histories.append(history)
        ends.append(state)
    ends = [torch.cat(states) for states in zip(*ends, strict=True)]
    y = [
        torch.stack([states[k] for states in history])
        for k in range(1 + cell_states)
        for history in histories
    ]
    return torch.cat(y, dim=-1), *(*ends, x.new_empty(0))[:2]
