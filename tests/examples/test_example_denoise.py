"""The denoiser: less noise, the same block by block as at once, with int8 weights too."""

import wave

import pytest
import torch

from examples import denoise
from tests.helpers import example_checks


def test_learns(tmp_path):
    found = example_checks.learn(denoise.EXAMPLE, tmp_path)
    gains = found["gains"]
    assert gains["float32"] > 6  # dB; 0 if every mask were 1
    assert abs(gains["int8"] - gains["float32"]) < 0.1
    for name, signals in found["blocks"].items():
        apart = (signals - found["whole"])[:, : -denoise.BLOCK].abs().max().item()
        assert 0 < apart < (1e-5 if name == "float32" else 0.01), name


def test_backends_agree(tmp_path):
    example_checks.assert_agree(denoise.EXAMPLE, tmp_path)


def test_spectra_and_back():
    """Of a mask of ones: the signal, apart from the last block, which fades out."""
    signals = torch.randn(2, 10 * denoise.BLOCK)
    found = denoise.signals_of(denoise.spectra_of(signals))
    torch.testing.assert_close(found[:, : -denoise.BLOCK], signals[:, : -denoise.BLOCK])


def recording(path, samples, rate=denoise.RATE):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.to(torch.int16).numpy().tobytes())
    return path


def test_own_data(tmp_path):
    samples = torch.arange(30 * denoise.RATE) % 1000 - 500
    path = recording(tmp_path / "speech.wav", samples)
    assert torch.equal(denoise.read_recording(path) * 2**15, samples.float())
    generator = torch.Generator().manual_seed(0)
    clean, noisy = denoise.recordings(path, generator)
    assert clean.shape == noisy.shape == (52, 2 * denoise.RATE)
    decibels = [denoise.snr(*pair) for pair in zip(clean[:, None], noisy[:, None], strict=True)]
    assert -0.1 < min(decibels) < max(decibels) < 10.1


def test_bad_data_is_one_line(tmp_path, capsys):
    text = tmp_path / "text.wav"
    text.write_text("speech")
    short = recording(tmp_path / "short.wav", torch.ones(100))
    silent = recording(tmp_path / "silent.wav", torch.zeros(30 * denoise.RATE))
    fast = recording(tmp_path / "fast.wav", torch.ones(30 * denoise.RATE), 44100)
    for path in (text, short, silent, fast, tmp_path / "none.wav"):
        assert denoise.EXAMPLE.main(["--data", str(path), "--out", str(tmp_path)]) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and message.count("\n") == 1


@pytest.mark.parametrize("seed", [0, 1])
def test_signals_are_of_one_loudness(seed):
    generator = torch.Generator().manual_seed(seed)
    for signal in (denoise.voice(generator), denoise.noise(generator, 32_000)):
        assert signal.square().mean().item() == pytest.approx(0.01, rel=1e-3)
