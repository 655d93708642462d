"""lengths= under torch.compile, and the operator's padding behind packed data."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import lstm_fused
from lstm_fused import ops, padded
from lstm_fused.operators import forward_op
from tests.helpers.compare_modules import each_cell, state_for, states_of
from tests.helpers.oracle import CELLS, Problem, has_cell_state

I, H = 3, 7  # noqa: E741
LENGTHS = ([4, 0, 6, 2, 1], [3, 3], [9])
MODULES = {
    "lstm": ("lstm", {}),
    "lstm projected": ("lstm", {"proj_size": 2, "bidirectional": True, "batch_first": True}),
    "gru deep": ("gru", {"num_layers": 2, "bidirectional": True, "bias": False}),
    "rnn_tanh": ("rnn_tanh", {}),
    "rnn_relu": ("rnn_relu", {"num_layers": 2}),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(name):
    cell, options = MODULES[name]
    kind, more = CELLS[cell]
    return getattr(lstm_fused, kind)(I, H, dtype=torch.float64, **more | options)


def input_of(module, lengths):
    """An input one step longer than the longest row. Padding is NaN and must have no effect."""
    x = torch.randn(max(lengths) + 1, len(lengths), I, dtype=torch.float64)
    for n, length in enumerate(lengths):
        x[length:, n] = float("nan")
    return (x.transpose(0, 1) if module.batch_first else x).requires_grad_()


def gradients(call, module, x, hx, lengths):
    y, ends = call(x, hx, lengths)
    out = [y, *states_of(ends)]
    loss = sum((o * torch.arange(o.numel()).view(o.shape).cos()).sum() for o in out)
    leaves = [x, *states_of(hx), *module.parameters()]
    return out, torch.autograd.grad(loss, leaves)


@pytest.mark.covering(goals=lambda name, hx: {hx})
@pytest.mark.parametrize("hx", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_compiles(name, hx):
    module = make(name)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    for lengths in LENGTHS:
        x = input_of(module, lengths)
        state = state_for(module, len(lengths)) if hx else None
        given = x, state, torch.tensor(lengths)
        torch.testing.assert_close(
            gradients(compiled, module, *given), gradients(module, module, *given)
        )


@pytest.mark.covering(goals=lambda name: {len(name) > 10})
@pytest.mark.parametrize("name", MODULES)
def test_compiles_rows_without_a_step(name):
    module = make(name)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for hx in (None, state_for(module, 2)):
        given = input_of(module, [0, 0]), hx, torch.tensor([0, 0])
        torch.testing.assert_close(compiled(*given), module(*given))


@pytest.mark.full
def test_compiles_with_inductor():
    module = make("gru deep")
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for lengths in LENGTHS[:2]:
        given = input_of(module, lengths), None, torch.tensor(lengths, dtype=torch.int32)
        torch.testing.assert_close(
            gradients(compiled, module, *given), gradients(module, module, *given)
        )


def test_compiles_a_list():
    module = make("lstm")
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = input_of(module, [4, 0, 6])
    torch.testing.assert_close(compiled(x, lengths=[4, 0, 6]), module(x, lengths=[4, 0, 6]))


@pytest.mark.parametrize("wrong", [[3, 8], [-1, 2]])
def test_compiled_checks_lengths(wrong):
    module = make("lstm")
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="lengths must be from 0 to the input's length"):
        compiled(torch.randn(7, 2, I, dtype=torch.float64), lengths=torch.tensor(wrong))


def test_compiled_lengths_need_the_fused_path():
    module = make("lstm")
    module.check_hidden_size = lambda *_: None
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="lengths= cannot be recorded in a graph"):
        compiled(torch.randn(7, 2, I, dtype=torch.float64), lengths=torch.tensor([7, 3]))


def packed(cell, D, dtype=torch.float64):
    """x, batch_sizes, state0 and weights of a layer, for autograd."""
    p = Problem(1, 1, I, 17, dtype, directions=D, cell=cell)
    module = p.module(lstm_fused)
    data = torch.randn(7, 3, I, dtype=dtype)
    x, batch_sizes, *_ = pack_padded_sequence(data, [7, 4, 2])
    state0 = states_of(state_for(module, 3, dtype))
    return x, batch_sizes, state0, list(module.parameters())


def with_padding(x, batch_sizes, rows):
    """The same, with rows of NaN behind it and two steps without a row."""
    sizes = torch.cat((batch_sizes, torch.tensor([0, 0, -rows])))
    return torch.cat((x, x.new_full((rows, x.shape[1]), float("nan")))), sizes


@pytest.mark.parametrize("D", [1, 2])
@each_cell
def test_padding_behind_packed_data(cell, D):
    """Padding gives zeros and changes no other result or derivative."""
    x, batch_sizes, state0, weights = packed(cell, D)
    found = {}
    for rows in (0, 5):
        leaf = x.clone().requires_grad_()
        data, sizes = with_padding(leaf, batch_sizes, rows) if rows else (leaf, batch_sizes)
        y, ends = ops.layer(data, sizes, state0, weights, cell, D)
        assert not y[len(x) :].any()
        out = [y[: len(x)], *ends]
        leaves = [leaf, *state0, *weights]
        loss = sum((o * o.detach().cos()).sum() for o in out)
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum((g * g).sum() for g in first), leaves)
        found[rows] = [*out, *first, *second]
    torch.testing.assert_close(found[5], found[0])


@each_cell
def test_gradient_of_padding_is_zero(cell):
    x, batch_sizes, state0, weights = packed(cell, 1)
    data, sizes = with_padding(x, batch_sizes, 5)
    data = data.requires_grad_()
    y, _ = ops.layer(data, sizes, state0, weights, cell)
    (grad,) = torch.autograd.grad(y, data, torch.ones_like(y))
    assert grad[: len(x)].any() and not grad[len(x) :].any()


@pytest.mark.parametrize(
    "sizes, words",
    [
        ([3, 2, 0], "must be positive"),
        ([3, 2, 0, -1], "add up to 6 but x has 5"),
        ([3, 1, 2, -1], "must not grow"),
        ([3, -2, 2], "must be positive"),
    ],
)
def test_batch_sizes_errors(sizes, words):
    weights = [w.detach() for w in nn.LSTM(I, H).parameters()]
    with pytest.raises(RuntimeError, match=words):
        forward_op(torch.randn(5, I), torch.tensor(sizes), None, [], weights, 0, 1, False, 0)


@each_cell
def test_operator_equals_module(cell):
    kind, more = CELLS[cell]
    module = getattr(lstm_fused, kind)(I, H, dtype=torch.float64, **more)
    lengths = LENGTHS[0]
    x = input_of(module, lengths)
    y, ends = padded.layer(x, torch.tensor(lengths), (), list(module.parameters()), cell)
    expected, expected_ends = module(x, lengths=lengths)
    assert len(ends) == (2 if has_cell_state(cell) else 1)
    torch.testing.assert_close([y, *ends], [expected, *states_of(expected_ends)])
