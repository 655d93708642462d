"""Calls with gradients in eager mode: past torch's dispatcher, and equal to the operators."""

from contextlib import contextmanager

import pytest
import torch
from torch.autograd import forward_ad

import lstm_fused
from lstm_fused import _C, runtime
from tests.helpers.compare_modules import STEPS, Watching, states_of
from tests.helpers.oracle import Problem, run_module
from tests.helpers.plan_coverage import DTYPES, isas_for

PROBLEMS = (
    Problem(1, 3, 7, 17, hx=True),
    Problem(3, 2, 17, 17, layers=2, directions=2, hx=True),
    Problem(9, 2, 6, 9, directions=2, proj=4, bias=False, hx=True),
    Problem(4, 5, 5, 40, batch_first=True, form="unsorted"),
    *(Problem(2, 5, 6, 18, hx=True, cell=cell) for cell in ("gru", "rnn_tanh", "rnn_relu")),
)


@pytest.fixture
def direct(monkeypatch):
    """Whether each call of _C.forward and _C.backward was made, by name."""
    taken = []

    def recording(name):
        function = getattr(_C, name)

        def recorded(*args):
            found = function(*args)
            taken.append((name, found is not None))
            return found

        return recorded

    for name in ("forward", "backward"):
        monkeypatch.setattr(_C, name, recording(name))
    return taken


@contextmanager
def through_the_dispatcher():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("forward", "backward"):
            patch.setattr(_C, name, lambda *_: None)
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_layers_equal_the_operator(problem, dtype, direct):
    problem = Problem(**vars(problem) | {"dtype": dtype})
    for isa in isas_for(dtype):
        runtime.set_isa(isa)
        quick = run_module(problem, lstm_fused)
        assert (
            direct == [("forward", True)] * problem.layers + [("backward", True)] * problem.layers
        )
        direct.clear()
        with through_the_dispatcher():
            usual = run_module(problem, lstm_fused)
        assert quick.backward_run == usual.backward_run
        assert quick.tensors.keys() == usual.tensors.keys()
        for name, t in usual.tensors.items():
            assert torch.equal(quick.tensors[name], t), (isa, name)


def step(cell, rows, state, bias, dtype):
    """A cell, its arguments and all that has a gradient; the same at each call."""
    torch.manual_seed(0)
    module = STEPS[cell](9, 21, bias=bias, dtype=dtype)
    x, h, c = (torch.randn(*rows, n).to(dtype).requires_grad_() for n in (9, 21, 21))
    given = () if not state else (h, c) if cell == "lstm" else (h,)
    hx = None if not state else given if cell == "lstm" else h
    return module, x, hx, [x, *given, *module.parameters()]


