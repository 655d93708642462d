"""torch.vmap of the operators.

Where the weights are the same for all examples, the examples become rows of the batch, (n, example)
with the example innermost. Where the weights differ they become models: every tensor has a first
dimension of them, and one call of the thread team runs all. Gradients that differ from example to
example, of weights that do not, are products over each example's own rows.

Sizes as in `ops`; B examples.
"""

from torch.library import register_vmap

from lstm_fused import cuda
from lstm_fused.dynamo import untraced
from lstm_fused.operators import backward_op, forward_op, jvp_op, samples_op


def _rows_dim(x, saved):
    """The dimension of all steps' rows in "gates" or "saved_states", from the end."""
    layout = cuda.saved_layout(x)[saved]
    return layout.index("rows") - len(layout)


def _fold(t, dim, count, at=-2):
    """t with its examples (at dim; None: one for all) folded into the rows, dimension `at`."""
    if t is None:
        return None
    if dim is None:
        t = t.unsqueeze(at)
        sizes = list(t.shape)
        sizes[at] = count
        t = t.expand(sizes)
    else:
        t = t.movedim(dim, at)
    return t.flatten(at - 1, at)


def _unfold(t, count, at=-2):
    """(t with the examples as a dimension again, the position of that dimension)."""
    t = t.unflatten(at, (t.shape[at] // count, count))
    return t, t.dim() + at


def _as_models(t, dim, count, several):
    """t with its examples (at dim; None: one for all) as models; several: t has models already."""
    if t is None:
        return None
    t = t.unsqueeze(0).expand(count, *t.shape) if dim is None else t.movedim(dim, 0)
    return t.flatten(0, 1) if several else t


def _of_models(t, count, several):
    return (t.unflatten(0, (count, -1)) if several else t), 0


class Examples:
    """The layout of one call's examples for the operator, and the inverse for its results."""

    def __init__(self, info, x, weights, weight_dims, batch_sizes, batch_sizes_dim, as_models):
        if batch_sizes_dim is not None:
            raise RuntimeError("batch_sizes must be the same for all examples under vmap")
        self.count, self.as_models = info.batch_size, as_models or of_documents(batch_sizes)
        self.gate_rows, self.state_rows = _rows_dim(x, "gates"), _rows_dim(x, "saved_states")
        self.several = weights[1].dim() - (weight_dims[1] is not None) == 3
        fold_sizes = batch_sizes is not None and not self.as_models
        self.batch_sizes = batch_sizes * self.count if fold_sizes else batch_sizes

    def rows(self, t, dim):
        """t (..., N, width) or (S, width)."""
        return self._put(t, dim, -2)

    def saved(self, gates, saved_states, gates_dim, states_dim):
        """[gates, saved states] of a forward pass."""
        checkpoints = _is_empty(gates, gates_dim)
        return [
            self._put_saved(gates, gates_dim, self.gate_rows),
            self._put_saved(saved_states, states_dim, -2 if checkpoints else self.state_rows),
        ]

    def _put_saved(self, t, dim, at):
        if _is_empty(t, dim):
            return t if dim is None else t.select(dim, 0)
        return self._put(t, dim, at).contiguous()

    def _put(self, t, dim, at):
        if self.as_models:
            return _as_models(t, dim, self.count, self.several)
        return _fold(t, dim, self.count, at)

    def weights(self, ts, dims):
        if not self.as_models:
            return list(ts)
        return [_as_models(t, d, self.count, self.several) for t, d in zip(ts, dims, strict=True)]

    def part(self, t, at=-2):
        """(a result with a dimension of examples, its position); an empty result has none."""
        if t.dim() == 1 and t.shape[0] == 0:
            return t, None
        if self.as_models:
            return _of_models(t, self.count, self.several)
        return _unfold(t, self.count, at)

    def part_saved(self, gates, saved_states):
        """A part of each of a forward pass's gates and saved states."""
        checkpoints = _is_empty(gates, None)
        yield self.part(gates, self.gate_rows)
        yield self.part(saved_states, -2 if checkpoints else self.state_rows)


def has_masks(cell):
    """Whether a cell's weights hold a row for each of x's, which examples would have to share."""
    return cuda.CELLS[cell]["masks"] > 0


def of_documents(batch_sizes):
    return batch_sizes is not None and batch_sizes.dim() == 2


def _is_empty(t, dim):
    """Whether t with its examples at dim is what stands for a tensor that is not there, (0,)."""
    return t.dim() - (dim is not None) == 1 and t.numel() == 0


def _any(dims):
    return any(d is not None for d in dims)


def _forward_rule(info, in_dims, x, batch_sizes, resets, state0, weights, *options):
    x_dim, sizes_dim, resets_dim, state_dims, weight_dims, *_ = in_dims
    as_models = _any(weight_dims) or has_masks(options[0])
    examples = Examples(info, x, weights, weight_dims, batch_sizes, sizes_dim, as_models)
    out = forward_op(
        examples.rows(x, x_dim),
        examples.batch_sizes,
        examples.rows(resets, resets_dim),
        [examples.rows(t, d) for t, d in zip(state0, state_dims, strict=True)],
        examples.weights(weights, weight_dims),
        *options,
    )
    y, h_n, c_n, gates, saved_states = out
    parts = [examples.part(t) for t in (y, h_n, c_n)]
    parts += examples.part_saved(gates, saved_states)
    return tuple(t for t, _ in parts), tuple(d for _, d in parts)


def _lay_out_backward(info, in_dims, args, as_models):
    """The examples of a backward operator, and its tensors laid out for it."""
    x, batch_sizes, resets, state0, weights, y, *saved_and_d_out = args
    x_dim, sizes_dim, resets_dim, state_dims, weight_dims, y_dim, *saved_and_d_dims = in_dims
    saved, d_out = saved_and_d_out[:2], saved_and_d_out[2:]
    saved_dims, d_dims = saved_and_d_dims[:2], saved_and_d_dims[2:]
    examples = Examples(info, x, weights, weight_dims, batch_sizes, sizes_dim, as_models)
    return examples, (
        examples.rows(x, x_dim),
        examples.batch_sizes,
        examples.rows(resets, resets_dim),
        [examples.rows(t, d) for t, d in zip(state0, state_dims, strict=True)],
        examples.weights(weights, weight_dims),
        examples.rows(y, y_dim),
        *examples.saved(*saved, *saved_dims),
        *(examples.rows(t, d) for t, d in zip(d_out, d_dims, strict=True)),
    )


def _parted_gradients(examples, found, part_weight):
    """Results of a backward operator with a dimension of examples, and its position in each.

    part_weight: (gradient of a weight with that dimension, where it is).
    """
    dx, dh0, dc0, dweights, d_preacts = found
    parts = [examples.part(t) for t in (dx, dh0, dc0)]
    weights = [part_weight(t) if t.numel() else (t, None) for t in dweights]
    return (
        (*(t for t, _ in parts), [t for t, _ in weights], d_preacts),
        (*(d for _, d in parts), [d for _, d in weights], None),
    )


def _backward_rule(info, in_dims, *args):
    *tensors, cell, directions, save_every, mask = args
    dims = in_dims[: len(tensors)]
    weights = tensors[4]
    wants_weights = any(mask[3:-1])
    # recurrent_backward_samples has neither projections nor described cells.
    unsampled = cuda.CELLS[cell]["described"] or len(weights) // directions % 2 == 1
    as_models = _any(dims[4]) or has_masks(cell) or (wants_weights and unsampled)
    examples, given = _lay_out_backward(info, dims, tensors, as_models)
    options = (cell, directions, save_every, mask)
    if wants_weights and not examples.as_models:
        found = samples_op(*given, *options, info.batch_size)
        sample = 1 if examples.several else 0
        return _parted_gradients(examples, found, lambda t: (t, sample))
    found = backward_op(*given, *options)
    return _parted_gradients(examples, found, examples.part)


def _samples_rule(info, in_dims, *args):
    """Examples are samples too: rows (n, sample, example), gradients (sample, example)."""
    *tensors, cell, directions, save_every, mask, samples = args
    dims = in_dims[: len(tensors)]
    examples, given = _lay_out_backward(info, dims, tensors, _any(dims[4]) or has_masks(cell))
    options = (cell, directions, save_every, mask)
    if examples.as_models:
        found = samples_op(*given, *options, samples)
        return _parted_gradients(examples, found, examples.part)
    found = samples_op(*given, *options, samples * info.batch_size)
    sample = 1 if examples.several else 0

    def part_weight(t):
        return t.unflatten(sample, (samples, info.batch_size)), sample + 1

    return _parted_gradients(examples, found, part_weight)


def _jvp_rule(info, in_dims, *args):
    x, batch_sizes, resets, state0, weights, y, *saved, tangents, cell, directions = args
    x_dim, sizes_dim, resets_dim, state_dims, weight_dims, y_dim, *saved_dims, moved, _, _ = in_dims
    rows = 1 + len(state0)
    as_models = _any(weight_dims) or _any(moved[rows:]) or has_masks(cell)
    examples = Examples(info, x, weights, weight_dims, batch_sizes, sizes_dim, as_models)
    pairs = list(zip(tangents, moved, strict=True))
    out = jvp_op(
        examples.rows(x, x_dim),
        examples.batch_sizes,
        examples.rows(resets, resets_dim),
        [examples.rows(t, d) for t, d in zip(state0, state_dims, strict=True)],
        examples.weights(weights, weight_dims),
        examples.rows(y, y_dim),
        *examples.saved(*saved, *saved_dims),
        [
            *(examples.rows(t, d) for t, d in pairs[:rows]),
            *examples.weights([t for t, _ in pairs[rows:]], [d for _, d in pairs[rows:]]),
        ],
        cell,
        directions,
    )
    parts = [examples.part(t) for t in out]
    return tuple(t for t, _ in parts), tuple(d for _, d in parts)


def register():
    """Register the rules with torch.vmap."""
    register_vmap(forward_op, untraced(_forward_rule))
    register_vmap(backward_op, untraced(_backward_rule))
    register_vmap(samples_op, untraced(_samples_rule))
    register_vmap(jvp_op, untraced(_jvp_rule))
