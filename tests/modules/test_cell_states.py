"""return_cell_states=True gives c of every step, as torch.nn's LSTM called step by step does."""

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lstm_fused
from tests.helpers import loops
from tests.helpers.compare_modules import (
    OPTIONS,
    H,
    I,
    T,
    assert_accurate,
    draw,
    pair,
    state_for,
    states_of,
)

N = 4
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def leaves_of(module, x, state):
    return {
        "x": x,
        **dict(zip(("h0", "c0"), state, strict=False)),
        **dict(module.named_parameters()),
    }


@pytest.mark.usefixtures("device")
@pytest.mark.covering
@each_option
@pytest.mark.parametrize("with_resets", (False, True), ids=("", "resets"))
@pytest.mark.parametrize("with_state", (False, True), ids=("", "hx"))
@pytest.mark.parametrize("form", loops.FORMS)
def test_cell_states(form, with_state, with_resets, options):
    theirs, ours = pair(**options)
    call, lengths = loops.FORMS[form]
    x = draw(T, N, I)
    state = states_of(state_for(ours, N)) if with_state else ()
    mask = torch.rand(T, N) < 0.3 if with_resets else None
    given = x, state, mask, None, lengths
    expected, found = (
        loops.results(run, module, *given, leaves=leaves_of(module, x, state), cells=True)
        for run, module in ((loops.by_steps, theirs), (call, ours))
    )
    torch.testing.assert_close(found, expected)


@each_option
def test_unbatched(options):
    theirs, ours = pair(**options)
    x = draw(T, 1, I)
    expected, found = (
        loops.results(run, module, x, leaves=leaves_of(module, x, ()), cells=True)
        for run, module in ((loops.by_steps, theirs), (loops.unbatched, ours))
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("proj_size", (0, 3))
def test_accuracy(proj_size, dtype):
    theirs, ours = pair(proj_size=proj_size, bidirectional=True, dtype=dtype)
    x = draw(T, N, I, dtype=dtype, grad=False)
    with torch.no_grad():
        found = loops.results(loops.dense, ours, x, leaves={}, cells=True)
        expected = loops.results(loops.by_steps, theirs, x, leaves={}, cells=True)
        exact = loops.results(loops.by_steps, theirs.double(), x.double(), leaves={}, cells=True)
    tables = [
        {("c_n" if k == "cells" else k): t for k, t in r.items() if k != "c_n"}
        for r in (found, expected, exact)
    ]
    assert_accurate(*tables, dtype)


def test_only_the_cell_states_in_the_loss():
    """Their gradient reaches the input without one of output, h_n or c_n."""
    theirs, ours = pair(num_layers=2)
    x = draw(T, N, I)
    grads = []
    for run, module in ((loops.by_steps, theirs), (loops.dense, ours)):
        more = {} if module is theirs else {"return_cell_states": True}
        _, _, cells = run(module, x, **more)
        weights = torch.linspace(-1, 1, cells.numel()).to(cells.dtype).view_as(cells)
        grads.append(
            torch.autograd.grad(cells, [x, *module.parameters()], weights, allow_unused=True)
        )
    torch.testing.assert_close(*grads)


def test_last_one_is_c_n():
    _, ours = pair(bidirectional=True, num_layers=2)
    _, (_, c_n), cells = ours(draw(T, N, I), return_cell_states=True)
    assert torch.equal(cells[-1, :, :H], c_n[-2]) and torch.equal(cells[0, :, H:], c_n[-1])


def test_packed_like_output():
    _, ours = pair()
    packed = pack_padded_sequence(draw(T, N, I), [2, 5, 1, 4], enforce_sorted=False)
    output, _, cells = ours(packed, return_cell_states=True)
    assert type(cells) is PackedSequence
    for mine, yours in zip(cells[1:], output[1:], strict=True):
        assert mine is yours


def test_without_a_step():
    """Rows of length 0 alone, and no rows at all."""
    _, ours = pair()
    _, _, cells = ours(draw(T, N, I), lengths=[0] * N, return_cell_states=True)
    assert cells.shape == (T, N, H) and not cells.any()
    assert ours(draw(T, 0, I), return_cell_states=True)[2].shape == (T, 0, H)


@pytest.mark.parametrize("lengths", (None, [5, 3, 0, 1]))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_autocast(dtype, lengths):
    _, ours = pair(dtype=torch.float32)
    x = draw(T, N, I, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        _, (_, c_n), cells = ours(x.to(dtype), lengths=lengths, return_cell_states=True)
        _, (_, expected) = ours(x.to(dtype), lengths=lengths)
    assert cells.dtype is c_n.dtype is expected.dtype


@pytest.mark.parametrize("lengths", (False, True))
def test_compiles_and_exports(lengths):
    _, ours = pair(bidirectional=True)
    x = draw(T, N, I, grad=False)
    more = {"return_cell_states": True}
    more |= {"lengths": torch.tensor([5, 3, 0, 1])} if lengths else {}
    torch._dynamo.reset()
    expected = ours(x, **more)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, **more), expected)
    program = torch.export.export(ours, (x,), more)
    torch.testing.assert_close(program.module()(x, **more), expected)
    program = program.run_decompositions(lstm_fused.decompositions())
    torch.testing.assert_close(program.module()(x, **more), expected)


def test_gradcheck():
    _, ours = pair()
    x = draw(3, 2, I)

    def call(x):
        return ours(x, return_cell_states=True)[2]

    assert torch.autograd.gradcheck(call, x)
    assert torch.autograd.gradgradcheck(call, x)
    assert torch.autograd.gradcheck(call, x, check_forward_ad=True, check_backward_ad=False)


@pytest.mark.parametrize("cell", ("gru", "rnn_tanh"))
def test_only_an_lstm_has_them(cell):
    _, ours = pair(cell=cell)
    name = type(ours).__name__
    with pytest.raises(TypeError, match=f"needs an LSTM, {name} has no cell state"):
        ours(draw(T, N, I), return_cell_states=True)
    ours(draw(T, N, I), return_cell_states=False)


def test_unknown_option():
    with pytest.raises(TypeError, match="unexpected keyword argument 'cell_states'"):
        pair()[1](draw(T, N, I), cell_states=True)
