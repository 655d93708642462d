"""Models of other libraries, unmodified, before and after lstm_fused.replace.

Their weights are random: nothing is downloaded. A client is a function that returns a module and
its inputs, as `--model` takes them; each row names the library's release it was measured with.
"""

import copy
import importlib.metadata
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from bench import environment, isolated, measure, model, run
from bench.cases import OURS, TORCH
from bench.isolated import Lost, Worker
from bench.timing import Sampling
from lstm_fused import rl

SAMPLING = Sampling(rounds=9, seconds=0.03, row_seconds=3.0, attempts=2)
SILENCE = 300.0  # seconds: an oracle in float64 says nothing meanwhile
BOTH = ("forward", "training")


@dataclass(frozen=True)
class Client:
    """A model of a library, which pip installs by this name; build() -> (module, inputs)."""

    library: str
    model: str
    build: Callable[[], tuple]
    modes: tuple = BOTH

    def version(self) -> str | None:
        try:
            return importlib.metadata.version(self.library)
        except importlib.metadata.PackageNotFoundError:
            return None


CLIENTS: dict[str, Client] = {}


def client(library, name, *args, modes=BOTH):
    """Enters a function of args into the table."""

    def enter(build):
        key = f"{library}: {name}"
        CLIENTS[key] = Client(library, name, lambda: build(*args), modes)
        return build

    return enter


class Method(nn.Module):
    """A method of a module as a module."""

    def __init__(self, module, name):
        super().__init__()
        self.module, self.name = module, name

    def forward(self, *args, **kwargs):
        return getattr(self.module, self.name)(*args, **kwargs)


def lengths(count, longest):
    """So many lengths, from the longest to half of it."""
    return torch.linspace(longest, longest // 2, count).round().long()


@client("transformers", "EnCodec encoder, 1 s", "encoder")
@client("transformers", "EnCodec decoder, 1 s", "decoder")
def encodec(part):
    from transformers import EncodecConfig, EncodecModel

    sizes = {"encoder": (1, 1, 24000), "decoder": (1, 128, 75)}
    return getattr(EncodecModel(EncodecConfig()), part), torch.randn(sizes[part])


@client("demucs", "Demucs, 1 s", "demucs", "Demucs")
@client("demucs", "Hybrid Demucs, 2 s", "hdemucs", "HDemucs")
def demucs(module, name):
    library = __import__(f"demucs.{module}", fromlist=[name])
    seconds = 1 if name == "Demucs" else 2
    built = getattr(library, name)(["drums", "bass", "other", "vocals"])
    return built, torch.randn(1, 2, seconds * 44100)


@client("torchaudio", "Tacotron 2, 4 sentences of 15 to 30 letters")
def tacotron2():
    from torchaudio.models import Tacotron2

    inputs = (torch.randint(1, 148, (4, 30)), lengths(4, 30), torch.randn(4, 80, 60))
    return Tacotron2(), (*inputs, lengths(4, 60))


@client("torchaudio", "WaveRNN, 1375 samples")
def wavernn():
    from torchaudio.models import WaveRNN

    built = WaveRNN(upsample_scales=[5, 5, 11], n_classes=512, hop_length=275)
    return built, (torch.randn(1, 1, 1375), torch.randn(1, 1, 128, 9))


@client("asteroid", "DPRNN-TasNet, 1 s")
def dprnn():
    from asteroid.models import DPRNNTasNet

    return DPRNNTasNet(n_src=2), torch.randn(1, 8000)


@client("speechbrain", "LSTM encoder, packed, 8 utterances of 1.3 to 2.6 s", "LSTM")
@client("speechbrain", "GRU encoder, packed, 8 utterances of 1.3 to 2.6 s", "GRU")
def speechbrain(kind):
    from speechbrain.nnet import RNN

    part = getattr(RNN, kind)(256, [8, 256, 80], num_layers=2, bidirectional=True)
    # Lengths are parts of the longest: of 256 they are exact in every dtype.
    return part, {"x": torch.randn(8, 256, 80), "lengths": lengths(8, 256) / 256}


@client("speechbrain", "CRDNN of LSTMs, 4 utterances of 1 s")
def crdnn():
    from speechbrain.lobes.models.CRDNN import CRDNN
    from speechbrain.nnet.RNN import LSTM

    return CRDNN(input_shape=[4, 100, 40], rnn_class=LSTM), torch.randn(4, 100, 40)


@client("pyannote-audio", "PyanNet, 2 pieces of 5 s")
def pyannet():
    from pyannote.audio.core.task import Problem, Resolution, Specifications
    from pyannote.audio.models.segmentation import PyanNet

    built, classes = PyanNet(), ["a", "b", "c"]
    what = (Problem.MULTI_LABEL_CLASSIFICATION, Resolution.FRAME)
    built.specifications = Specifications(*what, duration=5.0, classes=classes)
    built.build()
    return built, torch.randn(2, 1, 80000)


@client("kokoro", "text encoder, 8 texts of 64 to 128 phonemes")
def kokoro_text():
    from kokoro.modules import TextEncoder

    count = lengths(8, 128)
    return TextEncoder(512, 5, 3, 178), (torch.randint(1, 178, (8, 128)), count, masked(count))


@client("kokoro", "prosody predictor, 8 texts of 64 to 128 phonemes")
def kokoro_prosody():
    from kokoro.modules import ProsodyPredictor

    count = lengths(8, 128)
    texts, style = torch.randn(8, 512, 128), torch.randn(8, 128)
    return ProsodyPredictor(128, 512, 3), (texts, style, count, torch.eye(128), masked(count))


def masked(count):
    """True where a row of texts is padding, (N, T)."""
    return torch.arange(int(count.max()))[None] >= count[:, None]


@client("kokoro", "Kokoro 82M, a text of 30 phonemes", modes=("forward",))
def kokoro():
    from kokoro import KModel

    voice = {
        "upsample_kernel_sizes": [20, 12],
        "upsample_rates": [10, 6],
        "gen_istft_hop_size": 5,
        "gen_istft_n_fft": 20,
        "resblock_dilation_sizes": [[1, 3, 5]] * 3,
        "resblock_kernel_sizes": [3, 7, 11],
        "upsample_initial_channel": 512,
    }
    plbert = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 2048}
    plbert |= {"max_position_embeddings": 512, "num_hidden_layers": 12, "dropout": 0.1}
    config = {"istftnet": voice, "plbert": plbert, "vocab": {}, "n_token": 178, "hidden_dim": 512}
    config |= {"style_dim": 128, "n_layer": 3, "max_dur": 50, "dropout": 0.2, "n_mels": 80}
    config |= {"text_encoder_kernel_size": 5}
    with tempfile.NamedTemporaryFile() as weights:
        torch.save({}, weights.name)  # none: those that it is made with stay
        built = KModel("random weights", config, weights.name)
    ids = torch.randint(1, 178, (1, 30))
    return Method(built, "forward_with_tokens"), (ids, torch.randn(1, 256), 10.0)


