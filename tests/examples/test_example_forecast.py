"""The forecast of sunspots: better than with an untrained layer; both backends agree."""

import pytest
import torch

from examples import common, forecast
from tests.helpers import example_checks


def test_learns(tmp_path):
    errors = example_checks.learn(forecast.EXAMPLE, tmp_path)["errors"]
    # 27 with the layer's own weights left as they began, 33 by repeating the value before.
    assert errors["one step ahead"] < 22
    assert errors["all steps at once"] < errors["always the mean"]


def test_backends_agree(tmp_path):
    example_checks.assert_agree(forecast.EXAMPLE, tmp_path)


def test_free_run_reads_its_own_forecasts():
    window = torch.tensor([1.0, 2.0])
    assert forecast.free_run(lambda w: w.sum(1), window, 3).tolist() == [3, 5, 8]


def test_own_data(tmp_path):
    path = tmp_path / "series.csv"
    path.write_text("year,value\n" + "".join(f"{k},{k % 5}\n" for k in range(200)))
    series, begin = forecast.load(path)
    assert series.tolist() == [k % 5 for k in range(200)]
    assert begin == 0


@pytest.mark.parametrize("content", ["1\n2\n", "", "x\ny\n", "1\n" * 200])
def test_bad_data_is_one_line(tmp_path, capsys, content):
    path = tmp_path / "series.csv"
    path.write_text(content)
    assert forecast.EXAMPLE.main(["--data", str(path), "--out", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1


def test_csv_without_header(tmp_path):
    path = tmp_path / "series.csv"
    path.write_text("1,2\n3,4\n")
    assert common.read_numbers(path).tolist() == [[1, 2], [3, 4]]
