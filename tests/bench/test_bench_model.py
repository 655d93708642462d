"""A user's own model before and after lstm_fused.replace."""

from dataclasses import dataclass

import pytest
import torch

from bench import __main__ as cli
from bench import model, report
from bench.timing import Sampling
from lstm_fused.testing import models, oracle

TAGGER = """
import torch
from torch import nn

class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.rnn = nn.LSTM(6, 5, num_layers=2, dropout=0.5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, words, scale=None):
        y, (h, c) = self.rnn(self.embedding(words))
        return {"tags": self.head(y), "last": (h, c), "words": words}

def make():
    return Tagger(), torch.arange(8).view(2, 4)

def keywords():
    return Tagger(), {"words": torch.arange(8).view(2, 4), "scale": None}

def layer():
    return nn.LSTM(3, 4), (torch.randn(5, 2, 3, requires_grad=True),)

def frozen():
    return nn.LSTM(3, 4).requires_grad_(False), torch.randn(5, 2, 3)

class Narrow(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(3, 4)

    def forward(self, x):
        return self.rnn(x.float())[0]

def narrow():
    return Narrow(), torch.randn(5, 2, 3)

def double():
    return nn.GRU(3, 4).double(), torch.randn(5, 2, 3).double()

def normed():
    linear = torch.nn.utils.weight_norm(nn.Linear(3, 3))
    return nn.Sequential(linear, nn.GRU(3, 4)), torch.randn(5, 2, 3)

class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(3, 4)

    def forward(self, x):
        return self.rnn(x)[0] * torch.randn(40).view(5, 2, 4).to(x.dtype)

def noisy():
    return Noisy(), torch.randn(5, 2, 3)

class Dead(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnns = nn.ModuleList([nn.GRU(4, 4), nn.GRU(4, 4)])
        self.cell = nn.GRUCell(4, 4)
        self.shift = nn.Parameter(torch.randn(1))

    def forward(self, x):
        for rnn in self.rnns:
            x = rnn(x)[0]
        h = None
        for row in x:
            h = self.cell(row, h)
        return torch.softmax(h + self.shift, -1).square()

def dead():
    return Dead(), torch.randn(5, 2, 4)

def nothing():
    return nn.Linear(3, 4), torch.randn(2, 3)

def broken():
    raise KeyError("weights.pt")

def three():
    return 1, 2, 3
"""


@pytest.fixture
def made(tmp_path, monkeypatch):
    """The name of a factory -> what --model is given for it."""
    path = tmp_path / "tagger.py"
    path.write_text(TAGGER)
    monkeypatch.setattr(model, "SAMPLING", Sampling(rounds=2, seconds=0.0))
    monkeypatch.setattr(model.sys, "path", [*model.sys.path])
    return lambda factory: f"{path}:{factory}"


@pytest.fixture
def without_memory(monkeypatch):
    sizes = {"torch.nn": 2000, "lstm_fused": 2001}
    monkeypatch.setattr(model, "memory_of", lambda spec, device: sizes)


@pytest.mark.parametrize("factory", ["make", "keywords", "layer"])
def test_outputs_and_gradients_are_judged_before_the_clock(made, without_memory, factory):
    found = model.measure_model(made(factory), "cpu")
    assert found["replaced"] == ["the model" if factory == "layer" else "rnn"]
    forward, training = (row["providers"] for row in found["rows"][:2])
    assert forward["lstm_fused"]["parity"]["tensors"] == 3  # tags or y, h_n, c_n
    # Two layers have 8 parameters, embedding and head 3; one has 4 and the input's gradient.
    gradients = 5 if factory == "layer" else 11
    assert training["lstm_fused"]["parity"]["tensors"] == 3 + gradients
    assert all("timing" in entry for row in (forward, training) for entry in row.values())
    assert "forward: 3 tensors agree" in "\n".join(model.lines(found))
    assert "2 kB / 2 kB |" in report.markdown(found)


def test_a_fused_model_that_disagrees_gets_no_time(made, monkeypatch, capsys):
    def wrong(module):
        for child in module.modules():
            if type(child) is torch.nn.LSTM:
                child.weight_hh_l0.data.add_(1e-3)
                child.__class__ = type("Wrong", (torch.nn.LSTM,), {})
        return module

    monkeypatch.setattr(model.lstm_fused, "replace", wrong)
    assert cli.main(["--model", made("layer"), "--threads", "1"]) == 1
    printed = capsys.readouterr().out
    assert "forward: 3 tensors DISAGREE" in printed
    assert "wrong: out" in printed and "±" not in printed.partition("Medians")[0]


