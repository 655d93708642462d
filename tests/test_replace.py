"""replace and restore: the same model with another class under it, and back."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import lstm_fused
from lstm_fused import ops


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleDict({"lstm": nn.LSTM(4, 6, num_layers=2, dropout=0.2)})
        self.shared = nn.LSTM(6, 6, bidirectional=True)
        self.again = nn.ModuleList([nn.Linear(12, 6), self.shared])
        self.gru = nn.GRU(12, 5)

    def forward(self, x):
        x = self.encoder["lstm"](x)[0]
        x = self.again[0](self.shared(x)[0])
        return self.gru(self.shared(x)[0])[0]


def lstms(model):
    return [m for m in model.modules() if isinstance(m, nn.LSTM)]


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
    objects, parameters = lstms(model), list(model.parameters())

    assert lstm_fused.replace(model) is model
    assert [type(m) for m in lstms(model)] == [lstm_fused.LSTM] * 2
    assert type(model.gru) is nn.GRU
    replaced = outcome(model, x)
    assert ops.last_run()["pass"] == "backward"
    torch.testing.assert_close(replaced, before)
    assert (repr(model), list(model.state_dict())) == (text, names)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(lstms(model), objects, strict=True))
    assert model.again[1] is model.shared

    lstm_fused.replace(model)
    assert [type(m) for m in lstms(model)] == [lstm_fused.LSTM] * 2
    assert lstm_fused.restore(model) is model
    assert [type(m) for m in lstms(model)] == [nn.LSTM] * 2
    restored = outcome(model, x)
    for name, t in before.items():
        assert torch.equal(restored[name], t), name
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_root():
    model = nn.LSTM(4, 6)
    assert lstm_fused.replace(model) is model
    assert type(model) is lstm_fused.LSTM
    assert type(lstm_fused.restore(model)) is nn.LSTM
    built = lstm_fused.LSTM(4, 6)
    assert type(lstm_fused.restore(built)) is nn.LSTM


def test_mode_hooks_and_attributes_are_kept():
    model = nn.Sequential(nn.LSTM(4, 6), nn.Identity())
    lstm, seen = model[0].eval(), []
    lstm.note = "mine"
    lstm.register_forward_pre_hook(lambda m, args: seen.append("before"))
    lstm.register_forward_hook(lambda m, args, out: seen.append("after"))
    lstm.weight_hh_l0.register_hook(lambda grad: seen.append("gradient"))
    lstm.bias_ih_l0.requires_grad_(False)
    for change in (lstm_fused.replace, lstm_fused.restore):
        seen.clear()
        change(model)
        lstm(torch.ones(2, 1, 4))[0].sum().backward()
        assert seen == ["before", "after", "gradient"]
        assert model.training and not lstm.training and lstm.note == "mine"
        assert not lstm.bias_ih_l0.requires_grad


WRAPPED = {
    "orthogonal": lambda m: parametrizations.orthogonal(m, "weight_hh_l0"),
    "weight_norm": lambda m: parametrizations.weight_norm(m, "weight_ih_l0"),
    "pruned": lambda m: prune.l1_unstructured(m, "weight_hh_l0", amount=0.4),
    "spectral_norm": lambda m: nn.utils.spectral_norm(m, "weight_hh_l0"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_wrapped_weights(wrap):
    """Twice the same way and once back: parametrized modules have classes of their own."""
    x = torch.randn(5, 3, 4, dtype=torch.float64)

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = wrap(nn.LSTM(4, 6, dtype=torch.float64))
            self.b = nn.LSTM(4, 6, dtype=torch.float64)

        def forward(self, x):
            return self.a(x)[0] + self.b(x)[0]

    model = First().eval()
    before, names = outcome(model, x), list(model.state_dict())
    classes = type(model.a).__name__, type(model.b)
    lstm_fused.replace(model)
    assert all(isinstance(m, lstm_fused.LSTM) for m in (model.a, model.b))
    torch.testing.assert_close(outcome(model, x), before)
    lstm_fused.restore(model)
    assert not any(isinstance(m, lstm_fused.LSTM) for m in (model.a, model.b))
    assert isinstance(model.a, nn.LSTM)
    assert (type(model.b), type(model.a).__name__.removeprefix("Parametrized")) == (
        classes[1],
        "LSTM",
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


class Custom(nn.LSTM):
    pass


def overridden():
    lstm = nn.LSTM(4, 6)
    lstm.forward = lambda *args: nn.LSTM.forward(lstm, *args)
    return lstm


LEFT = {
    "subclass": (lambda: Custom(4, 6), "0, a Custom, which is a subclass"),
    "forward": (overridden, "0, whose forward is overridden on the instance"),
    "script": (lambda: torch.jit.script(nn.LSTM(4, 6)), "0, compiled by TorchScript"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
@pytest.mark.parametrize("make, words", LEFT.values(), ids=LEFT)
def test_left_alone_with_a_warning(make, words):
    model = nn.ModuleList([make(), nn.LSTM(4, 6)])
    kind = type(model[0])
    with pytest.warns(UserWarning, match=f"left alone: {words}") as caught:
        lstm_fused.replace(model)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert type(model[0]) is kind and type(model[1]) is lstm_fused.LSTM
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lstm_fused.restore(model)
    assert type(model[0]) is kind and type(model[1]) is nn.LSTM


@pytest.mark.parametrize("change", (lstm_fused.replace, lstm_fused.restore))
def test_not_a_module(change):
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got dict"):
        change({"lstm": nn.LSTM(4, 6)})
