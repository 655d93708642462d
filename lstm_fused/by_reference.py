"""Calls that neither the kernels nor torch.nn run: options beyond torch.nn where no kernel is.

Sizes: T steps, N rows, I inputs, H hidden units, R recurrent width, D directions.
"""

import torch
from torch.utils.checkpoint import checkpoint

from lstm_fused import _plan, reference
from lstm_fused.export import state_or_zeros
from lstm_fused.fallback import warn_once


def announce(module, x, reason):
    """Warn that the reference runs a call with options that torch.nn does not have, or refuse it.

    x: the input's data; reason: why the kernels do not run the call.
    """
    if module._torch_class is None:
        if x.is_nested or x.layout is not torch.strided:
            raise RuntimeError(f"{module._kind()} cannot run this call: {reason}")
        if not torch.compiler.is_compiling():
            warn_once(module, reason, "its reference in pure torch")
        return
    names = [name for name in module._overridden if name != "check_input"]
    if torch.jit.is_tracing() or names or x.is_nested or x.layout is not torch.strided:
        hint = ", torch.export records them" if torch.jit.is_tracing() else ""
        raise RuntimeError(
            "resets, return_cell_states, cu_seqlens and checkpoint_every are beyond torch.nn, "
            f"which would run this call{hint}: {reason}"
        )
    if not torch.compiler.is_compiling():
        warn_once(module, reason, "its reference in pure torch")


def layer(
    x,
    batch_sizes,
    state0,
    weights,
    cell,
    directions,
    *,
    resets=None,
    cell_states=False,
    save_every=1,
):
    """ops.layer by the reference; with save_every dense data is run by so many steps at a time."""
    run = reference.CELLS[cell]
    if save_every == 1 or batch_sizes is not None:
        return run(
            *(x, batch_sizes, state0, weights, directions),
            resets=resets,
            cell_states=cell_states,
        )
    number = _plan.cells()[cell]["id"]
    state0 = state_or_zeros(x, None, state0, weights, number, directions)
    each, found = len(weights) // directions, []
    masked = _plan.cells()[cell]["masks"] > 0
    for d in range(directions):
        start = [s[d : d + 1] for s in state0]
        part = list(weights[d * each : (d + 1) * each])
        masks = part.pop() if masked else None
        rows, anew = x, resets
        if d:  # backwards in time, where a reset comes before the step that it followed
            rows = x.flip(0)
            masks = masks if masks is None else masks.flip(0)
            anew = resets if resets is None else resets.roll(-1, 0).flip(0)
            # The first has no step before it.
            anew = anew if anew is None else torch.cat((torch.zeros_like(anew[:1]), anew[1:]))
        y, end, *cells = _by_chunks(run, rows, start, part, masks, anew, cell_states, save_every)
        found.append((*(t.flip(0) if d else t for t in (y, *cells)), *end))
    joined = [
        torch.cat(ts, dim=-1) for ts in zip(*(f[: 1 + cell_states] for f in found), strict=True)
    ]
    ends = tuple(torch.cat(ts) for ts in zip(*(f[1 + cell_states :] for f in found), strict=True))
    return joined[0], ends, *joined[1:]


def _by_chunks(run, x, state0, weights, masks, resets, cell_states, steps):
    """run, a layer in one direction, `steps` steps at a time, each computed again in backward."""
    N = x.shape[1]
    first, after_reset = [s[:, :N] for s in state0], [s[:, N:] for s in state0]
    none = [None] * -(-len(x) // steps)
    anews, all_masks = (none if t is None else t.split(steps) for t in (resets, masks))
    found, state = [], first
    for rows, anew, mask in zip(x.split(steps), anews, all_masks, strict=True):

        def chunk(rows, state, after_reset, weights, anew=anew, mask=mask):
            weights = weights if mask is None else [*weights, mask]
            state0 = [torch.cat(s, dim=1) for s in zip(state, after_reset, strict=True)]
            options = {"resets": anew, "cell_states": cell_states}
            return run(rows, None, state0, weights, 1, **options)

        y, state, *cells = checkpoint(chunk, rows, state, after_reset, weights, use_reentrant=False)
        found.append((y, *cells))
    y, *cells = (torch.cat(ts) for ts in zip(*found, strict=True))
    return y, state, *cells
