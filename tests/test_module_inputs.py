"""Every form an input may take, and every mode it may be given in, as torch.nn.LSTM takes it."""

import copy
from contextlib import nullcontext

import pytest
import torch
from beside import (
    H,
    I,
    N,
    T,
    assert_accurate,
    assert_same,
    draw,
    each_option,
    pair,
    run,
    state_for,
    tensors_of,
)
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence


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
        state and tuple(s[:, :1].expand_as(s) for s in state),
    ),
    "state strided": lambda state: (draw(T, N, I), state and tuple(s.mT.clone().mT for s in state)),
    "state as a list": lambda state: (draw(T, N, I), state and list(state)),
}


@each_option
@pytest.mark.parametrize("with_state", (False, True), ids=("", "hx"))
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_inputs(options, form, with_state):
    theirs, ours = pair(**options)
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
def test_unbatched(options, with_state):
    theirs, ours = pair(**options)
    assert_same(theirs, ours, draw(T, I), state_for(ours, None) if with_state else None)


@each_option
@pytest.mark.parametrize("with_state", (False, True), ids=("", "hx"))
def test_zero_batch(options, with_state):
    theirs, ours = pair(**options)
    x = draw(0, T, I) if ours.batch_first else draw(T, 0, I)
    found = assert_same(theirs, ours, x, state_for(ours, 0) if with_state else None)
    assert found["y"].numel() == 0


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
@pytest.mark.parametrize("form", ("dense", "sorted", "unsorted"))
@pytest.mark.parametrize("dropout", (0.0, 0.4, 1.0))
def test_dropout_masks(form, dropout, dtype):
    """The same elements are dropped, and as many random numbers drawn; none in evaluation."""
    theirs, ours = pair(num_layers=3, dropout=dropout, bidirectional=True, dtype=dtype)
    input, state = FORMS[form](None)
    input = input.to(dtype)
    expected, found = run(theirs, input), run(ours, input)
    left = []
    for module in (theirs, ours):
        torch.manual_seed(2)
        module(input)
        left.append(torch.get_rng_state())
    assert torch.equal(*left)
    if dtype is torch.bfloat16:  # a differing mask is far off, a rounding is not
        torch.testing.assert_close(found["y"], expected["y"], rtol=0.02, atol=0.004)
    else:
        torch.testing.assert_close(found, expected)
    ours.eval()
    assert torch.equal(ours(input)[1][0], ours(input)[1][0])
    assert_same(theirs.eval().double(), ours.double(), input.double())


@pytest.mark.parametrize(
    "mode", (torch.no_grad, torch.inference_mode, nullcontext), ids=("no_grad", "inference", "grad")
)
@pytest.mark.parametrize("form", ("dense", "unsorted"))
def test_grad_modes(mode, form):
    theirs, ours = pair(num_layers=2)
    input, state = FORMS[form](state_for(ours, N))
    with mode():
        found = tensors_of(ours(input, state))
        torch.testing.assert_close(found, tensors_of(theirs(input, state)))
    for t in found.values():
        assert t.requires_grad == (mode is nullcontext)
        assert t.is_inference() == (mode is torch.inference_mode)


def test_frozen_module_passes_gradients_through():
    theirs, ours = (m.requires_grad_(False) for m in pair(num_layers=2))
    assert_same(theirs, ours, draw(T, N, I), state_for(ours, N))
    assert_same(theirs, ours, draw(T, N, I, grad=False))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
@pytest.mark.parametrize("proj", (0, 3))
@pytest.mark.parametrize("form", ("dense", "unsorted"))
def test_autocast(form, proj, dtype):
    """The dtypes that nn.LSTM returns, and values at most twice as far off as its own."""
    theirs, ours = pair(num_layers=2, proj_size=proj, dtype=dtype)
    input, state = FORMS[form](state_for(ours, N, dtype))
    input = input.to(dtype)
    with torch.no_grad():
        wide = tuple(s.double() for s in state)
        exact = tensors_of(copy.deepcopy(theirs).double()(input.double(), wide))
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = tensors_of(theirs(input, state)), tensors_of(ours(input, state))
    narrow = torch.float64 if dtype is torch.float64 else torch.bfloat16
    assert_accurate(found, expected, exact, narrow)


def test_autocast_gradients_have_the_weights_dtype():
    _, ours = pair(dtype=torch.float32)
    x = draw(T, N, I, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(x)[0]
    assert y.dtype is torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype is ours.weight_hh_l0.grad.dtype is torch.float32


class ByRows(nn.LSTM):
    """What lengths= stands for: each row by itself, cut to its length."""

    def forward(self, input, hx, *, lengths):
        x = input.transpose(0, 1) if self.batch_first else input
        rows, h_n, c_n = [], [], []
        for n, length in enumerate(lengths):
            h, c = (s[:, n] for s in hx)
            row = x.new_zeros(0, (self.proj_size or H) * (2 if self.bidirectional else 1))
            if length:
                row, (h, c) = super().forward(x[:length, n].contiguous(), (h, c))
            rows.append(nn.functional.pad(row, (0, 0, 0, T - length)))
            h_n.append(h)
            c_n.append(c)
        y = torch.stack(rows, 0 if self.batch_first else 1)
        return y, (torch.stack(h_n, 1), torch.stack(c_n, 1))


LENGTHS = ([2, 5, 1], [5, 5, 5], [0, 3, 5], [4, 0, 2], [1, 0, 0], [0, 0, 0], [5, 4, 4])


@each_option
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_lengths(options, lengths):
    theirs, ours = pair(**options)
    theirs.__class__ = ByRows
    x = draw(N, T, I) if ours.batch_first else draw(T, N, I)
    state = state_for(ours, N)
    if any(lengths):
        expected = run(theirs, x, state, lengths=lengths)
        torch.testing.assert_close(run(ours, x, state, lengths=lengths), expected)
    else:
        y, ends = ours(x, state, lengths=lengths)
        assert not y.any()
        assert torch.equal(ends[0], state[0]) and torch.equal(ends[1], state[1])
    zeros = tuple(torch.zeros_like(s) for s in state)
    with torch.no_grad():
        for given in (lengths, torch.tensor(lengths), torch.tensor(lengths, dtype=torch.int32)):
            expected = theirs(x, zeros, lengths=lengths)
            torch.testing.assert_close(ours(x, lengths=given), expected)


def test_lengths_of_no_rows():
    _, ours = pair()
    y, (h_n, _) = ours(draw(T, 0, I), lengths=[])
    assert y.shape == (T, 0, H) and h_n.shape == (1, 0, H)
