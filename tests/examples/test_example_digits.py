"""Digits read row by row: the model learns, both backends agree, bad data is one line."""

import pytest

from examples import digits
from tests.helpers import example_checks


def test_learns(tmp_path):
    # With the layer left as it began: 0.52.
    assert example_checks.learn(digits.EXAMPLE, tmp_path)["accuracy"] > 0.88


def test_backends_agree(tmp_path):
    example_checks.assert_agree(digits.EXAMPLE, tmp_path)


@pytest.mark.parametrize("line", ["1,2,3", ",".join(["1"] * 64 + ["12"]), "a,b"])
def test_bad_data_is_one_line(tmp_path, capsys, line):
    path = tmp_path / "digits.csv"
    path.write_text(f"{line}\n" * 10)
    assert digits.EXAMPLE.main(["--data", str(path), "--out", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1


def test_own_data(tmp_path):
    path = tmp_path / "digits.csv"
    path.write_text("".join(",".join(["16"] * 64 + [str(k % 10)]) + "\n" for k in range(20)))
    scans, labels = digits.load(path)
    assert scans.shape == (20, 8, 8)
    assert scans.min() == scans.max() == 1
    assert labels.tolist() == [k % 10 for k in range(20)]
