"""N to N in real time: speech without its noise, in blocks of 10 ms.

The network is in the form of RNNoise and DTLN: a spectrum every 10 ms, a stack of GRUs, and a mask
that leaves of each frequency what is speech. It is trained on whole recordings, then runs as in a
telephone: a block of 160 samples comes in, a block goes out, and `lstm_fused.stream` holds the
state of the GRUs in between. The same is done with int8 weights.

Speech and noise are synthetic unless --data names a recording: voices with a pitch, formants and
syllables, in noise of a random colour. Printed are what the signal-to-noise ratio gains, how long a
block takes, and how many times faster than real time that is.
"""

import copy
import math
import sys
import time
import wave

import torch
from torch import nn

import lstm_fused
from examples import common
from examples.layers import layer

RATE = 16_000  # samples a second
BLOCK = RATE // 100
WINDOW = 2 * BLOCK
BINS = WINDOW // 2 + 1
HIDDEN, LAYERS = 128, 2
SECONDS = 2
TRAINING, HELD_OUT = 48, 4  # recordings
HARMONICS = 30
FORMANTS = ((300, 900), (900, 2300), (2400, 3200))  # Hz, lowest and highest

window = torch.hann_window(WINDOW).sqrt()  # twice: for the spectrum, and for the sum of blocks


class Denoiser(nn.Module):
    """Spectra (T, N, BINS), complex -> masks (T, N, BINS) between 0 and 1."""

    def __init__(self, backend):
        super().__init__()
        self.layers = layer("gru", backend)(BINS, HIDDEN, num_layers=LAYERS)
        self.head = nn.Linear(HIDDEN, BINS)

    def forward(self, spectra):
        return self.mask(self.layers(features(spectra))[0])

    def mask(self, hidden):
        return self.head(hidden).sigmoid()


class BlockByBlock:
    """A denoiser in real time: a block (BLOCK,) in, the block before it out, cleaned.

    step: features (1, BINS) -> hidden (1, HIDDEN), with the state inside.
    """

    def __init__(self, model, step):
        self.model, self.step = model, step
        self.frame, self.rest = torch.zeros(WINDOW), torch.zeros(BLOCK)
        self.seconds = []  # that each step of the layers took

    @torch.no_grad()
    def __call__(self, block):
        self.frame = torch.cat([self.frame[BLOCK:], block])
        spectrum = torch.fft.rfft(self.frame * window)
        read = features(spectrum[None])
        begin = time.perf_counter()
        hidden = self.step(read)
        self.seconds.append(time.perf_counter() - begin)
        clean = torch.fft.irfft(spectrum * self.model.mask(hidden)[0]) * window
        found, self.rest = self.rest + clean[:BLOCK], clean[BLOCK:]
        return found


def features(spectra):
    """What the layers read, about -1 to 1."""
    return (spectra.abs().square() + 1e-6).log() / 8


def spectra_of(signals):
    """(N, S) -> (T, N, BINS): of the block before each block and the block."""
    frames = nn.functional.pad(signals, (BLOCK, 0)).unfold(1, WINDOW, BLOCK)
    return torch.fft.rfft(frames * window).transpose(0, 1)


def signals_of(spectra):
    """The inverse of spectra_of, of which the last block is faded out: (T, N, BINS) -> (N, S)."""
    frames = torch.fft.irfft(spectra.transpose(0, 1)) * window
    blocks = frames[:, :, BLOCK:].clone()
    blocks[:, :-1] += frames[:, 1:, :BLOCK]
    return blocks.flatten(1)


