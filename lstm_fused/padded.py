"""A layer over a padded batch with lengths whose values are not read.

``lstm(x, lengths=lengths)`` packs its input in eager mode on the CPU, and how many rows that gives
depends on the values. `layer` is for graphs, where torch.compile and torch.export do not know them:
the steps of all rows are moved to the front of T * N + 1 rows, the padding behind them, and the
operator runs the steps that the batch sizes count. `masked` is for lengths on a CUDA device, where
to read them is to wait for the device: all steps are run.

Sizes: T steps, N rows, I inputs, H hidden units, R recurrent width, S rows of documents, D
directions.
"""

from contextlib import nullcontext

import torch
from torch._guards import detect_fake_mode

from lstm_fused import cuda, layer_weights, ops
from lstm_fused.export import state_or_zeros
from lstm_fused.operators import forward_op, library, padded_op


def layer(
    x,
    lengths,
    state0,
    weights,
    cell="lstm",
    directions=1,
    *,
    resets=None,
    cell_states=False,
    save_every=1,
):
    """``ops.layer`` of x (T, N, I) whose row n holds lengths[n] steps, then padding.

    lengths: (N,), int64, from 0 to T in any order. Returns y (T, N, D * R), zero in the padding,
    and the final states, each row's at its own end; a row of length 0 keeps its initial state.
    With cell_states (T, N, D * H) behind them, zero in the padding. save_every is of no effect, as
    for packed data.
    """
    number = ops.CELLS[cell]["id"]
    # An exported program keeps the operator, which ONNX export needs. A compiled graph must not
    # keep it: the compiler's cache outlives this version of the decomposition. torch.vmap has no
    # rule for it.
    exported = torch.compiler.is_exporting() or torch.jit.is_tracing()
    run = padded_op if exported else _padded
    tensors = x, lengths, resets, list(state0), list(weights)
    y, h_n, c_n = run(*tensors, number, directions, cell_states)
    if ops.CELLS[cell]["carry"] != "cell":
        return y, (h_n,)
    if not cell_states:
        return y, (h_n, c_n)
    _, width = layer_weights.widths(ops.CELLS[cell], weights, directions)
    width *= directions
    return y[..., :width], (h_n, c_n), y[..., width:]


@torch.library.impl(library, "recurrent_padded", "CompositeImplicitAutograd")
def _padded(x, lengths, resets, state0, weights, cell, directions, cell_states):
    # Given explicitly, so that the operator's results have N rows, which batch_sizes cannot show.
    state0 = state_or_zeros(x, None, state0, weights, cell, directions)

    masks = layer_weights.masks_of(cuda.CELLS[cell], weights, directions)

    def run(rows, batch_sizes, anew, start, *masks):
        given = layer_weights.with_masks(weights, directions, masks)
        found = forward_op(rows, batch_sizes, anew, start, given, cell, directions, cell_states, 0)
        return found[:3]

    return by_packing(run, x, lengths, resets, state0, masks)


def by_packing(run, x, lengths, resets, state0, masks=()):
    """y (T, N, ...), h_n and c_n of x (T, N, I) whose row n holds lengths[n] steps, then padding.

    run(x, batch_sizes, resets, state0, *masks): the operator's y, h_n and c_n of packed data.
    state0: every state, each (D, N, width), with resets 2 * N rows if they are not to zeros. masks:
    (T, N, ...), packed with x.
    """
    T, N, _ = x.shape
    lengths = lengths.to("cpu", torch.int64)
    torch._assert_async(
        ((lengths >= 0) & (lengths <= T)).all(),
        "lengths must be from 0 to the input's length",
    )
    # A row without a step is run for one, of zeros, so that the first step has all rows; the result
    # is dropped.
    began = (lengths > 0).to(x.device).unsqueeze(1)
    x = torch.where(began, x, 0)
    initial = [s[:, :N] for s in state0]
    steps_of = lengths.clamp(min=1)
    order = steps_of.argsort(descending=True)
    alive = torch.arange(T, device="cpu").unsqueeze(1) < steps_of[order]  # (T, N), sorted rows
    flat = alive.flatten()
    total = flat.sum(0, keepdim=True)
    # The last entry counts the padding behind the packed data, negative: csrc/layer.h. One row more
    # than there is, so that it is never 0.
    batch_sizes = torch.cat((alive.sum(1), total - (T * N + 1)))
    # Packed data holds the active rows step by step; (t, n) becomes row at[t * N + n] of it.
    at = torch.where(flat, flat.cumsum(0), total + (~flat).cumsum(0)) - 1
    at = at.view(T, N)[:, order.argsort()].flatten()
    source = torch.cat((at.argsort(), at.new_zeros(1))).to(x.device)
    rows = x.flatten(0, 1).index_select(0, source)
    anew = None if resets is None else resets.flatten(0, 1).index_select(0, source)
    order, back, at = order.to(x.device), order.argsort().to(x.device), at.to(x.device)
    start = [torch.where(began, s, 0).index_select(1, order) for s in initial]
    if resets is not None:
        # Of 2 * N rows of a state the last N are those that resets put in.
        start = [
            torch.cat((s, given[:, N:].index_select(1, order)), 1) if given.shape[1] > N else s
            for s, given in zip(start, state0, strict=True)
        ]
    with _known_sizes(x):
        packed = [m.flatten(0, 1).index_select(0, source) for m in masks]
        y, *ends = run(rows, batch_sizes, anew, start, *packed)
        for end in ends[: len(initial)]:
            torch._check(end.shape[1] == N)
    y = y.index_select(0, at).unflatten(0, (T, N)).masked_fill(~began, 0)
    ends = [
        torch.where(began, end.index_select(1, back), first)
        for end, first in zip(ends, initial, strict=False)
    ]
    return y, *(*ends, x.new_empty(0))[:2]


