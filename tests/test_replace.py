"""replace and restore: the same model with another class under it, and back."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import lstm_fused
from lstm_fused import ops

pytestmark = pytest.mark.usefixtures("real_device")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleDict({"lstm": nn.LSTM(4, 6, num_layers=2, dropout=0.2)})
        self.shared = nn.LSTM(6, 6, bidirectional=True)
        self.again = nn.ModuleList([nn.Linear(12, 6), self.shared])
        self.gru = nn.GRU(12, 5)
        self.rnn = nn.RNN(5, 5, nonlinearity="relu")
        self.cells = nn.ModuleList([nn.LSTMCell(5, 4), nn.GRUCell(4, 4), nn.RNNCell(4, 3)])

    def forward(self, x):
        x = self.encoder["lstm"](x)[0]
        x = self.again[0](self.shared(x)[0])
        x = self.rnn(self.gru(self.shared(x)[0])[0])[0]
        lstm, gru, rnn = self.cells
        return rnn(gru(lstm(x[-1])[0]))


def recurrent(model):
    return [m for m in model.modules() if isinstance(m, (nn.RNNBase, nn.RNNCellBase))]


NAMES = ["LSTM", "LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"]
OURS, THEIRS = ([getattr(library, name) for name in NAMES] for library in (lstm_fused, nn))


def kinds(model):
    return [type(m) for m in recurrent(model)]


def first(result):
    """The first output of a layer or a cell, which gives one tensor or a tuple."""
    return result if isinstance(result, torch.Tensor) else first(result[0])


def outcome(model, x):
    """Output and gradients by name, from one seed."""
    torch.manual_seed(5)
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return {"y": y.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


def test_there_and_back():
    model, x = Model().double(), torch.randn(5, 3, 4, dtype=torch.float64)
    before, text, names = outcome(model, x), repr(model), list(model.state_dict())
    objects, parameters = recurrent(model), list(model.parameters())

    assert lstm_fused.replace(model) is model
    assert kinds(model) == OURS
    replaced = outcome(model, x)
    assert ops.last_run()["pass"] == "backward"
    torch.testing.assert_close(replaced, before)
    assert (repr(model), list(model.state_dict())) == (text, names)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(recurrent(model), objects, strict=True))
    assert model.again[1] is model.shared

    lstm_fused.replace(model)
    assert kinds(model) == OURS
    assert lstm_fused.restore(model) is model
    assert kinds(model) == THEIRS
    restored = outcome(model, x)
    for name, t in before.items():
        assert torch.equal(restored[name], t), name
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


each_name = pytest.mark.parametrize("name", dict.fromkeys(NAMES))


@each_name
def test_root(name):
    theirs, ours = getattr(nn, name), getattr(lstm_fused, name)
    model = theirs(4, 6)
    assert lstm_fused.replace(model) is model
    assert type(model) is ours
    assert type(lstm_fused.restore(model)) is theirs
    assert type(lstm_fused.restore(ours(4, 6))) is theirs


@each_name
def test_mode_hooks_and_attributes_are_kept(name):
    model = nn.Sequential(getattr(nn, name)(4, 6), nn.Identity())
    module, seen = model[0].eval(), []
    module.note = "mine"
    module.register_forward_pre_hook(lambda m, args: seen.append("before"))
    module.register_forward_hook(lambda m, args, out: seen.append("after"))
    weights = dict(module.named_parameters())
    frozen, watched = (
        next(w for k, w in weights.items() if k.startswith(kind))
        for kind in ("bias_ih", "weight_hh")
    )
    watched.register_hook(lambda grad: seen.append("gradient"))
    frozen.requires_grad_(False)
    for change in (lstm_fused.replace, lstm_fused.restore):
        seen.clear()
        change(model)
        first(module(torch.ones(2, 4))).sum().backward()
        assert seen == ["before", "after", "gradient"]
        assert model.training and not module.training and module.note == "mine"
        assert not frozen.requires_grad


WRAPPED = {
    "orthogonal": lambda m, at: parametrizations.orthogonal(m, f"weight_hh{at}"),
    "weight_norm": lambda m, at: parametrizations.weight_norm(m, f"weight_ih{at}"),
    "pruned": lambda m, at: prune.l1_unstructured(m, f"weight_hh{at}", amount=0.4),
    "spectral_norm": lambda m, at: nn.utils.spectral_norm(m, f"weight_hh{at}"),
}


@each_name
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_wrapped_weights(wrap, name):
    """Twice the same way and once back: parametrized modules have classes of their own."""
    x = torch.randn(3, 4, dtype=torch.float64)
    theirs, ours = getattr(nn, name), getattr(lstm_fused, name)
    at = "" if name.endswith("Cell") else "_l0"

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = wrap(theirs(4, 6, dtype=torch.float64), at)
            self.b = theirs(4, 6, dtype=torch.float64)

        def forward(self, x):
            return first(self.a(x)) + first(self.b(x))

    model = First().eval()
    before, names = outcome(model, x), list(model.state_dict())
    classes = type(model.a).__name__, type(model.b)
    lstm_fused.replace(model)
    assert all(isinstance(m, ours) for m in (model.a, model.b))
    torch.testing.assert_close(outcome(model, x), before)
    assert ops.last_run()["pass"] == "backward"
    lstm_fused.restore(model)
    assert not any(isinstance(m, ours) for m in (model.a, model.b))
    assert isinstance(model.a, theirs)
    assert (type(model.b), type(model.a).__name__.removeprefix("Parametrized")) == (
        classes[1],
        name,
    )
    torch.testing.assert_close(outcome(model, x), before)
    assert list(model.state_dict()) == names


def test_optimizer_goes_on():
    """An optimizer made before trains the replaced model as it would have trained the other."""
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    trained = []
    for change in (lambda m: m, lstm_fused.replace):
        torch.manual_seed(6)
        model = Model().double().eval()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for k in range(4):
            if k == 2:
                change(model)
            outcome(model, x)
            optimizer.step()
        trained.append(model.state_dict())
    torch.testing.assert_close(trained[1], trained[0])
    assert not torch.equal(trained[0]["shared.weight_hh_l0"], Model().shared.weight_hh_l0.double())


def subclass(theirs):
    return type("Custom", (theirs,), {})(4, 6)


def overridden(theirs):
    module = theirs(4, 6)
    module.forward = lambda *args: theirs.forward(module, *args)
    return module


LEFT = {
    "subclass": (subclass, "0, a Custom, which is a subclass"),
    "forward": (overridden, "0, whose forward is overridden on the instance"),
    "script": (lambda theirs: torch.jit.script(theirs(4, 6)), "0, compiled by TorchScript"),
}


@each_name
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
@pytest.mark.parametrize("make, words", LEFT.values(), ids=LEFT)
def test_left_alone_with_a_warning(make, words, name):
    theirs, ours = getattr(nn, name), getattr(lstm_fused, name)
    model = nn.ModuleList([make(theirs), theirs(4, 6)])
    kind = type(model[0])
    with pytest.warns(UserWarning, match=f"left alone: {words}") as caught:
        lstm_fused.replace(model)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert type(model[0]) is kind and type(model[1]) is ours
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lstm_fused.restore(model)
    assert type(model[0]) is kind and type(model[1]) is theirs


@pytest.mark.parametrize("change", (lstm_fused.replace, lstm_fused.restore))
def test_not_a_module(change):
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got dict"):
        change({"lstm": nn.LSTM(4, 6)})
