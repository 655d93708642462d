"""Derivatives by the reference, for what no kernel computes: second derivatives, some tangents.

Sizes as in `ops`.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map

from lstm_fused import layer_weights, models, reference
from lstm_fused.cuda import CELLS


@dataclass(frozen=True)
class Layer:
    """The arguments of an operator's call that are no tensors."""

    cell: int
    directions: int
    states: int  # initial states given: 0, or as many as the cell has
    cell_states: bool = False  # whether y holds the cell states behind the hidden ones
    save_every: int = 1  # 0, or a state of so many steps is saved
    samples: int = 0  # of recurrent_backward_samples, 0 for the other operators

    @property
    def info(self):
        return CELLS[self.cell]

    @property
    def has_cell_state(self):
        return self.info["carry"] == "cell"

    def plain_count(self, weights):
        return layer_weights.plain_count(self.info, weights, self.directions)

    def is_projected(self, weights):
        return layer_weights.is_projected(self.info, weights, self.directions)

    @property
    def outputs(self):
        """How many final states there are."""
        return 2 if self.has_cell_state else 1

    def split(self, tensors):
        """(state0, weights) of the tensors after x."""
        return list(tensors[: self.states]), list(tensors[self.states :])

    def mask(self, x, needs):
        """recurrent_backward's mask; x, needs: whether those of x, of states and weights are."""
        absent = (False,) * (2 - self.states)
        return [x, *needs[: self.states], *absent, *needs[self.states :], False]


def has_cell_states(y, weights, cell, directions):
    """Whether y, or its gradient, holds the cell states of all steps behind the hidden ones."""
    if y is None:
        return False
    _, width = layer_weights.widths(CELLS[cell], weights, directions)
    return y.shape[-1] > directions * width


def replaced(tensors, places, others):
    found = list(tensors)
    for k, t in zip(places, others, strict=True):
        found[k] = t
    return found


def with_moved(tensors, moving, call):
    """call as a function of only the tensors at the positions `moving`."""
    return lambda *moved: call(replaced(tensors, moving, moved))


@contextmanager
def _recording():
    """Record autograd at the level of the tensors, inside any transform."""
    allowed = torch._C._functorch.get_inplace_requires_grad_allowed()
    torch._C._functorch.set_inplace_requires_grad_allowed(True)
    try:
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            yield
    finally:
        torch._C._functorch.set_inplace_requires_grad_allowed(allowed)


def _leaf(t):
    """An alias of t that requires a gradient; a tensor given twice gets two."""
    alias = t.view_as(t)
    return alias if alias.requires_grad else alias.requires_grad_()


def _pull(call, args, cotangents):
    with _recording():
        places = [_leaf(t) for t in args]
        out = call(*places)
        pairs = [(o, d) for o, d in zip(out, cotangents, strict=True) if o.requires_grad]
        return torch.autograd.grad(
            [o for o, _ in pairs],
            places,
            [d for _, d in pairs],
            create_graph=True,
            materialize_grads=True,
        )


def _one_by_one(run, in_dims=0, out_dims=0):
    """torch.func.vmap for inside an operator's kernel, where a transform cannot begin."""

    def each(*args):
        dims = in_dims if isinstance(in_dims, tuple) else (in_dims,) * len(args)

        def of(k, arg, dim):
            return tree_map(lambda t: t.select(dim, k), arg) if dim is not None else arg

        count = next(
            t.shape[dim]
            for arg, dim in zip(args, dims, strict=True)
            if dim is not None
            for t in tree_leaves(arg)
        )
        found = [run(*(of(k, a, d) for a, d in zip(args, dims, strict=True))) for k in range(count)]
        parts = list(zip(*found, strict=True))
        ends = out_dims if isinstance(out_dims, tuple) else (out_dims,) * len(parts)
        return tuple(torch.stack(ts, d) for ts, d in zip(parts, ends, strict=True))

    return each


def _func_pull(call, args, cotangents):
    _, pull = torch.func.vjp(call, *args)
    return pull(tuple(cotangents))


@dataclass(frozen=True)
class Tools:
    """pull(call, args, cotangents), the vector-Jacobian product of call(*args), and torch.vmap."""

    pull: Callable
    vmap: Callable

    def push(self, call, args, tangents):
        """The Jacobian-vector product of call(*args): the transpose of pull, linear in u."""
        u = [torch.zeros_like(out) for out in call(*args)]
        return self.pull(lambda *u: self.pull(call, args, u), u, tangents)


