"""What rounded weights cost: the models of examples/, trained, then quantized by each library.

A model is trained in float32. Each provider makes a copy with rounded weights, which is given the
same inputs. Errors are those of the recurrent layer's output y, beside the float32 layer's; the
task's own measure, a loss or an accuracy, is of data that the training did not see.
"""

import copy
import io
import itertools
import statistics
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

import lstm_fused
from bench import environment, run
from bench.cases import ONNX_INT8, OURS_BFLOAT16, OURS_INT8, TORCH_FLOAT16, TORCH_INT8
from bench.onnx_runs import in_int8, infer_in_onnx_runtime
from bench.providers import dynamic_of_torch
from bench.runs import data_of

SEED = 0
LOSS, DECIBELS = "loss", "dB gained"
CHAR_LM_STEPS, CHAR_LM_LENGTH = 400, 400  # training steps; characters of each row that is read
# What our int8 and bfloat16 weights may cost these models: the error of y, and of the loss.
GOALS_OF = "char_lm, LSTM"
GOALS = {OURS_INT8: (5e-3, 0.005), OURS_BFLOAT16: (2e-3, 0.005)}


@dataclass(frozen=True)
class Trained:
    """A trained model with lstm_fused's layers; measure(model) computes the metric anew."""

    model: nn.Module
    metric: str  # LOSS, "accuracy", or DECIBELS
    measure: Callable[[nn.Module], float]

    def recurrent(self) -> str:
        """The name of its recurrent module."""
        (name,) = (n for n, m in self.model.named_modules() if isinstance(m, nn.RNNBase))
        return name


class Silent:
    """In place of an example's Report: says nothing, writes nothing."""

    def say(self, text=""):
        pass

    def progress(self, items, total, what):
        yield from (item for item, _ in items)