def voice(generator):
    """A synthetic voice (S,): harmonics of a gliding pitch, formants and loudness by syllable."""

    def draw(*shape, low=0.0, high=1.0):
        return low + (high - low) * torch.rand(*shape, generator=generator)

    count = SECONDS * RATE
    syllables = SECONDS * 4

    def by_syllable(values):  # (syllables,) -> (S,), gliding
        return nn.functional.interpolate(values[None, None], count, mode="linear")[0, 0]

    pitch = by_syllable(draw(1, low=90, high=230) * draw(syllables, low=0.8, high=1.2))
    phase = 2 * math.pi * (pitch / RATE).cumsum(0)
    numbers = torch.arange(1, HARMONICS + 1)
    frequencies = numbers[:, None] * pitch
    strength = torch.full_like(frequencies, 0.02)
    for low, high in FORMANTS:
        center = by_syllable(draw(syllables, low=low, high=high))
        strength += torch.exp(-(((frequencies - center) / 180) ** 2)) / (1 + low / 600)
    strength *= frequencies < RATE / 2
    loudness = by_syllable(draw(syllables) * (draw(syllables) > 0.25))
    sounds = (strength * torch.sin(numbers[:, None] * phase)).sum(0)
    return normalized(sounds * loudness.sqrt())


def noise(generator, count):
    """Noise (count,) of a random colour, and the hum of some machine."""
    spectrum = torch.fft.rfft(torch.randn(count, generator=generator))
    slope, hum, at = torch.rand(3, generator=generator).tolist()
    falling = torch.arange(1, len(spectrum) + 1) ** (-slope)
    times = torch.arange(count) / RATE
    return normalized(
        normalized(torch.fft.irfft(spectrum * falling, count))
        + hum * torch.sin(2 * math.pi * (50 + 200 * at) * times)
    )


def normalized(signal):
    """signal with a mean square of 0.01."""
    return 0.1 * signal / signal.square().mean().sqrt().clamp(min=1e-6)


def read_recording(path):
    """Mono samples (S,) of a WAV file of 16 kHz and 16 bits."""
    try:
        with wave.open(str(path)) as file:
            kind = file.getnchannels(), file.getsampwidth(), file.getframerate()
            data = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise common.DataError(f"{path} is no WAV file: {error}") from None
    if kind != (1, 2, RATE):
        raise common.DataError(f"{path} must be mono, of 16 bits and {RATE} Hz")
    samples = torch.frombuffer(bytearray(data), dtype=torch.int16).float() / 2**15
    if len(samples) < 10 * SECONDS * RATE or not samples.any():
        raise common.DataError(f"{path} must hold {10 * SECONDS} s of speech")
    return samples


def recordings(path, generator):
    """Clean and noisy signals, each (TRAINING + HELD_OUT, S)."""
    count = TRAINING + HELD_OUT
    if path is None:
        clean = torch.stack([voice(generator) for _ in range(count)])
    else:
        parts = read_recording(path).unfold(0, SECONDS * RATE, SECONDS * RATE)
        clean = torch.stack([normalized(parts[k % len(parts)]) for k in range(count)])
    decibels = 10 * torch.rand(count, 1, generator=generator)
    added = torch.stack([noise(generator, clean.shape[1]) for _ in range(count)])
    return clean, clean + added * 10 ** (-decibels / 20)


def loss_of(model, noisy, clean):
    """Between the roots of magnitudes, so that quiet sounds count: noisy and clean (N, S)."""
    spectra, wanted = spectra_of(noisy), spectra_of(clean).abs()
    found = model(spectra) * spectra.abs()
    return 10 * (found.clamp(min=1e-8).sqrt() - wanted.clamp(min=1e-8).sqrt()).square().mean()


def snr(clean, found):
    """The signal-to-noise ratio of signals (N, S), in dB, on average."""
    ratio = clean.square().sum(1) / (found - clean).square().sum(1)
    return (10 * ratio.log10()).mean().item()


def prepared_step(layers, backend):
    """features (1, BINS) -> hidden (1, HIDDEN), with the state of the layers inside."""
    if backend == "fused":
        stream, hidden = lstm_fused.stream(layers), torch.empty(1, HIDDEN)
        return lambda x: stream(x, out=hidden)
    state = None

    def step(x):
        nonlocal state
        y, state = layers(x[None], state)
        return y[0]

    return step