def test_a_model_of_fixed_dtype_is_said_to_be_unjudged(made, without_memory):
    found = model.measure_model(made("narrow"), "cpu")
    text = "\n".join(model.lines(found))
    assert "NOT JUDGED, it does not run in float64" in text
    assert "timing" in found["rows"][0]["providers"]["lstm_fused"]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("factory", ["double", "normed"])
def test_models_that_a_plain_copy_cannot_judge(made, without_memory, factory):
    """Of float64 itself, by the naive reference; of weights that a hook computes."""
    rows = model.measure_model(made(factory), "cpu")["rows"]
    for row in rows[:2]:
        assert row["providers"]["lstm_fused"]["parity"]["baseline_error"] > 0


def test_random_numbers_of_another_dtype_judge_nothing(made, without_memory):
    found = model.measure_model(made("noisy"), "cpu")
    assert "drawn in float64" in "\n".join(model.lines(found))


def test_what_each_module_runs_and_gains(made, without_memory):
    found = model.measure_model(made("dead"), "cpu")
    names = ["rnns.0 and 1 like it", "cell"]
    modules = found["rows"][2:]
    modes = ("forward", "training")
    assert [r["workload"]["name"] for r in modules] == [f"{n} {m}" for m in modes for n in names]
    assert [row["calls"] for row in modules] == [1, 5, 1, 5]
    assert all("timing" in entry for row in modules for entry in row["providers"].values())
    text = "\n".join(model.lines(found))
    assert "cell, called 5 times:\n  GRUCell(4, 4)\n    step: T=1 N=2" in text
    assert "rnns.0 and 1 like it:\n  GRU(4, 4)\n    layer 0: T=5 N=2" in text
    # The gradient of a shift before softmax is zero but for rounding, which nobody can match.
    judged = found["rows"][1]["providers"]["lstm_fused"]["parity"]
    assert judged["tensors"] == 1 + len(list(model.load(made("dead")).module.parameters())) - 1


def test_torch_that_fails_leaves_ours_unjudged(made, monkeypatch):
    def fail(*_):
        raise RuntimeError("not on this machine")

    spec = model.load(made("layer"))
    monkeypatch.setattr(torch.nn.LSTM, "forward", fail)
    ours = model.lstm_fused.LSTM(3, 4)
    monkeypatch.setattr(model.lstm_fused, "replace", lambda module: ours)
    row = model.measure_mode(spec, "forward", model.SAMPLING, "cpu")
    assert row["providers"]["torch.nn"] == {"failed": "RuntimeError: not on this machine"}
    assert "torch.nn failed" in row["providers"]["lstm_fused"]["unjudged"]
    assert "timing" in row["providers"]["lstm_fused"]


def test_a_model_without_gradients_has_no_training_row(made):
    forward, training, *modules = model.measure_model(made("frozen"), "cpu")["rows"]
    assert [row["workload"]["name"] for row in modules] == ["the model forward"]
    assert training["absent"] == "training: no output of the model needs a gradient"
    assert "timing" in forward["providers"]["lstm_fused"]


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("nothing", "no module that lstm_fused replaces"),
        ("broken", "KeyError: 'weights.pt'"),
        ("three", "must return (module, inputs), got tuple"),
        ("missing", "KeyError: 'missing'"),
    ],
)
def test_errors_are_one_line(made, capsys, factory, words):
    assert cli.main(["--model", made(factory), "--threads", "1"]) == 2
    message = capsys.readouterr().err
    assert words in message and message.startswith("error: ") and message.count("\n") == 1


def test_no_such_file(capsys):
    for spec in ("nowhere.py:make", "make"):
        assert cli.main(["--model", spec, "--threads", "1"]) == 2
        assert "no such file" in capsys.readouterr().err


def test_memory_and_json(made, tmp_path):
    out = tmp_path / "out.json"
    assert cli.main(["--model", made("layer"), "--threads", "1", "--json", str(out)]) == 0
    assert report.load(out)["rows"][1]["memory"].keys() == {"torch.nn", "lstm_fused"}


def test_nested_values():
    a, b = torch.ones(2), torch.ones(3, dtype=torch.int64)
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(2, 1)])
    found = models.tensors_in({"x": [a, b, (a, None)], "p": packed})
    assert list(found) == ["out['x'][0]", "out['x'][2][0]", "out['p']"]
    double = oracle.in_float64({"x": [a, b], "p": packed})
    assert double["x"][0].dtype is torch.float64
    assert double["x"][1].dtype is torch.int64
    assert double["p"].data.dtype is torch.float64

    @dataclass
    class Pair:
        a: torch.Tensor
        name: str = "name"

    assert oracle.in_float64(Pair(a)).a.dtype is torch.float64