def char_lm(layer: type[nn.RNNBase], hidden: int, steps: int = CHAR_LM_STEPS) -> Trained:
    """The character model on Python's standard library; its last tenth is held out."""
    from examples import char_lm as example

    corpus = example.Corpus(example.read_text(None))
    split = len(corpus.codes) * 9 // 10
    rows = corpus.codes[split:].unfold(0, CHAR_LM_LENGTH + 1, CHAR_LM_LENGTH + 1)
    rows = rows[:: max(1, len(rows) // example.BATCH)][: example.BATCH].T  # (T + 1, N)
    corpus.codes = corpus.codes[:split]
    model = example.CharModel(len(corpus.vocabulary), hidden)
    model.lstm = layer(example.EMBEDDING, hidden, num_layers=2)
    trainee = example.Trainee(model, corpus, SEED)
    for _ in range(steps):
        trainee.step()
    return Trained(model, LOSS, lambda m: example.loss_of(m(rows[:-1])[0], rows[1:]).item())


def sentiment(steps: int | None = None) -> Trained:
    from examples import common
    from examples import sentiment as example

    learn, test = common.held_out(example.load(None), 0.2, SEED)
    vocabulary = example.Vocabulary([text for text, _ in learn])
    model = example.Classifier(len(vocabulary), "fused")
    batches = common.minibatches(example.tensors_of(vocabulary, learn), 32, SEED)
    steps = steps or example.EXAMPLE.steps
    common.train(model, batches, example.loss_of, steps, Silent(), lr=5e-3)
    reviews = example.tensors_of(vocabulary, test)
    return Trained(model, "accuracy", lambda m: example.accuracy_of(m, reviews)[0])


def digits(kind: str, steps: int | None = None) -> Trained:
    from examples import common
    from examples import digits as example

    scans, labels = example.load(None)
    learn, test = common.held_out(list(range(len(scans))), 0.25, SEED)
    model = example.RowReader(kind, "fused")
    batches = common.minibatches((scans[learn], labels[learn]), 64, SEED)
    common.train(model, batches, example.loss_of, steps or example.EXAMPLE.steps, Silent())

    def accuracy(m):
        return (m(scans[test]).argmax(1) == labels[test]).double().mean().item()

    return Trained(model, "accuracy", accuracy)


def names(kind: str, steps: int | None = None) -> Trained:
    from examples import common
    from examples import names as example

    pairs = common.read_pairs(common.BUILT_IN / "names.csv")
    labels = sorted({label for _, label in pairs})
    learn, test = common.held_out(pairs, 0.2, SEED)
    alphabet = example.Alphabet([name for name, _ in learn])
    model = example.NameClassifier(len(alphabet), len(labels), kind, "fused")
    batches = example.one_by_one(learn, alphabet, labels, SEED)
    common.train(model, batches, example.loss_of, steps or example.EXAMPLE.steps, Silent(), lr=2e-3)

    def accuracy(m):
        zeros = model.init_hidden()  # of the trained layer: a quantized one need not have its mode
        right = [m(alphabet.rows(n), zeros).argmax(1).item() == labels.index(x) for n, x in test]
        return statistics.fmean(right)

    return Trained(model, "accuracy", accuracy)


def denoise(steps: int | None = None) -> Trained:
    from examples import common
    from examples import denoise as example

    clean, noisy = example.recordings(None, torch.Generator().manual_seed(SEED))
    model, learn = example.Denoiser("fused"), example.TRAINING
    batches = common.minibatches((noisy[:learn], clean[:learn]), 8, SEED)
    common.train(model, batches, example.loss_of, steps or example.EXAMPLE.steps, Silent())
    clean, noisy = clean[learn:], noisy[learn:]
    spectra = example.spectra_of(noisy)

    def gain(m):
        found = example.signals_of(m(spectra) * spectra)
        return example.snr(clean, found) - example.snr(clean, noisy)

    return Trained(model, DECIBELS, gain)


MODELS = {
    "char_lm, LSTM, 2 layers, H128": lambda: char_lm(lstm_fused.LSTM, 128),
    "char_lm, LSTM, 2 layers, H256": lambda: char_lm(lstm_fused.LSTM, 256),
    "char_lm, GRU, 2 layers, H256": lambda: char_lm(lstm_fused.GRU, 256),
    "sentiment, LSTM, H32": sentiment,
    "digits, LSTM, H64": lambda: digits("lstm"),
    "digits, GRU, H64": lambda: digits("gru"),
    "denoise, GRU, 2 layers, H128": denoise,
    "names, RNN, H64": lambda: names("rnn"),
}


class OnnxInt8(nn.Module):
    """A torch.nn.LSTM through ONNX Runtime with int8 weights; a packed batch row by row."""

    def __init__(self, module: nn.LSTM):
        super().__init__()
        self.batch_first = module.batch_first
        self.shape = (module.num_layers, module.hidden_size)
        plain = copy.deepcopy(module)
        plain.batch_first = False
        state = torch.zeros(self.shape[0], 1, self.shape[1])
        self.infer = infer_in_onnx_runtime(in_int8(exported(plain, state)))

    def forward(self, x, state=None):
        """As torch.nn.LSTM's."""
        if isinstance(x, PackedSequence):
            found = [self.steps(row[:, None], None) for row in unpack_sequence(x)]
            y = pack_sequence([y[:, 0] for y, _ in found], enforce_sorted=False)
            return y, tuple(
                torch.cat(parts, 1) for parts in zip(*(s for _, s in found), strict=True)
            )
        y, state = self.steps(x.transpose(0, 1) if self.batch_first else x, state)
        return (y.transpose(0, 1) if self.batch_first else y), state

    def steps(self, x, state):
        layers, hidden = self.shape
        zeros = torch.zeros(layers, x.shape[1], hidden)
        feed = dict(zip(("x", "h0", "c0"), (x, *(state or (zeros, zeros))), strict=True))
        y, *state = self.infer({name: t.contiguous().numpy() for name, t in feed.items()})
        return torch.from_numpy(y), tuple(map(torch.from_numpy, state))


def exported(module: nn.LSTM, state: torch.Tensor) -> bytes:
    """The module's ONNX graph, from x, h0, c0 to y, h_n, c_n, of any length and batch."""
    names = ["x", "h0", "c0"], ["y", "h_n", "c_n"]
    file, x = io.BytesIO(), torch.zeros(3, 1, module.input_size)
    axes = {name: {1: "N"} | ({0: "T"} if name in "xy" else {}) for name in itertools.chain(*names)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's age, and of a batch of 1
        torch.onnx.export(
            module,
            (x, (state, state)),
            file,
            dynamo=False,
            input_names=names[0],
            output_names=names[1],
            dynamic_axes=axes,
        )
    return file.getvalue()


# By provider a function of the float32 layer, torch.nn's own, that gives the quantized one, and for
# which layers there is one.
LSTM_AND_GRU = (nn.LSTM, nn.GRU)
QUANTIZED = {
    OURS_INT8: (lambda m: lstm_fused.quantize_(lstm_fused.replace(m), torch.int8), nn.RNNBase),
    OURS_BFLOAT16: (
        lambda m: lstm_fused.quantize_(lstm_fused.replace(m), torch.bfloat16),
        nn.RNNBase,
    ),
    ONNX_INT8: (OnnxInt8, nn.LSTM),
    TORCH_INT8: (lambda m: dynamic_of_torch(m, torch.qint8), LSTM_AND_GRU),
    TORCH_FLOAT16: (lambda m: dynamic_of_torch(m, torch.float16), LSTM_AND_GRU),
}


def observed(model: nn.Module, name: str, measure) -> tuple[torch.Tensor, float]:
    """Every y of the layer of that name in the course of measure(model), flat, and its result."""
    seen = []
    layer = model.get_submodule(name)
    hook = layer.register_forward_hook(lambda _, args, out: seen.append(data_of(out[0]).flatten()))
    try:
        with torch.no_grad():
            value = measure(model)
    finally:
        hook.remove()
    return torch.cat(seen), value


def measure_model(name: str, trained: Trained) -> dict:
    """Of a results file's "models": the metric in float32, and by provider errors and metric."""
    layer = trained.recurrent()
    exact, value = observed(trained.model, layer, trained.measure)
    entry = {"name": name, "metric": trained.metric, "value": value, "outputs": len(exact)}
    entry["providers"] = {}
    plain = lstm_fused.restore(copy.deepcopy(trained.model))
    for provider, (quantize, layers) in QUANTIZED.items():
        if not isinstance(plain.get_submodule(layer), layers):
            continue
        model = copy.deepcopy(plain)
        model.set_submodule(layer, quantize(model.get_submodule(layer)))
        found, value = observed(model, layer, trained.measure)
        off = (found - exact).double()
        entry["providers"][provider] = {
            "relative": (off.norm() / exact.double().norm()).item(),
            "rms": off.square().mean().sqrt().item(),
            "largest": off.abs().max().item(),
            "value": value,
        }
    return entry


def measure_accuracy(chosen: list[str]) -> dict:
    """A results file of the models whose name contains one of `chosen`, all where there is none."""
    models = []
    for name, train in MODELS.items():
        if chosen and not any(part in name for part in chosen):
            continue
        print(name, file=sys.stderr)
        torch.manual_seed(SEED)
        models.append(measure_model(name, train()))
    facts = {"set": "accuracy", "models": models, "rows": [], "providers": list(QUANTIZED)}
    fixed = {"schema": run.SCHEMA, "others": 0.0, "interrupted": False}
    return fixed | {"machine": environment.describe()} | facts


def change_of(model: dict, provider: str) -> float:
    """How the metric changed: a loss as a part of itself, others as they are."""
    change = model["providers"][provider]["value"] - model["value"]
    return change / model["value"] if model["metric"] == LOSS else change


def rows_of(result: dict) -> list[list[str]]:
    """The table's lines, its heading first."""
    lines = [["trained model", "error", "rms", "largest", "metric", "change"]]
    for model in result["models"]:
        metric = f"{model['metric']} {model['value']:.4g}"
        lines.append([f"**{model['name']}**", "", "", "", metric, ""])
        for name, each in model["providers"].items():
            sizes = [power_of_ten(each[key]) for key in ("relative", "rms", "largest")]
            change = f"{change_of(model, name):+.2{'f' if model['metric'] == DECIBELS else '%'}}"
            lines.append([name, *sizes, f"{each['value']:.4g}", change])
    return lines


def power_of_ten(value: float) -> str:
    """Two digits: 4.1e-3."""
    return f"{value:.1e}".replace("e-0", "e-").replace("e+00", "")


def goals_text(result: dict) -> str:
    """Which of GOALS the character models of a result reached."""
    lines = []
    for model in result["models"]:
        for name, (error, change) in GOALS.items() if GOALS_OF in model["name"] else ():
            found = model["providers"][name]["relative"], abs(change_of(model, name))
            met = found[0] <= error and found[1] <= change
            lines.append(
                f"- {model['name']}, {name}: {'met' if met else 'missed'}, error {found[0]:.2g} of "
                f"{error:g}, loss {found[1]:.2%} of {change:.2%}"
            )
    return "\n".join(lines)
