"""replace and restore change the classes of a model's layers and nothing else."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import lstm_fused
from lstm_fused import runtime
from lstm_fused.fallback import CALLED_BY_TORCH
from tests.helpers.distributed import one_process

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


def test_replace_restore_roundtrip():
    model, x = Model().double(), torch.randn(5, 3, 4, dtype=torch.float64)
    before, text, names = outcome(model, x), repr(model), list(model.state_dict())
    objects, parameters = recurrent(model), list(model.parameters())

    assert lstm_fused.replace(model) is model
    assert kinds(model) == OURS
    replaced = outcome(model, x)
    assert runtime.last_run()["pass"] == "backward"
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
    frozen, observed = (
        next(w for k, w in weights.items() if k.startswith(kind))
        for kind in ("bias_ih", "weight_hh")
    )
    observed.register_hook(lambda grad: seen.append("gradient"))
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


def test_optimizer_state_survives_replace():
    """An optimizer made before replace trains the replaced model as it would the original."""
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


def overridden(theirs):
    module = theirs(4, 6)
    module.forward = lambda *args: theirs.forward(module, *args)
    return module


class Final(type):
    def __new__(cls, name, bases, namespace):
        if any(type(base) is Final for base in bases):
            raise TypeError("it is final")
        return super().__new__(cls, name, bases, namespace)


def with_forward(theirs):
    def forward(self, *args):
        return theirs.forward(self, *args)

    return type("Custom", (theirs,), {"forward": forward})(4, 6)


LEFT = {
    "forward of a class": (with_forward, "0, a Custom, which overrides forward"),
    "forward": (overridden, "0, whose forward is overridden on the instance"),
    "script": (lambda theirs: torch.jit.script(theirs(4, 6)), "0, compiled by TorchScript"),
    "a name of ours": (
        lambda theirs: type("Custom", (theirs,), {"_weights": ()})(4, 6),
        "0, a Custom, which has _weights, as lstm_fused has",
    ),
    "final": (
        lambda theirs: Final("Custom", (theirs,), {})(4, 6),
        "0, a Custom, which cannot be derived from: it is final",
    ),
}


@each_name
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
@pytest.mark.parametrize("make, words", LEFT.values(), ids=LEFT)
def test_unsupported_module_is_kept_with_warning(make, words, name):
    theirs, ours = getattr(nn, name), getattr(lstm_fused, name)
    model = nn.ModuleList([make(theirs), theirs(4, 6)])
    kind = type(model[0])
    with pytest.warns(UserWarning, match=f"replace left alone: {words}$") as caught:
        lstm_fused.replace(model)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert type(model[0]) is kind and type(model[1]) is ours
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lstm_fused.restore(model)
    assert type(model[0]) is kind and type(model[1]) is theirs


CALLED = [name for name in CALLED_BY_TORCH if name != "check_input"]


@pytest.mark.parametrize("name", ("LSTM", "GRU", "RNN"))
@pytest.mark.parametrize("method", CALLED)
def test_methods_that_only_torch_calls(method, name):
    """A class or instance that overrides one of these methods is not replaced."""
    theirs, ours = getattr(nn, name), getattr(lstm_fused, name)

    def own(*args):
        return None

    model = nn.ModuleList([type("Custom", (theirs,), {})(4, 6), theirs(4, 6)])
    setattr(type(model[0]), method, own)
    setattr(model[1], method, own)
    words = f"0, a Custom, which overrides {method}; 1, whose {method} is overridden"
    with pytest.warns(UserWarning, match=f"left alone: {words} on the instance$"):
        lstm_fused.replace(model)
    assert not any(isinstance(m, ours) for m in model)


@each_name
def test_restore_keeps_user_subclasses(name):
    model = nn.ModuleList([type("Mine", (getattr(lstm_fused, name),), {})(4, 6)])
    kind = type(model[0])
    words = "restore left alone: 0, a Mine, which is derived from lstm_fused's own class"
    with pytest.warns(UserWarning, match=words) as caught:
        lstm_fused.restore(model)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert type(model[0]) is kind


@each_name
@pytest.mark.parametrize("make", ("fully_shard", "replicate"))
def test_classes_made_by_torch_distributed(make, name):
    """torch.distributed identifies modules by class, so replace and restore do not change it."""
    change = distributed_changes()[make]
    theirs, ours = getattr(nn, name), getattr(lstm_fused, name)
    with one_process(), torch.device("cpu"):
        for kind, caller in ((theirs, "replace"), (ours, "restore")):
            model = nn.ModuleList([kind(4, 6), nn.Linear(2, 2)])
            change(model[0])
            made = type(model[0])
            words = f"{caller} left alone: 0, a {made.__name__}, whose class torch.distributed made"
            with pytest.warns(UserWarning, match=words) as caught:
                getattr(lstm_fused, caller)(model)
            assert len(caught) == 1 and caught[0].filename == __file__
            assert type(model[0]) is made is not kind


def distributed_changes():
    from torch.distributed._composable.replicate import replicate
    from torch.distributed.fsdp import fully_shard

    return {"fully_shard": fully_shard, "replicate": replicate}


class Own:
    """What a user's class has beside torch.nn's, without a forward."""

    made = []

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        Own.made.append(cls)

    def __init__(self, size, **options):
        super().__init__(4, size, **options)
        self.note = "mine"

    def reset_parameters(self):
        super().reset_parameters()
        for name, w in self.named_parameters():
            if name.startswith("bias"):
                nn.init.ones_(w)

    def extra_repr(self):
        return f"{super().extra_repr()}, {self.note}"


def own_class(theirs):
    """Found by pickle."""
    name = f"Own{theirs.__name__}"
    return type(name, (Own, theirs), {"__module__": __name__, "__doc__": "Mine."})


for kind in {getattr(nn, name) for name in NAMES}:
    globals()[f"Own{kind.__name__}"] = own_class(kind)


def described(cls):
    return cls.__name__, cls.__qualname__, cls.__module__, cls.__doc__


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "pickle 0": lambda m: pickle.loads(pickle.dumps(m, protocol=0)),
}


@each_name
def test_subclass(name):
    """Fused, of a class of the same name derived from its own, and back to its very own."""
    theirs, ours = getattr(nn, name), getattr(lstm_fused, name)
    own, x = globals()[f"Own{name}"], torch.randn(3, 4)
    model = nn.ModuleList([own(6), own(6), theirs(4, 6)])
    model.forward = lambda x: sum(first(m(x)) for m in model)
    model[1].register_forward_hook(lambda m, args, out: -first(out))
    before, text, announced = outcome(model, x), repr(model), list(Own.made)

    lstm_fused.replace(model)
    replaced = type(model[0])
    assert replaced is type(model[1]) is not own
    assert described(replaced) == described(own)
    assert isinstance(model[0], own) and isinstance(model[0], ours)
    torch.testing.assert_close(outcome(model, x), before)
    assert runtime.last_run()["pass"] == "backward"
    assert repr(model) == text
    assert Own.made == announced
    for copied in COPIES.values():
        twin = copied(model[0])
        assert type(twin) is replaced and twin.note == "mine"
        torch.testing.assert_close(first(twin(x)), first(model[0](x)))
        assert type(lstm_fused.restore(twin)) is own
    lstm_fused.restore(model)
    assert [type(m) for m in model] == [own, own, theirs]
    torch.testing.assert_close(outcome(model, x), before, rtol=0, atol=0)


@each_name
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("own", (False, True), ids=("", "own"))
@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_wrapped_weights(wrap, own, name):
    """Twice the same way and once back: parametrized modules have classes of their own."""
    x = torch.randn(3, 4, dtype=torch.float64)
    theirs, ours = getattr(nn, name), getattr(lstm_fused, name)
    sizes = (4, 6)
    if own:
        theirs, sizes, name = globals()[f"Own{name}"], (6,), f"Own{name}"
    at = "" if name.endswith("Cell") else "_l0"

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = wrap(theirs(*sizes, dtype=torch.float64), at)
            self.b = theirs(*sizes, dtype=torch.float64)

        def forward(self, x):
            return first(self.a(x)) + first(self.b(x))

    model = First().eval()
    before, names = outcome(model, x), list(model.state_dict())
    classes = type(model.a).__name__, type(model.b)
    lstm_fused.replace(model)
    assert all(isinstance(m, ours) for m in (model.a, model.b))
    torch.testing.assert_close(outcome(model, x), before)
    assert runtime.last_run()["pass"] == "backward"
    lstm_fused.restore(model)
    assert not any(isinstance(m, ours) for m in (model.a, model.b))
    assert isinstance(model.a, theirs)
    assert (type(model.b), type(model.a).__name__.removeprefix("Parametrized")) == (
        classes[1],
        name,
    )
    torch.testing.assert_close(outcome(model, x), before)
    assert list(model.state_dict()) == names
    if parametrize.is_parametrized(model.a):
        parametrize.remove_parametrizations(model.a, next(iter(model.a.parametrizations)))
        assert type(model.a) is theirs


class Mixed(nn.Module):
    """What replace meets: torch.nn's, a class of the user's, ours, and what it leaves alone."""

    def __init__(self):
        super().__init__()
        self.first = nn.ModuleDict({"lstm": nn.LSTM(4, 6), "head": nn.Linear(6, 2)})
        self.again = self.first
        self.own = globals()["OwnGRU"](6)
        self.forward_of_its_own = with_forward(nn.LSTM)
        self.ours = lstm_fused.RNN(4, 6)
        self.complex = nn.GRU(4, 6, dtype=torch.complex64)
        self.empty = nn.LSTMCell(4, 0)
        self.quantized = type("LSTM", (nn.Module,), {"__module__": "torch.ao.nn.quantized"})()


REPLACED = """\
lstm_fused.replace: 4 replaced, 3 left alone
  replaced first.lstm: LSTM
  replaced own: OwnGRU, derived from GRU
  replaced complex: GRU, which runs through torch as it is now: the fused kernels have no torch.complex64
  replaced empty: LSTMCell, which runs through torch as it is now: the fused step needs an input_size and a hidden_size of at least 1
  left alone forward_of_its_own, a Custom, which overrides forward
  left alone ours, a RNN, which is of lstm_fused already
  left alone quantized, a LSTM of torch.ao.nn.quantized, which is not derived from torch.nn's
