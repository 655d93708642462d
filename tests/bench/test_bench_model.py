"""A user's own model before and after replace, torch.nn against itself, and memory."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from bench import __main__ as cli
from bench import measure, memory, model, progress, selfcheck
from bench.timing import Effort
from bench.workloads import Workload

EFFORT = Effort(rounds=2, seconds=0.0)
SMALL = Workload("small", T=3, N=2, I=3, H=4)

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

class Single(nn.LSTM):
    pass

class Narrow(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(3, 4)

    def forward(self, x):
        return self.rnn(x.float())[0]

def narrow():
    return Narrow(), torch.randn(5, 2, 3)

def nothing():
    return nn.Linear(3, 4), torch.randn(2, 3)

def broken():
    raise KeyError("weights.pt")

def three():
    return 1, 2, 3
"""


@pytest.fixture
def made(tmp_path, monkeypatch):
    """The name of a factory -> what --model is given for it; memory is measured elsewhere."""
    path = tmp_path / "tagger.py"
    path.write_text(TAGGER)
    monkeypatch.setattr(memory, "ask", lambda task: {"model": 2000 + task["fused"]})
    monkeypatch.setattr(model, "EFFORT", EFFORT)
    monkeypatch.setattr(model.sys, "path", [*model.sys.path])
    return lambda factory: f"{path}:{factory}"


def measured(spec):
    return model.measure(spec, "cpu", progress.Silent(), EFFORT)


@pytest.mark.parametrize("factory", ["make", "keywords", "layer"])
def test_outputs_and_gradients_are_judged_before_the_clock(made, factory):
    found = measured(made(factory))
    assert found["replaced"] == ["the model" if factory == "layer" else "rnn"]
    forward, training = found["rows"]["forward"], found["rows"]["training"]
    assert forward["parity"]["tensors"] == 3  # tags or y, h_n, c_n
    # Two layers have 8 parameters, embedding and head 3; one has 4 and the input's gradient.
    assert training["parity"]["tensors"] == 3 + (5 if factory == "layer" else 11)
    for row in (forward, training):
        assert row["timing"].keys() == {"torch.nn", "lstm_fused"}
    text = "\n".join(model.lines(found))
    assert "forward: 3 tensors agree" in text
    assert "| training |" in text
    assert "2 kB / 2 kB |" in text


def test_a_fused_model_that_disagrees_gets_no_time(made, monkeypatch, capsys):
    def spoil(module):
        for child in module.modules():
            if type(child) is torch.nn.LSTM:
                child.weight_hh_l0.data.add_(1e-3)
                child.__class__ = type("Spoiled", (torch.nn.LSTM,), {})
        return module

    monkeypatch.setattr(model.lstm_fused, "replace", spoil)
    assert cli.main(["--model", made("layer"), "--threads", "1"]) == 1
    printed = capsys.readouterr().out
    assert "forward: 3 tensors DISAGREE" in printed
    assert "| forward |" not in printed


def test_a_model_of_fixed_dtype_is_said_to_be_unjudged(made):
    found = measured(made("narrow"))
    text = "\n".join(model.lines(found))
    assert "NOT JUDGED" in text
    assert "float64" in text
    assert found["rows"]["forward"]["apart"] < 1e-6
    assert "timing" in found["rows"]["forward"]