@client("darts", "RNNModel LSTM, batch 32", "LSTM")
@client("darts", "RNNModel GRU, batch 32", "GRU")
def darts(kind):
    from darts.models import RNNModel
    from darts.utils.timeseries_generation import sine_timeseries

    made = RNNModel(48, kind, hidden_dim=64, n_rnn_layers=2, training_length=96)
    series = sine_timeseries(length=400).astype("float32")
    return fitted(lambda: made.fit(series, epochs=1), lambda: made.model)


def fitted(fit, module):
    """What fit(), the library's own training, leaves as module(), and the inputs it last got."""
    seen = []
    hook = nn.modules.module.register_module_forward_pre_hook(
        lambda each, args: seen.append((each, args))
    )
    try:
        fit()
    finally:
        hook.remove()
    found = module()
    return found, next(args for each, args in reversed(seen) if each is found)


@client("gluonts", "DeepAR's loss, batch 32")
def gluonts():
    from gluonts.torch.model.deepar import DeepAREstimator

    made = DeepAREstimator("h", 24).create_lightning_module().model
    inputs = made.describe_inputs(32).zeros()
    for name in ("past_time_feat", "future_time_feat", "past_target"):
        inputs[name] = torch.randn(inputs[name].shape)
    future = {"future_target": torch.randn(32, 24), "future_observed_values": torch.ones(32, 24)}
    return Method(made, "loss"), inputs | future


@client("neuralforecast", "LSTM, batch 32", "LSTM")
@client("neuralforecast", "GRU, batch 32", "GRU")
def neuralforecast(kind):
    from neuralforecast import models

    made = getattr(models, kind)(h=12, input_size=96, max_steps=1)
    none = dict.fromkeys(("futr_exog", "hist_exog", "stat_exog"))
    return made, ({"insample_y": torch.randn(32, 96, 1)} | none,)


@client("easyocr", "recogniser, 8 lines of 400 pixels")
def easyocr():
    from easyocr.model.vgg_model import Model

    return Model(1, 256, 256, 97), (torch.randn(8, 1, 64, 400), None)


PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true")


class InPrecision(nn.Module):
    """What lightning makes of a module's call, in the precision of that name."""

    def __init__(self, module, name):
        super().__init__()
        from lightning import Fabric

        self.precision = Fabric(accelerator="cpu", precision=name).strategy.precision
        self.module = self.precision.convert_module(module)

    def forward(self, *args):
        with self.precision.forward_context():
            args = self.precision.convert_input(args)
            return self.precision.convert_output(self.module(*args))


def lightning(name):
    module = nn.LSTM(64, 256, 2)
    exact = InPrecision(copy.deepcopy(module), "64-true")
    return InPrecision(module, name), torch.randn(100, 16, 64), exact


