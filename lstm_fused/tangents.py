"""recurrent_jvp: tangents of a layer's outputs, by a kernel that runs over all steps.

What the tangents of the weights add to those of the pre-activations is one product over all steps,
since the inputs and states are known. The kernel adds what the tangents of x and h give.

Sizes as in `ops`.
"""

import torch

from lstm_fused import cuda, models
from lstm_fused.cuda import CELLS
from lstm_fused.dynamo import untraced
from lstm_fused.operators import library, run_directly, tangent_op
from lstm_fused.reference_derivatives import has_cell_states
from lstm_fused.samples import states_before


def has_kernel(x, weights, cell, directions):
    """Whether tangents run fused: on the CPU, without a projection, of no described cell."""
    if cuda.serves(x) or CELLS[cell]["described"]:
        return False
    return len(weights) // directions % 2 == 0


def run(
    x, batch_sizes, resets, state0, weights, y, gates, saved_states, tangents, cell, directions
):
    """The tangents of y, h_n and c_n; of 16-bit tensors computed in float32."""
    info = CELLS[cell]
    compute = gates.dtype

    def wide(t):
        return None if t is None else t.to(compute)

    dx, *rest = map(wide, tangents)
    d_states, d_weights = rest[: len(state0)], rest[len(state0) :]
    several = models.several(weights)
    x, y, state0, weights = wide(x), wide(y), [*map(wide, state0)], [*map(wide, weights)]
    if any(t is not None for t in d_states):
        pairs = zip(d_states, state0, strict=True)
        d_states = [torch.zeros_like(s) if d is None else d for d, s in pairs]
    else:
        d_states = []
    carried = state0[-1] if state0 and info["carry"] != "none" else None
    matrices_move = any(d is not None and d.dim() == 2 + several for d in d_weights)
    preacts = None
    if matrices_move:
        args = (x, batch_sizes, resets, state0, weights, y, d_weights, info, directions)
        preacts = models.each(_preacts, *args) if several else _preacts(*args)
    out = run_directly(
        tangent_op,
        torch.zeros_like(x) if dx is None else dx,
        batch_sizes,
        resets,
        d_states,
        [
            w if w.dim() == 2 + several else torch.zeros_like(w) if d is None else d
            for w, d in zip(weights, d_weights, strict=True)
        ],
        carried,
        gates,
        saved_states,
        preacts,
        cell,
        directions,
        has_cell_states(y, weights, cell, directions),
    )
    return tuple(t.to(tangents_dtype(tangents)) for t in out)


def tangents_dtype(tangents):
    return next(t.dtype for t in tangents if t is not None)


def _preacts(x, batch_sizes, resets, state0, weights, y, d_weights, info, directions):
    """What the tangents of w_ih and w_hh add to the pre-activations, (S, D, P, H)."""
    each, G, P = len(d_weights) // directions, info["gates"], info["preacts"]
    rows = x.reshape(-1, x.shape[-1])
    H = weights[1].shape[-1]
    found = rows.new_zeros(rows.shape[0], directions, P, H)

    def add(part, product, order):
        part += product.unflatten(1, (G, H))[:, order]

    for d in range(directions):
        d_ih, d_hh = d_weights[d * each : d * each + 2]
        if d_ih is not None:
            add(found[:, d, :G], rows @ d_ih.mT, info["input_gates"])
        if d_hh is not None:
            before = states_before(x, batch_sizes, resets, state0, y, H, d)
            add(found[:, d, P - G :], before @ d_hh.mT, info["hidden_gates"])
    return found


def register():
    """Register `run` as the operator's kernel."""
    library.impl("recurrent_jvp", untraced(run), "CompositeExplicitAutograd")
