"""Tagging: two directions beat one, both backends agree, tags are the tokenizer's."""

import pytest
import torch

from examples import tagging
from examples.tagging import TAGS
from tests.helpers import example_checks


def test_both_directions_beat_one(tmp_path):
    accuracy = example_checks.learn(tagging.EXAMPLE, tmp_path)["accuracy"]
    # With the layers left as they began: less than 0.6.
    assert accuracy["one direction"] > 0.7
    assert accuracy["both directions"] > accuracy["one direction"] + 0.03


@pytest.mark.parametrize(
    "options", [["--no-bidirectional"], ["--bidirectional"], ["--bidirectional", "--layer", "gru"]]
)
def test_backends_agree(tmp_path, options):
    example_checks.assert_agree(tagging.EXAMPLE, tmp_path, *options)


def test_only_both_directions_see_what_follows():
    characters = torch.randint(30, (2, 12))
    changed = characters.clone()
    changed[:, -1] = 29 - changed[:, -1]
    for directions, sees in (("one direction", False), ("both directions", True)):
        model = tagging.Tagger(30, "lstm", "fused", directions)
        with torch.no_grad():
            before, after = model(characters), model(changed)
        assert before.shape == (2, 12, len(TAGS))
        assert torch.equal(before[:, :-1], after[:, :-1]) != sees


def test_tags():
    source = "or g(12):\n    x = 'a'  # b\n"
    wanted = {"or": "keyword", "g": "call", "12": "number", "x": "name", "'a'": "string"}
    wanted |= {"# b": "comment", "(": "operator", "=": "operator", "    ": "space", "\n": "space"}
    tags = tagging.tags_of(source)
    assert len(tags) == len(source)
    for part, tag in wanted.items():
        begin = source.index(part)
        assert [TAGS[k] for k in tags[begin : begin + len(part)]] == [tag] * len(part)


def test_form_feed_shifts_nothing():
    plain, fed = (tagging.tags_of(f"a = 1\n{x}\nif b:\n    c\n") for x in ("", "\f"))
    assert fed[8:] == plain[7:]


def test_other_files_are_skipped(tmp_path, capsys):
    (tmp_path / "good.py").write_text("value = 1\n" * 300)
    (tmp_path / "bad.py").write_text("'''\n")
    text, tags = tagging.load(tmp_path)
    assert "".join(text) == "value = 1\n" * 300
    assert tags[:10] == [2, 2, 2, 2, 2, 0, 7, 0, 4, 0]
    arguments = ["--data", str(tmp_path / "bad.py"), "--out", str(tmp_path)]
    assert tagging.EXAMPLE.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
