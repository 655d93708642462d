"""The character model: trains on text, and reports bad input in one line."""

import pytest
import torch

pytest.importorskip("rich")

from examples import char_lm

TEXT = "the quick brown fox jumps over the lazy dog; " * 60


def run(*arguments):
    return char_lm.main([*arguments, "--steps", "3", "--hidden", "8", "--threads", "1"])


def test_trains_writes_and_explains(tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    assert run("--data", str(path)) == 0
    out = capsys.readouterr().out
    for part in ("Agreement", "Loss", "Written by", "speedup", "What ran"):
        assert part in out


def test_disagreement_fails(tmp_path, capsys, monkeypatch):
    def wrong(model):
        with torch.no_grad():
            model.lstm.weight_hh_l1 += 1e-3
        return model

    monkeypatch.setattr(char_lm.lstm_fused, "replace", wrong)
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    assert run("--data", str(path)) == 1
    assert "do not agree" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", [None, b"", b"short", b"\xff\xfe" * 2000, bytes(5000)],
    ids=["missing", "empty", "short", "not utf-8", "zeros"],
)  # fmt: skip
def test_bad_data_is_one_line(tmp_path, capsys, content):
    path = tmp_path / "data"
    if content is not None:
        path.write_bytes(content)
    assert run("--data", str(path)) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1


def test_folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.txt").write_text(TEXT)
    (tmp_path / "two.bin").write_bytes(bytes(100))
    assert char_lm.read_text(tmp_path) == TEXT


def test_unigram_entropy():
    assert char_lm.Corpus("ab" * 500).unigram_entropy() == pytest.approx(0.6931, abs=1e-3)


def test_time_limit(tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    limits = ["--steps", str(4 * char_lm.BLOCK), "--limit", "0"]
    assert char_lm.main(["--data", str(path), "--hidden", "8", *limits]) == 0
    assert f"Stopped after {char_lm.BLOCK} steps" in capsys.readouterr().out