"""  # noqa: E501
RESTORED = """\
lstm_fused.restore: 5 restored, 3 left alone
  restored first.lstm: LSTM
  restored own: OwnGRU, derived from GRU
  restored ours: RNN
  restored complex: GRU
  restored empty: LSTMCell
  left alone theirs, a Mine, which is derived from lstm_fused's own class
  left alone forward_of_its_own, a Custom, which is not of lstm_fused
  left alone quantized, a LSTM of torch.ao.nn.quantized, which is not derived from torch.nn's
"""


@pytest.mark.filterwarnings("error:lstm_fused")
def test_verbose(capsys):
    model = Mixed()
    assert lstm_fused.replace(model, verbose=True) is model
    assert capsys.readouterr().out == REPLACED
    model.theirs = type("Mine", (lstm_fused.GRU,), {})(4, 6)
    assert lstm_fused.restore(model, verbose=True) is model
    assert capsys.readouterr().out == RESTORED


def test_verbose_of_one_layer(capsys):
    lstm_fused.replace(nn.RNNCell(4, 6), verbose=True)
    out = "lstm_fused.replace: 1 replaced, 0 left alone\n  replaced the model: RNNCell\n"
    assert capsys.readouterr().out == out
    with warnings.catch_warnings(record=True) as caught:
        lstm_fused.replace(Mixed())
    assert capsys.readouterr().out == "" and len(caught) == 1


@each_name
def test_verbose_evaluates_no_parametrization(name, capsys):
    """spectral_norm's estimate moves with each evaluation in training."""
    module = getattr(nn, name)(4, 6)
    at = "weight_hh" if name.endswith("Cell") else "weight_hh_l0"
    parametrizations.spectral_norm(module, at)
    before = {name: t.clone() for name, t in module.state_dict().items()}
    lstm_fused.replace(module, verbose=True)
    assert capsys.readouterr().out.endswith(f"  replaced the model: {name}\n")
    assert all(torch.equal(before[name], t) for name, t in module.state_dict().items())


@pytest.mark.parametrize("change", (lstm_fused.replace, lstm_fused.restore))
def test_not_a_module(change):
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got dict"):
        change({"lstm": nn.LSTM(4, 6)})