def denoised(model, backend, signal):
    """A signal (S,) block by block: (S,), the seconds of each block, and those of the layers."""
    run, found, seconds = BlockByBlock(model, prepared_step(model.layers, backend)), [], []
    silence = torch.zeros(BLOCK)  # the last block comes out when the next one goes in
    for block in (*signal.split(BLOCK), silence):
        begin = time.perf_counter()
        found.append(run(block))
        seconds.append(time.perf_counter() - begin)
    return torch.cat(found[1:]), torch.tensor(seconds), torch.tensor(run.seconds)


def measured(model, backend, clean, noisy):
    """A row of the table, and the first signal as it comes out."""
    found, blocks, steps = zip(*(denoised(model, backend, s) for s in noisy), strict=True)
    microseconds = 1e6 * torch.cat(blocks)
    gain = snr(clean, torch.stack(found)) - snr(clean, noisy)
    row = [gain, 1e6 * torch.cat(steps).median().item()]
    row += [microseconds.quantile(q).item() for q in (0.5, 0.99, 1)]
    return [*row, 1e4 / row[2]], torch.stack(found)


def run(args, report):
    generator = torch.Generator().manual_seed(args.seed)
    clean, noisy = recordings(args.data, generator)
    model = Denoiser(args.backend)
    batches = common.minibatches((noisy[:TRAINING], clean[:TRAINING]), 8, args.seed)
    training = common.train(model, batches, loss_of, args.steps, report)
    clean, noisy = clean[TRAINING:], noisy[TRAINING:]
    with torch.no_grad():
        masks = model(spectra_of(noisy))
        whole = signals_of(masks * spectra_of(noisy))
    models = {"float32": model}
    if args.backend == "fused":
        models["int8"] = lstm_fused.quantize_(copy.deepcopy(model), torch.int8)
    rows, found = {}, {}
    for name, each in models.items():
        rows[name], found[name] = measured(each, args.backend, clean, noisy)
    columns = ["weights", "SNR gain, dB", "GRUs, µs", "block, µs", "p99", "longest", "x real time"]
    title = f"{len(noisy)} signals of {SECONDS} s at {snr(clean, noisy):.1f} dB, blocks of 10 ms"
    report.table("denoise", columns, [[name, *row] for name, row in rows.items()], title)
    gain, faster = rows["float32"][0], rows["float32"][-1]
    report.say(f"{faster:.0f} times faster than real time, {gain:.1f} dB gained")
    plot_spectra(report, clean[0], noisy[0], found["float32"][0], gain)
    return {
        "losses": training.losses,
        "gains": {name: row[0] for name, row in rows.items()},
        "factors": {name: row[-1] for name, row in rows.items()},
        "outputs": masks,
        "whole": whole,
        "blocks": found,
        "problem": (model, loss_of, (noisy[:4], clean[:4])),
    }


def plot_spectra(report, clean, noisy, found, gain):
    title = f"Frequencies over time: the signal-to-noise ratio gains {gain:.1f} dB"
    with report.plot("spectra", title, 1, 3, sharey=True, figsize=(7, 2.8)) as axes:
        if axes is None:
            return
        signals = {"with noise": noisy, "denoised": found, "the voice alone": clean}
        for axis, (name, signal) in zip(axes, signals.items(), strict=True):
            power = features(spectra_of(signal[None]))[:, 0].T
            extent = (0, SECONDS, 0, RATE / 2000)
            options = {"aspect": "auto", "origin": "lower", "extent": extent}
            axis.imshow(power.clamp(min=-1.2).tolist(), **options)
            axis.set_title(name)
            axis.set_xlabel("seconds")
        axes[0].set_ylabel("kHz")


EXAMPLE = common.Example(
    "denoise", __doc__, run, steps=400, quick=60,
    data="WAV file of speech, mono, 16 bits, 16 kHz (default: synthetic voices)",
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(EXAMPLE.main())