def test_a_model_without_gradients_has_no_training_row(made):
    found = measured(made("frozen"))
    assert "no output of the model needs a gradient" in found["rows"]["training"]["skipped"]
    assert "timing" in found["rows"]["forward"]


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("nothing", "no module that lstm_fused replaces"),
        ("broken", "KeyError: 'weights.pt'"),
        ("three", "must return (module, inputs), got tuple"),
        ("missing", "AttributeError"),
    ],
)
def test_one_line_says_why_not(made, capsys, factory, words):
    assert cli.main(["--model", made(factory), "--threads", "1"]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert [line for line in message.splitlines() if line.startswith("error: ")]


def test_no_such_file(capsys):
    for spec in ("nowhere.py:make", "make"):
        assert cli.main(["--model", spec, "--threads", "1"]) == 2
        assert "no such file" in capsys.readouterr().err


def test_model_json(made, tmp_path):
    out = tmp_path / "out.json"
    assert cli.main(["--model", made("make"), "--threads", "1", "--json", str(out)]) == 0
    assert json.loads(out.read_text())["rows"]["training"]["memory"]["lstm_fused"] == 2001


def test_nested_values():
    a, b = torch.ones(2), torch.ones(3, dtype=torch.int64)
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(2, 1)])
    found = model.tensors_in({"x": [a, b, (a, None)], "p": packed})
    assert list(found) == ["out['x'][0]", "out['x'][2][0]", "out['p']"]
    double = model.mapped({"x": [a, b], "p": packed}, model.widened)
    assert double["x"][0].dtype is torch.float64
    assert double["x"][1].dtype is torch.int64
    assert double["p"].data.dtype is torch.float64


def clock(*seconds):
    """A clock whose samples of each run take these seconds a step in turn, the runs in order."""
    turns = {}

    def sample(step, loops):
        run = id(step.__self__)
        if run not in turns:
            turns[run] = itertools.cycle(seconds[len(turns)])
        return next(turns[run]) * loops

    return SimpleNamespace(settle=lambda: None, sample=sample)


@pytest.mark.parametrize(
    ("first", "again", "even"),
    [
        ([1.0], [1.0], True),
        ([1.0], [1.02], False),
        ([1.0, 1.1], [1.02, 1.12], True),
        ([1.0, 1.01], [0.8, 0.81], False),
    ],
)
def test_itself_is_even_within_its_spread(first, again, even):
    providers = selfcheck.providers()
    effort = Effort(rounds=6, seconds=0.0, row_seconds=100.0)
    result = measure.measure("quick", [SMALL], effort, providers, clock=clock(first, again))
    (row,) = result["rows"]
    assert selfcheck.is_even(row) == even
    assert ("| even |" in selfcheck.lines(result)[-1]) == even
    assert row["providers"][selfcheck.AGAIN]["timing"]["n"] == 6


def test_self_exits_by_its_finding(monkeypatch, capsys):
    monkeypatch.setitem(cli.SETS, "quick", (SMALL,))
    monkeypatch.setitem(cli.EFFORTS, "quick", EFFORT)
    for even, code in ((True, 0), (False, 1)):
        monkeypatch.setattr(selfcheck, "is_even", lambda row, even=even: even)
        assert cli.main(["--set", "quick", "--threads", "1", "--self"]) == code
    assert "times as fast as itself" in capsys.readouterr().out


def test_resident_memory_of_a_step():
    """100 MB that a step needs for a moment, and returns, are seen."""
    size = 100_000_000
    grown = memory.cpu_growth(lambda: torch.ones(size, dtype=torch.uint8).max())
    assert 0.95 * size < grown < 1.2 * size  # the kernel counts in batches of pages
    assert memory.cpu_growth(lambda: None) < size / 10


def test_memory_of_a_training_row():
    """A child measures what the clock measured, and only that."""
    work = Workload("row", T=50, N=64, I=64, H=64, mode="training")
    providers = measure.chosen(["torch.nn", "lstm_fused"])
    result = measure.measure("quick", [work, SMALL], EFFORT, providers)
    memory.add(result, [work, SMALL], ("torch.nn", "lstm_fused"))
    found = result["rows"][0]["memory"]
    kept = 50 * 64 * 64 * 4 * 4  # the saved gates alone
    assert found.keys() == {"torch.nn", "lstm_fused"}
    assert all(kept < size < 20 * kept for size in found.values())
    assert "memory" not in result["rows"][1]


def test_a_child_that_fails_says_why():
    with pytest.raises(memory.NotMeasured, match="KeyError: 'nobody'"):
        task = {"provider": "nobody", "works": [{"name": "w", "T": 1, "N": 1, "I": 1, "H": 1}]}
        memory.ask(task | {"device": "cpu", "threads": 1})
