"""The sentiment classifier: it learns, both backends agree, both forms of data are read."""

import pytest
import torch

from examples import sentiment
from tests.helpers import example_checks


def test_learns_and_shows_what_is_a_probability(tmp_path):
    found = example_checks.learn(sentiment.EXAMPLE, tmp_path)
    # With the LSTM's own weights left as they began: 0.82 and 0.62.
    assert found["learned"] > 0.92
    assert found["accuracy"] > 0.72
    gate, hidden, softmax = (found["kinds"][k] for k in ("output gate", "hidden state", "softmax"))
    assert gate.shape == hidden.shape == (sentiment.HIDDEN,)
    assert softmax.shape == (2,)
    assert softmax.sum().item() == pytest.approx(1, abs=1e-6)
    assert gate.sum().item() > 2
    assert hidden.min() < 0


def test_backends_agree(tmp_path):
    example_checks.assert_agree(sentiment.EXAMPLE, tmp_path)


def test_padding_has_no_effect():
    model = sentiment.Classifier(50, "fused").eval()
    words, lengths = torch.randint(2, 50, (3, 9)), torch.tensor([4, 9, 1])
    together = model.probabilities(words, lengths)
    for k, length in enumerate(lengths):
        alone = model.probabilities(words[k : k + 1, :length], lengths[k : k + 1])
        torch.testing.assert_close(together[k], alone[0])


def test_folder_as_imdb_has_it(tmp_path):
    for label, text in (("pos", "A fine film!"), ("neg", "Dull.<br />Dull.")):
        (tmp_path / label).mkdir()
        (tmp_path / label / "0_9.txt").write_text(text)
    assert sentiment.load(tmp_path) == [("Dull.<br />Dull.", "neg"), ("A fine film!", "pos")]


def test_own_csv_of_a_few_reviews(tmp_path):
    path = tmp_path / "reviews.csv"
    path.write_text('text,label\n"Fine, fine",pos\nDull,neg\nGreat,pos\nBad,neg\n')
    assert sentiment.load(path)[0] == ("Fine, fine", "pos")
    found = sentiment.EXAMPLE.results(["--data", str(path), "--steps", "2", "--out", str(tmp_path)])
    assert found["outputs"].shape == (1, 2)
    assert (tmp_path / "reading.png").exists()


@pytest.mark.parametrize("content", [None, "a,b\n1,2\n", "text,label\nfine,pos\nbad,poor\n"])
def test_bad_data_is_one_line(tmp_path, capsys, content):
    path = tmp_path / "reviews.csv"
    if content is not None:
        path.write_text(content)
    assert sentiment.EXAMPLE.main(["--data", str(path), "--out", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
