"""The classifier of names: the RNN's own weights learn; both backends agree."""

import pytest
import torch

from examples import names
from tests.helpers import example_checks


def test_learns(tmp_path):
    found = example_checks.learn(names.EXAMPLE, tmp_path)
    # With the RNN's own weights left as they began: loss 1.46, accuracy 0.42.
    assert found["last"] < 0.8
    assert found["accuracy"] > 0.5


@pytest.mark.parametrize("kind", ["rnn", "gru", "lstm"])
def test_backends_agree(tmp_path, kind):
    example_checks.assert_agree(names.EXAMPLE, tmp_path, "--layer", kind)


def test_state_and_probabilities():
    model = names.NameClassifier(30, 8, "rnn", "torch")
    assert not model.init_hidden().any()
    assert model.init_hidden().shape == (1, 1, names.HIDDEN)
    logs = model(torch.randn(6, 1, 30), model.init_hidden())
    assert logs.exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_letters():
    alphabet = names.Alphabet(["Müller"])
    assert names.spelling("Müller") == "^mu\u0308ller$"
    assert alphabet.rows("Müller").shape == (9, 1, len(alphabet))
    assert alphabet.rows("x").argmax(2).flatten().tolist()[1] == len(alphabet) - 1  # unknown


def test_one_label_is_refused(tmp_path, capsys):
    path = tmp_path / "names.csv"
    path.write_text("text,label\nAda,x\nBob,x\n")
    assert names.EXAMPLE.main(["--data", str(path), "--out", str(tmp_path)]) == 2
    assert "fewer than two labels" in capsys.readouterr().err