def loss_of(states):
    return sum((k + 2) * (s * s).sum() for k, s in enumerate(states_of(states)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", STEPS)
@pytest.mark.parametrize("rows", [(), (1,), (3,), (7,), (9,)], ids=str)
def test_cells_equal_the_operator(rows, cell, dtype, direct):
    for isa in isas_for(dtype):
        runtime.set_isa(isa)
        for state, bias in ((True, True), (False, True), (True, False)):
            module, x, hx, wanted = step(cell, rows, state, bias, dtype)
            quick = torch.autograd.grad(loss_of(module(x, hx)), wanted)
            run = runtime.last_run()
            assert direct == [("forward", True), ("backward", True)]
            assert (run["pass"], run["kernel"]) == (
                "backward",
                "direct" if sum(rows) < 9 else "persistent",
            )
            direct.clear()
            module, x, hx, wanted = step(cell, rows, state, bias, dtype)
            with through_the_dispatcher():
                usual = torch.autograd.grad(loss_of(module(x, hx)), wanted)
            for one, other in zip(quick, usual, strict=True):
                assert torch.equal(one, other), isa


def test_is_left_to_the_operator(direct):
    """Where something observes the call."""
    layer, x = lstm_fused.LSTM(4, 6), torch.randn(3, 2, 4)
    with Watching() as mode:
        layer(x)[0].sum().backward()
    assert {f"lstm_fused.recurrent_{name}.default" for name in ("forward", "backward")} <= mode.seen
    with torch.profiler.profile() as profile:
        layer(x)[0].sum().backward()
    assert "lstm_fused::recurrent_backward" in {event.key for event in profile.key_averages()}
    assert direct == [("forward", False), ("backward", False)] * 2


@pytest.mark.parametrize("cell", STEPS)
def test_batched_gradients_of_a_cell(cell):
    """is_grads_batched, with gradients of the gradients and without."""
    module, x, hx, wanted = step(cell, (3,), True, True, torch.float64)
    out = states_of(module(x, hx))[0]
    basis = torch.randn(4, *out.shape, dtype=out.dtype)
    for create_graph in (False, True):
        options = {"retain_graph": True, "create_graph": create_graph}
        found = torch.autograd.grad(out, wanted, basis, is_grads_batched=True, **options)
        for k, direction in enumerate(basis):
            one = torch.autograd.grad(out, wanted, direction, **options)
            for all_, expected in zip(found, one, strict=True):
                torch.testing.assert_close(all_[k], expected)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
def test_tangents_of_gradients(kind):
    """A gradient's tangent follows from that of the gradient it is computed from."""
    shape = (2, 4) if "Cell" in kind else (3, 2, 4)
    torch.manual_seed(0)
    theirs = getattr(torch.nn, kind)(4, 6, dtype=torch.float64)
    ours = getattr(lstm_fused, kind)(4, 6, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    found = []
    for module in (theirs, ours):
        out = torch.utils._pytree.tree_leaves(module(x))[0]
        torch.manual_seed(1)
        d, move = torch.randn(2, *out.shape, dtype=out.dtype)
        with forward_ad.dual_level():
            (dx,) = torch.autograd.grad(out, x, forward_ad.make_dual(d, move))
            found.append(forward_ad.unpack_dual(dx))
    torch.testing.assert_close(found[1].primal, found[0].primal)
    torch.testing.assert_close(found[1].tangent, found[0].tangent)


def negative(t):
    """A view whose values are the negative of its memory's."""
    view = torch.complex(torch.zeros_like(t), -t).conj().imag
    assert view.is_neg() and torch.equal(view, t)
    return view


def zeros_without_memory(t):
    return torch._efficientzerotensor(t.shape, dtype=t.dtype)


@pytest.mark.parametrize("made_by", [negative, zeros_without_memory])
@pytest.mark.parametrize("which", ["x", "state", "weight", "gradient"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "LSTMCell", "RNNCell"])
@pytest.mark.parametrize("grad", [True, False])
def test_values_that_are_not_in_memory(grad, kind, which, made_by):
    """Tensors of torch.Tensor's own class whose memory does not hold their values."""
    if made_by is zeros_without_memory and which == "weight":
        pytest.skip("torch makes no parameter of it")
    if which == "gradient" and not grad:
        pytest.skip("there is no gradient")
    cell = "Cell" in kind
    torch.manual_seed(0)
    theirs = getattr(torch.nn, kind)(4, 6, dtype=torch.float64)
    x = torch.randn((2, 4) if cell else (1, 2, 4), dtype=torch.float64)
    h, c = torch.randn(2, *((2, 6) if cell else (1, 2, 6)), dtype=torch.float64)
    if which == "x":
        x = made_by(x)
    if which == "state":
        h = made_by(h)
    name = "weight_hh" if cell else "weight_hh_l0"
    if which == "weight":
        setattr(theirs, name, torch.nn.Parameter(made_by(getattr(theirs, name).detach())))
    ours = lstm_fused.replace(theirs)
    hx = (h, c) if "LSTM" in kind else h
    with torch.set_grad_enabled(grad):
        found = []
        for module in (theirs, ours):
            out = torch.utils._pytree.tree_leaves(module(x, hx))
            if grad:
                d = torch.ones_like(out[0])
                d = made_by(d) if which == "gradient" else d
                out += torch.autograd.grad(out[0], list(module.parameters()), d)
            found.append(out)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
