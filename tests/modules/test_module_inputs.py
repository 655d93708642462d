"""Every form of input, lengths, dropout and autograd mode gives what torch.nn gives."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from tests.helpers.compare_modules import (
    H,
    I,
    N,
    T,
    assert_accurate,
    assert_same,
    changed,
    draw,
    each_cell,
    each_option,
    pair,
    run,
    state_for,
    states_of,
    tensors_of,
)

pytestmark = pytest.mark.usefixtures("device")


def sorted_pack(state):
    return pack_padded_sequence(draw(T, N, I), [5, 3, 1]), state


def unsorted_pack(state):
    return pack_padded_sequence(draw(T, N, I), [2, 5, 1], enforce_sorted=False), state


FORMS = {
    "dense": lambda state: (draw(T, N, I), state),
    "sorted": sorted_pack,
    "unsorted": unsorted_pack,
    "transposed": lambda state: (draw(N, T, I).transpose(0, 1), state),
    "strided": lambda state: (draw(2 * T, N, 2 * I)[::2, :, ::2], state),
    "features first": lambda state: (draw(I, T, N).permute(1, 2, 0), state),
    "expanded": lambda state: (draw(1, 1, I).expand(T, N, I), state),
    "state expanded": lambda state: (
        draw(T, N, I),
        changed(lambda s: s[:, :1].expand_as(s), state),
    ),
    "state strided": lambda state: (draw(T, N, I), changed(lambda s: s.mT.clone().mT, state)),
    "state as a list": lambda state: (
        draw(T, N, I),
        list(state) if isinstance(state, tuple) else state,
    ),
}


@pytest.mark.covering
@each_option
@pytest.mark.parametrize("with_state", (False, True), ids=("", "hx"))
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_inputs(cell, options, form, with_state):
    theirs, ours = pair(cell=cell, **options)
    probe, _ = form(None)
    rows = N if isinstance(probe, PackedSequence) or not ours.batch_first else T
    input, state = form(state_for(ours, rows) if with_state else None)
    assert_same(theirs, ours, input, state)
    if isinstance(input, PackedSequence):
        expected, found = theirs(input, state)[0], ours(input, state)[0]
        assert type(found) is PackedSequence
        assert found.batch_sizes is input.batch_sizes
        for mine, yours in zip(found[1:], expected[1:], strict=True):
            assert mine is yours is None or torch.equal(mine, yours)


@each_option
@pytest.mark.parametrize("with_state", (False, True), ids=("", "hx"))
def test_unbatched(cell, options, with_state):
    theirs, ours = pair(cell=cell, **options)
    assert_same(theirs, ours, draw(T, I), state_for(ours, None) if with_state else None)


@each_option
@pytest.mark.parametrize("with_state", (False, True), ids=("", "hx"))
def test_zero_batch(cell, options, with_state):
    theirs, ours = pair(cell=cell, **options)
    x = draw(0, T, I) if ours.batch_first else draw(T, 0, I)
    found = assert_same(theirs, ours, x, state_for(ours, 0) if with_state else None)
    assert found["y"].numel() == 0


@pytest.mark.covering
@each_cell
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
@pytest.mark.parametrize("form", ("dense", "sorted", "unsorted"))
@pytest.mark.parametrize("dropout", (0.0, 0.4, 1.0))
def test_dropout_masks(form, dropout, dtype, cell, device):
    """The same elements are dropped, and as many random numbers drawn; none in evaluation."""
    random = torch.cuda if device == "cuda" else torch
    options = {"num_layers": 3, "dropout": dropout, "bidirectional": True, "dtype": dtype}
    theirs, ours = pair(cell=cell, **options)
    input, state = FORMS[form](None)
    input = input.to(dtype)
    expected, found = run(theirs, input), run(ours, input)
    left = []
    for module in (theirs, ours):
        torch.manual_seed(2)
        module(input)
        left.append(random.get_rng_state())
    assert torch.equal(*left)
    if dtype is torch.bfloat16:  # a differing mask is far off, a rounding is not
        exact = run(copy.deepcopy(theirs).double(), input.double())
        assert_accurate(found, expected, {"y": exact["y"]}, dtype)
    else:
        torch.testing.assert_close(found, expected)
    ours.eval()
    assert torch.equal(ours(input)[0].data, ours(input)[0].data)
    assert_same(theirs.eval().double(), ours.double(), input.double())


@each_cell
@pytest.mark.parametrize(
    "mode", (torch.no_grad, torch.inference_mode, nullcontext), ids=("no_grad", "inference", "grad")
)
@pytest.mark.parametrize("form", ("dense", "unsorted"))
def test_grad_modes(mode, form, cell):
    theirs, ours = pair(num_layers=2, cell=cell)
    input, state = FORMS[form](state_for(ours, N))
    with mode():
        found = tensors_of(ours(input, state))
        torch.testing.assert_close(found, tensors_of(theirs(input, state)))
    for t in found.values():
        assert t.requires_grad == (mode is nullcontext)
        assert t.is_inference() == (mode is torch.inference_mode)


@each_cell
def test_frozen_module_passes_gradients_through(cell):
    theirs, ours = (m.requires_grad_(False) for m in pair(num_layers=2, cell=cell))
    assert_same(theirs, ours, draw(T, N, I), state_for(ours, N))
    assert_same(theirs, ours, draw(T, N, I, grad=False))


class ByRows:
    """What lengths= stands for: each row by itself, cut to its length."""

    def forward(self, input, hx, *, lengths):
        x = input.transpose(0, 1) if self.batch_first else input
        rows, ends = [], []
        for n, length in enumerate(lengths):
            end = changed(lambda s, n=n: s[:, n], hx)
            row = x.new_zeros(0, (self.proj_size or H) * (2 if self.bidirectional else 1))
            if length:
                row, end = super().forward(x[:length, n].contiguous(), end)
            rows.append(nn.functional.pad(row, (0, 0, 0, T - length)))
            ends.append(states_of(end))
        ends = [torch.stack(s, 1) for s in zip(*ends, strict=True)]
        y = torch.stack(rows, 0 if self.batch_first else 1)
        return y, (tuple(ends) if len(ends) > 1 else ends[0])


LENGTHS = ([2, 5, 1], [5, 5, 5], [0, 3, 5], [4, 0, 2], [1, 0, 0], [0, 0, 0], [5, 4, 4])


@pytest.mark.covering
@each_option
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_lengths(cell, options, lengths):
    theirs, ours = pair(cell=cell, **options)
    theirs.__class__ = type("ByRows", (ByRows, type(theirs)), {})
    x = draw(N, T, I) if ours.batch_first else draw(T, N, I)
    state = state_for(ours, N)
    if any(lengths):
        expected = run(theirs, x, state, lengths=lengths)
        torch.testing.assert_close(run(ours, x, state, lengths=lengths), expected)
    else:
        y, ends = ours(x, state, lengths=lengths)
        assert not y.any()
        assert all(map(torch.equal, states_of(ends), states_of(state)))
    zeros = changed(torch.zeros_like, state)
    with torch.no_grad():
        for given in (lengths, torch.tensor(lengths), torch.tensor(lengths, dtype=torch.int32)):
            expected = theirs(x, zeros, lengths=lengths)
            torch.testing.assert_close(ours(x, lengths=given), expected)


@each_cell
def test_lengths_of_empty_batch(cell):
    found = tensors_of(pair(cell=cell)[1](draw(T, 0, I), lengths=[]))
    assert found.pop("y").shape == (T, 0, H)
    assert {t.shape for t in found.values()} == {(1, 0, H)}
