"""The reference's described cells against what they are made of: other cells, other forms of the
weights, and formulas that the steps rewrite for the sake of range."""

import math

import pytest
import torch

from lstm_fused import ops, reference, reference_steps
from tests.helpers import described

T, N, I, H = 5, 3, 4, 32  # noqa: E741
F64 = torch.float64


def weights_of(cell, heads=1):
    torch.manual_seed(0)
    gates = reference_steps.CELLS[cell].gates
    shapes = (gates * H, I), (gates * H, H // heads), (gates * H,), (gates * H,)
    return [torch.randn(*shape, dtype=F64) / 4 for shape in shapes]


def run(cell, weights, x=None):
    torch.manual_seed(1)
    drawn = torch.randn(T, N, I, dtype=F64)
    y, ends = reference.CELLS[cell](drawn if x is None else x, None, (), weights)
    return y, *ends


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("cell", described.CELLS)
def test_counts_are_the_kernels(cell):
    known, info = reference_steps.CELLS[cell], ops.CELLS[cell]
    assert info["described"]
    for name in ("gates", "cells", "vectors", "masks"):
        assert getattr(known, name) == info[name], name


NEUTRAL = {
    "peephole_lstm": ("lstm", torch.zeros(3, H, dtype=F64), None),
    "regularized_lstm": (
        "lstm",
        torch.tensor([0.0, 0, 0, math.inf, math.inf], dtype=F64)[:, None].expand(5, H),
        torch.tensor([1.0, 0, 0], dtype=F64)[:, None].expand(T, N, 3, H).flatten(2),
    ),
    "regularized_gru": (
        "gru",
        torch.full((1, H), math.inf, dtype=F64),
        torch.tensor([1.0, 0], dtype=F64)[:, None].expand(T, N, 2, H).flatten(2),
    ),
}


@pytest.mark.parametrize("cell", NEUTRAL)
def test_neutral_is_the_plain_cell(cell):
    plain, *more = NEUTRAL[cell]
    weights = weights_of(plain)
    found = run(cell, [*weights, *(m for m in more if m is not None)])
    assert_equal(found, run(plain, weights))


def test_zoned_out_units_keep_their_states():
    weights = weights_of("lstm")
    _, vectors, masks = NEUTRAL["regularized_lstm"]
    masks = masks.unflatten(2, (3, H)).clone()
    masks[2:, :, 1:, ::2] = 1
    x = torch.randn(T, N, I, dtype=F64)
    _, *ends = run("regularized_lstm", [*weights, vectors, masks.flatten(2)], x)
    _, *before = run("lstm", weights, x[:2])
    for end, kept in zip(ends, before, strict=True):
        assert torch.equal(end[..., ::2], kept[..., ::2])
        assert not torch.equal(end[..., 1::2], kept[..., 1::2])


@pytest.mark.parametrize("cell", ["slstm", "coupled_lstm"])
def test_heads_are_blocks(cell):
    heads, gates = 2, reference_steps.CELLS[cell].gates
    weights = weights_of(cell, heads)
    blocks = weights[1].unflatten(0, (gates, heads, -1))
    full = torch.stack([torch.block_diag(*gate) for gate in blocks]).flatten(0, 1)
    assert_equal(run(cell, weights), run(cell, [weights[0], full, *weights[2:]]))


@pytest.mark.parametrize("cell", ["qrnn", "min_gru", "slstm"])
def test_no_column(cell):
    w_ih, w_hh, *biases = weights_of(cell)
    expected = run(cell, [w_ih, torch.zeros_like(w_hh), *biases])
    assert_equal(run(cell, [w_ih, w_hh[:, :0], *biases]), expected)
    x = torch.randn(T, N, I, dtype=F64)
    expected = run(cell, [w_ih, w_hh[:, :0], *biases], x)
    assert_equal(run(cell, [w_ih[:, :0], w_hh[:, :0], *biases], x @ w_ih.mT), expected)


def test_slstm_is_the_formula_without_a_stabiliser():
    w_ih, w_hh, b_ih, b_hh = weights = weights_of("slstm")
    x = torch.randn(T, N, I, dtype=F64)
    y, h, states = run("slstm", weights, x)
    h = c = n = torch.zeros(N, H, dtype=F64)
    for t in range(T):
        i, f, z, o = (x[t] @ w_ih.mT + b_ih + h @ w_hh.mT + b_hh).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.exp(i) * torch.tanh(z)
        n = torch.sigmoid(f) * n + torch.exp(i)
        h = torch.sigmoid(o) * c / n
        assert_equal(y[t], h)
    c_kept, n_kept, m = states[0].chunk(3, 1)
    assert_equal((c_kept * m.exp(), n_kept * m.exp()), (c, n))


def test_min_lstm_is_the_quotient():
    w_ih, w_hh, b_ih, b_hh = weights_of("min_lstm")
    x = torch.randn(T, N, I, dtype=F64)
    y, h = run("min_lstm", [w_ih, w_hh[:, :0], b_ih, b_hh], x)
    h = torch.zeros(N, H, dtype=F64)
    for t in range(T):
        f, i, candidate = (x[t] @ w_ih.mT + b_ih + b_hh).chunk(3, 1)
        f, i = torch.sigmoid(f), torch.sigmoid(i)
        g = torch.where(candidate >= 0, candidate + 0.5, torch.sigmoid(candidate))
        h = (f * h + i * g) / (f + i)
        assert_equal(y[t], h)


def test_layer_norm_is_that_of_torch():
    def normalized(x, w, b):
        return torch.nn.functional.layer_norm(x, x.shape[1:], w, b, 1e-5)

    w_ih, w_hh, *_ = weights = weights_of("layer_norm_lstm")
    vectors = torch.randn(15, H, dtype=F64)
    vectors[14] = 1e-5
    x = torch.randn(T, N, I, dtype=F64)
    y, *_ = run("layer_norm_lstm", [*weights[:2], vectors], x)
    carried, *_ = run("layer_norm_lstm_carried", [*weights[:2], vectors], x)
    w_x, w_h, b = (vectors[k : k + 4].flatten() for k in (0, 4, 8))
    for found, carries in ((y, False), (carried, True)):
        h = c = torch.zeros(N, H, dtype=F64)
        for t in range(T):
            gates = normalized(x[t] @ w_ih.mT, w_x, b) + normalized(h @ w_hh.mT, w_h, None)
            i, f, g, o = gates.chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            inner = normalized(c, vectors[12], vectors[13])
            h = torch.sigmoid(o) * torch.tanh(inner)
            c = inner if carries else c
            assert_equal(found[t], h)