def _known_sizes(x):
    """A context in which a fake kernel's new size is to be found equal to one that is known.

    With resets the states do not show how many rows packed data has: one more size of a graph,
    which would have to be found in the results of the graph's node.
    """
    mode = None if torch.compiler.is_dynamo_compiling() else detect_fake_mode([x])
    sizes = mode and mode.shape_env
    return sizes.ignore_fresh_unbacked_symbols() if sizes else nullcontext()


def stays_on_device(t):
    """Whether t's values are not read, since that waits for the device."""
    return cuda.serves(t)


def is_maskable(module, state, given):
    """Whether `masked` can run a call of the module.

    Not where the reverse direction begins with another state than resets put in.
    """
    if not module.bidirectional or given is None or given.resets is None:
        return True
    return len(state) == 0 and given.reset_state is None and module._learned_state() is None


def masked(
    x,
    lengths,
    state0,
    weights,
    cell="lstm",
    directions=1,
    *,
    resets=None,
    cell_states=False,
    save_every=1,
    run=ops.layer,
):
    """`layer` with lengths on x's device: all steps are run, and those of the padding dropped.

    The reverse direction runs through the padding first. A reset behind the last step of each row,
    to its initial state, is where it begins. Resets of the caller must be to the initial state as
    well then, see is_maskable. run: what runs the steps.
    """
    T, N, _ = x.shape
    steps = torch.arange(T, device=x.device).unsqueeze(1)
    here = (steps < lengths).unsqueeze(2)  # (T, N, 1)
    began = (lengths > 0).unsqueeze(1)
    x = torch.where(here, x, 0)
    initial = [s[:, :N] for s in state0]
    if directions == 2:
        behind = (steps == lengths).unsqueeze(2).to(torch.uint8)
        resets = behind if resets is None else torch.where(here, resets, behind)
        state0 = [torch.cat((s, s), dim=1) for s in initial]
    info = ops.CELLS[cell]
    has_cell_state = info["carry"] == "cell"
    y, ends, *cells = run(
        *(x, None, state0, weights, cell, directions),
        resets=resets,
        cell_states=has_cell_state,
        save_every=save_every,
    )
    last = (lengths - 1).clamp(min=0).view(1, N, 1)
    initial = initial or [torch.zeros_like(end) for end in ends]
    found = []
    for end, states, start in zip(ends, (y, *cells), initial, strict=True):
        forward = states[..., : end.shape[2]].gather(0, last.expand(1, N, end.shape[2]))
        found.append(torch.where(began, torch.cat((forward, end[1:])), start))
    y, *cells = (torch.where(here, t, 0) for t in (y, *cells))
    return y, tuple(found), *(cells if cell_states else ())


class Documents:
    """N documents, one after the other in S rows, as N rows of max_seqlen steps, and back.

    cu_seqlens: (N + 1,), int64, where each begins, then S; its values are not read.
    """

    def __init__(self, cu_seqlens, max_seqlen, S):
        begins = cu_seqlens[:-1]
        self.lengths = cu_seqlens.diff()
        fits = (self.lengths >= 0).all() & (self.lengths <= max_seqlen).all()
        fits = fits & (cu_seqlens[0] == 0) & (cu_seqlens[-1] == S)
        torch._assert_async(
            fits,
            "cu_seqlens must begin with 0, end with the rows of input and not decrease, and "
            "max_seqlen must be at least the longest document",
        )
        steps = torch.arange(max_seqlen, device=cu_seqlens.device).unsqueeze(1)
        # (max_seqlen, N), any row of x in the padding.
        self._row_of = (begins + steps).clamp(max=S - 1)
        s = torch.arange(S, device=cu_seqlens.device)
        document = torch.searchsorted(cu_seqlens[1:], s, right=True)
        self._place_of = (s - begins[document]) * len(begins) + document

    def padded(self, t):
        """t (S, ...) as (max_seqlen, N, ...)."""
        return t.index_select(0, self._row_of.flatten()).unflatten(0, self._row_of.shape)

    def concatenated(self, t):
        """t (max_seqlen, N, ...) as (S, ...)."""
        return t.flatten(0, 1).index_select(0, self._place_of)