for _name in PRECISIONS:
    client("lightning", f"LSTM of two layers in {_name}", _name)(lightning)


class Learning(nn.Module):
    """A call is 1024 frames of sb3-contrib's RecurrentPPO with its own hyperparameters, 8 at once:
    CartPole, of which positions are shown and speeds are not."""

    def __init__(self):
        super().__init__()
        from gymnasium import spaces, wrappers
        from sb3_contrib import RecurrentPPO
        from stable_baselines3.common.env_util import make_vec_env

        def without_speeds(env):
            shown = (b[::2] for b in (env.observation_space.low, env.observation_space.high))
            return wrappers.TransformObservation(env, lambda seen: seen[::2], spaces.Box(*shown))

        envs = make_vec_env("CartPole-v1", 8, seed=0, wrapper_class=without_speeds)
        self.learner = RecurrentPPO("MlpLstmPolicy", envs, seed=0, device="cpu")
        self.policy = self.learner.policy

    @torch.enable_grad()
    def forward(self):
        self.learner.set_random_seed(0)
        self.learner.learn(1024)
        return nn.utils.parameters_to_vector(self.policy.parameters())


@client("sb3-contrib", "RecurrentPPO, 1024 frames of CartPole without speeds", modes=("forward",))
def recurrent_ppo():
    return Learning(), (), None, rl.replace


@client("torchrl", "LSTMModule, 16 by 128 steps, 5% begin an episode", "LSTM", "hc")
@client("torchrl", "GRUModule, 16 by 128 steps, 5% begin an episode", "GRU", "h")
def torchrl(kind, states):
    from torchrl import modules

    keys = {"in_keys": ["x", *states], "out_keys": ["y", *(("next", s) for s in states)]}
    made = getattr(modules, f"{kind}Module")(64, 64, **keys, default_recurrent_mode=True)
    zeros = [torch.zeros(16, 128, 1, 64) for _ in states]
    begins = torch.rand(16, 128, 1, generator=torch.Generator().manual_seed(0)) < 0.05
    return made, (torch.randn(16, 128, 64), *zeros, begins), None, rl.replace


def measure_client(key: str) -> list[dict]:
    """The rows of a client, by key of CLIENTS, one a mode."""
    isolated.trying(key)
    measure.quiet()
    torch.manual_seed(0)
    chosen = CLIENTS[key]
    module, inputs, *exact = chosen.build()
    found = model.Model(module, model.arguments(inputs), *exact)
    if not (replaced := found.replaced()):
        raise model.ModelError("the model holds no module that lstm_fused replaces")
    facts = {"group": f"{chosen.library} {chosen.version()}, torch {torch.__version__}"}
    rows = []
    for mode in chosen.modes:
        facts["name"] = f"{chosen.model}, {mode}"
        rows.append(model.measure_mode(found, mode, SAMPLING, "cpu", **facts))
        rows[-1] |= {"client": key, "replaced": len(replaced)}
    return rows


def finished(rows: dict[str, list[dict]]) -> dict:
    """The results file of rows by client, in the order of CLIENTS."""
    ordered = [row for key in CLIENTS for row in rows.get(key, ())]
    machine = environment.describe()
    torches = {row["workload"]["group"].rpartition(" ")[2] for row in ordered}
    machine["torch"] = " and ".join(sorted(torches))
    facts = {"set": "clients", "providers": [TORCH, OURS], "rows": ordered, "machine": machine}
    timed = [row for row in ordered if "timing" in row["providers"].get(OURS, {})]
    others = max((row["others"] for row in timed), default=0.0)
    fixed = {"schema": run.SCHEMA, "interrupted": False, "keep_memory": False, "others": others}
    return fixed | facts


def measure_clients(names: list[str], before: dict | None = None, after=lambda result: None):
    """A results file of the clients whose key holds one of the names, all where there is none.

    before: a results file of other libraries or releases, from which clients that are not measured
    anew are kept. after is given the result up to each client.
    """
    rows = {}
    for row in (before or {"rows": []})["rows"]:
        rows.setdefault(row["client"], []).append(row)
    for key, chosen in CLIENTS.items():
        if names and not any(name in key for name in names):
            continue
        print(key, file=sys.stderr)
        if chosen.version() is None:
            print(f"  not installed: pip install {chosen.library}", file=sys.stderr)
            continue
        begin, used = time.monotonic(), environment.background_cpu_seconds()
        with Worker(silence=SILENCE) as worker:
            try:
                measured = worker.call(measure_client, key)
            except Lost as lost:
                print(f"  not measured: {lost}", file=sys.stderr)
                continue
        used = environment.background_cpu_seconds() - used
        others = round(max(0.0, used / max(time.monotonic() - begin, 1e-9)), 2)
        rows[key] = [row | {"others": others} for row in measured]
        after(finished(rows))
    return finished(rows)
