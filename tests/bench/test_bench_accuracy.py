"""What rounded weights cost trained models: who is measured, on what, and what is said."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import lstm_fused
from bench import __main__ as cli
from bench import accuracy, charts, pages, report
from bench.cases import OURS_BFLOAT16, OURS_INT8, TORCH_FLOAT16, TORCH_INT8


class Reader(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = getattr(lstm_fused, kind)(5, 8)

    def forward(self, x):
        return self.rnn(x)[0]


def untrained(kind):
    torch.manual_seed(0)
    x = torch.randn(7, 3, 5)
    return accuracy.Trained(Reader(kind), "loss", lambda m: m(x).square().mean().item())


EXPECTED = {
    "LSTM": list(accuracy.QUANTIZED),
    "GRU": [OURS_INT8, OURS_BFLOAT16, TORCH_INT8, TORCH_FLOAT16],
    "RNN": [OURS_INT8, OURS_BFLOAT16],
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_errors_are_those_of_the_layer(kind):
    trained = untrained(kind)
    before = copy.deepcopy(trained.model.state_dict())
    entry = accuracy.measure_model("reader", trained)
    assert list(entry["providers"]) == EXPECTED[kind]
    assert entry["outputs"] == 7 * 3 * 8
    for each in entry["providers"].values():
        assert 1e-5 < each["relative"] < 0.03
        assert each["rms"] < each["largest"] < 0.05
        assert each["value"] == pytest.approx(entry["value"], rel=0.03)
        assert each["value"] != entry["value"]
    found = entry["providers"][OURS_INT8]
    small = lstm_fused.quantize_(copy.deepcopy(trained.model), torch.int8)
    torch.manual_seed(0)
    x = torch.randn(7, 3, 5)
    with torch.no_grad():
        off, y = small(x) - trained.model(x), trained.model(x)
    assert found["relative"] == pytest.approx((off.norm() / y.norm()).item(), rel=1e-4)
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_layer_through_onnx_runtime(batch_first):
    """Two layers, a state or none, packed or not: near what it stands for.

    Less so without VNNI, where ONNX Runtime's 16-bit sums overflow.
    """
    atol = 0.03 if "avx512_vnni" in lstm_fused.runtime.available_isas() else 0.5
    torch.manual_seed(0)
    lstm = nn.LSTM(5, 8, 2, batch_first=batch_first)
    small, x = accuracy.OnnxInt8(lstm), torch.randn(4, 3, 5)
    state = torch.randn(2, 3 if not batch_first else 4, 8)
    packed = pack_sequence([torch.randn(n, 5) for n in (2, 7, 4)], enforce_sorted=False)
    for given in [(x,), (x, (state, state.tanh())), (packed,)]:
        with torch.no_grad():
            (y, ends), (expected, expected_ends) = small(*given), lstm(*given)
        if given[0] is packed:
            assert torch.equal(y.batch_sizes, expected.batch_sizes)
            y, expected = y.data, expected.data
        for one, other in zip((y, *ends), (expected, *expected_ends), strict=True):
            torch.testing.assert_close(one, other, atol=atol, rtol=0)


TRAINERS = {
    "char_lm": lambda: accuracy.char_lm(lstm_fused.GRU, 8, steps=1),
    "sentiment": lambda: accuracy.sentiment(steps=1),
    "digits": lambda: accuracy.digits("gru", steps=1),
    "denoise": lambda: accuracy.denoise(steps=1),
    "names": lambda: accuracy.names("rnn", steps=1),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_models_of_the_examples(name, monkeypatch):
    """Trained for a step: their metric is a number, the recurrent layer is found."""
    from examples import char_lm

    text = "".join(chr(97 + k % 26) for k in range(400 * 401))
    monkeypatch.setattr(char_lm, "read_text", lambda path: text)
    assert all(n.split(",")[0] in TRAINERS for n in accuracy.MODELS)
    trained = TRAINERS[name]()
    y, value = accuracy.observed(trained.model, trained.recurrent(), trained.measure)
    assert y.isfinite().all() and len(y) > 1000
    assert (0 <= value <= 1) == (trained.metric == "accuracy")


def test_measured_and_shown(tmp_path, monkeypatch, capsys):
    name = "char_lm, LSTM, small"
    models = {"reader": lambda: untrained("GRU"), name: lambda: untrained("LSTM")}
    monkeypatch.setattr(accuracy, "MODELS", models)
    out = tmp_path / "accuracy.json"
    assert cli.main(["--json", str(out), "accuracy", "char_lm"]) == 0
    printed = capsys.readouterr().out
    assert f"| **{name}** " in printed and "Medians" not in printed and "reader" not in printed
    found = report.load(out)
    assert charts.pictures(found) == {}
    (model,) = found["models"]
    lines = report.goals_text(found).splitlines()
    for line, (provider, (error, _)) in zip(lines, accuracy.GOALS.items(), strict=True):
        met = model["providers"][provider]["relative"] <= error
        assert (": met, " in line) == met or abs(accuracy.change_of(model, provider)) > 0.005
    page = tmp_path / "page.md"
    page.write_text(f"{pages.BEGIN}\n{pages.END}\n")
    pages.update(page, [out])
    assert "| ONNX Runtime int8 " in page.read_text() and ".svg" not in page.read_text()


def test_a_change_of_a_loss_is_relative():
    model = {"value": 2.0, "providers": {"a": {"value": 2.1}}}
    assert accuracy.change_of(model | {"metric": "loss"}, "a") == pytest.approx(0.05)
    assert accuracy.change_of(model | {"metric": "accuracy"}, "a") == pytest.approx(0.1)