# For use between calls of operators, where a transform can begin, and inside an operator's kernel.
BETWEEN = Tools(_func_pull, torch.func.vmap)
INSIDE = Tools(_pull, _one_by_one)


def outputs_of(layer, batch_sizes, resets, tools):
    """The reference as a function of [x, *state0, *weights]."""
    return lambda tensors: _reference(layer, batch_sizes, resets, tensors, tools)


def gradients_of(layer, mask, batch_sizes, resets, tools):
    """The reference's gradients as a function of [dy, dh_n, dc_n, x, *state0, *weights]."""
    return lambda tensors: _reference_gradients(
        layer, mask, batch_sizes, resets, tensors[:3], tensors[3:], tools
    )


def tangents_of(layer, batch_sizes, resets, tools):
    """The reference's tangents as a function of [x, *state0, *weights], then a tangent of each."""

    def call(tensors):
        count = len(tensors) // 2
        primals, moves = tensors[:count], tensors[count:]
        moving = [k for k, t in enumerate(moves) if t is not None]
        outputs = with_moved(primals, moving, outputs_of(layer, batch_sizes, resets, tools))
        return tools.push(outputs, [primals[k] for k in moving], [moves[k] for k in moving])

    return call


def _reference(layer, batch_sizes, resets, tensors, tools):
    """(y, h_n[, c_n]) of [x, *state0, *weights] by the reference.

    The tensors and resets may have a first dimension of models.
    """

    def one(resets, x, *tensors):
        state0, weights = layer.split(tensors)
        run = reference.CELLS[CELLS[layer.cell]["name"]]
        y, ends, *cells = run(
            x,
            batch_sizes,
            tuple(state0),
            weights,
            layer.directions,
            resets=resets[0] if resets else None,
            cell_states=layer.cell_states,
        )
        return torch.cat((y, *cells), -1) if cells else y, *ends

    run = tools.vmap(one) if models.several(layer.split(tensors[1:])[1]) else one
    return run(_maybe(resets), *tensors)


def _maybe(t):
    """t in a tuple, which is empty without it: torch.vmap takes no None."""
    return () if t is None else (t,)


def _reference_gradients(layer, mask, batch_sizes, resets, d_out, tensors, tools):
    """The gradients that mask asks for, as a tuple of those alone.

    d_out: of y, h_n and c_n, None where there is none. tensors: x, the states, the weights. With
    samples, the rows are (n, sample), the last the innermost, and a weight has a gradient for each.
    """
    given = [k for k, d in enumerate(d_out) if d is not None]
    wanted = [
        k for k, want in enumerate((mask[0], *mask[1 : 1 + layer.states], *mask[3:-1])) if want
    ]
    sizes = batch_sizes
    if batch_sizes is not None and layer.samples:
        sizes = batch_sizes // layer.samples

    def one(d_out, resets, *tensors):
        def outputs(*moved):
            full = replaced(tensors, wanted, moved)
            out = _reference(layer, sizes, resets[0] if resets else None, full, tools)
            return tuple(out[k] for k in given)

        return tools.pull(outputs, [tensors[k] for k in wanted], d_out)

    run = _over_samples(layer, one, wanted, tools) if layer.samples else one
    if models.several(layer.split(tensors[1:])[1]):
        run = tools.vmap(run)
    return run(tuple(d_out[k] for k in given), _maybe(resets), *tensors)


def _over_samples(layer, one, wanted, tools):
    """one for each sample, whose rows are unflattened from (N * samples) and flattened again."""

    def parted(t):
        return t.unflatten(-2, (-1, layer.samples))

    def run(d_out, resets, *tensors):
        rows, weights = tensors[: 1 + layer.states], tensors[1 + layer.states :]
        in_dims = (-2, -2, *[-2] * len(rows), *[None] * len(weights))
        out_dims = tuple(-2 if k <= layer.states else 0 for k in wanted)
        found = tools.vmap(one, in_dims, out_dims)(
            tuple(map(parted, d_out)), tuple(map(parted, resets)), *map(parted, rows), *weights
        )
        return tuple(
            g.flatten(-3, -2) if k <= layer.states else g
            for k, g in zip(wanted, found, strict=True)
        )

    return run
