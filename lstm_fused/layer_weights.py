"""What the weights of a layer, as ``ops.layer`` takes them, say of it.

info: an entry of ``_plan.cells()``. Weights may have a first dimension of models.
"""


def plain_count(info, weights, directions):
    """How many of a direction's weights are matrices and biases: w_ih to w_hr.

    A described cell's vectors and masks follow them.
    """
    return len(weights) // directions - (info["vectors"] > 0) - (info["masks"] > 0)


def is_projected(info, weights, directions):
    """Whether there is a w_hr."""
    return plain_count(info, weights, directions) % 2 == 1


def widths(info, weights, directions):
    """(H, R)."""
    w_hh = weights[1]
    hidden = w_hh.shape[-2] // info["gates"]
    return hidden, w_hh.shape[-1] if is_projected(info, weights, directions) else hidden


def state_widths(info, weights, directions):
    """Of each state: R, and of cell states the sum."""
    hidden, recurrent = widths(info, weights, directions)
    return (recurrent, info["cells"] * hidden) if info["cells"] else (recurrent,)


def masks_of(info, weights, directions):
    """Of each direction of a described cell that has masks, its last weight."""
    each = len(weights) // directions
    return list(weights[each - 1 :: each]) if info["masks"] else []


def with_masks(weights, directions, masks):
    """The weights with other masks."""
    given, each = list(weights), len(weights) // directions
    for d, mask in enumerate(masks):
        given[(d + 1) * each - 1] = mask
    return given
