"""checkpoint_every: how many steps lie between two states that a forward pass keeps for backward.

Sizes: T steps, N rows, H hidden units, R recurrent width, D directions, P pre-activations of a
unit.
"""

from math import ceil, gcd, sqrt

from lstm_fused import _plan, errors

# Rows of steps from whose products the backward pass makes one partial sum of a weight's gradient.
# Chunks of a multiple of them leave these sums as they are without checkpoints.
_ROWS_OF_A_SUM = 256
# Two and a half times the best interval takes 1.45 times the least memory.
_MOST_ROUNDED_UP = 2.5


def interval(checkpoint_every, cell, T, N, H, R):
    """The operator's save_every: 1 keeps what backward needs of every step.

    checkpoint_every: what the user gave, None, an int or "auto".
    """
    errors.check_checkpoint_every(checkpoint_every)
    if checkpoint_every is None:
        return 1
    k = least_memory(cell, T, N, H, R) if checkpoint_every == "auto" else checkpoint_every
    return k if k < T else 1


def least_memory(cell, T, N, H, R):
    """The interval with the least memory in backward, about the square root of T.

    T / k states are kept, and k steps are computed again at a time: their gates, the gates'
    gradients and their states. The product of the two is fixed, so that the sum is least where they
    are equal.
    """
    of_a_state = _state_width(cell, H, R)
    of_a_step = 2 * _plan.cells()[cell]["preacts"] * H + of_a_state
    k = sqrt(T * of_a_state / of_a_step)
    unit = _ROWS_OF_A_SUM // gcd(_ROWS_OF_A_SUM, max(N, 1))
    whole = ceil(k / unit) * unit
    return whole if whole <= _MOST_ROUNDED_UP * k else ceil(k)


def kept_bytes(cell, T, N, H, R, directions, save_every, itemsize, block=1):
    """What a forward pass of dense data keeps for backward beside its arguments and results.

    itemsize: bytes of a number of the compute dtype; block: the units that H is padded to.
    """
    info = _plan.cells()[cell]
    if save_every > 1:
        return (ceil(T / save_every) - 1) * N * directions * _state_width(cell, H, R) * itemsize
    values = info["preacts"] + info["cells"] + info["keeps_hidden"] + info["groups"]
    return T * N * directions * values * ceil(H / block) * block * itemsize


def _state_width(cell, H, R):
    return R + _plan.cells()[cell]["cells"] * H
