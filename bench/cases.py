"""What is measured: a workload as plain data, and the sets of them with the speeds they aim at."""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from lstm_fused import cuda

TORCH, OURS, CELL = "torch.nn", "lstm_fused", "torch.nn cell"
ONNX, OPENVINO = "ONNX Runtime", "OpenVINO"
GRAPH, OURS_GRAPH, CHUNK = f"{TORCH} graph", f"{OURS} graph", f"{TORCH} one chunk"
WITHOUT = f"{OURS} without"  # ours without the row's option
COMPILED, PLAIN = "torch.compile", "plain layer"  # PLAIN: our LSTM or GRU of the same sizes
# With int8 weights, and with those of 16 bits.
ONNX_INT8, TORCH_INT8, OURS_INT8 = (f"{name} int8" for name in (ONNX, TORCH, OURS))
TORCH_FLOAT16, OURS_BFLOAT16 = f"{TORCH} float16 weights", f"{OURS} bfloat16 weights"
# A prepared step, called from Python and from C.
STREAM, C_STREAM, INT8_STREAM = (f"{OURS} {kind}" for kind in ("stream", "C stream", "int8 stream"))
# Which of ours a peer is compared with, where it is not OURS: the first that has a time.
COUNTERPARTS = {
    GRAPH: (OURS_GRAPH,),
    ONNX_INT8: (OURS_INT8, INT8_STREAM),
    TORCH_INT8: (OURS_INT8, INT8_STREAM),
    TORCH_FLOAT16: (OURS_BFLOAT16,),
    OURS: (OURS_BFLOAT16,),
}
GOALS = {
    **{"torch": TORCH, "onnx": ONNX, "cell": CELL, "graph": GRAPH, "chunk": CHUNK},
    **{"without": WITHOUT, "onnx_int8": ONNX_INT8, "bfloat16_over_float32": OURS},
    **{"compiled": COMPILED, "plain": PLAIN},
}

# "tf32" is float32 whose products a GPU may round to TF32; a CPU computes it as float32.
NAMES = ("float32", "float64", "bfloat16", "float16")
DTYPES = {name: getattr(torch, name) for name in NAMES} | {"tf32": torch.float32}
CELLS = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN"}  # and torch.nn's name of each
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1}
# Layers of lstm_fused.cells and their options, and that of another package; a row's cell has the
# name of its class.
LAYERS = {
    "RegularizedLSTM": {"zoneout_h": 0.1, "zoneout_c": 0.1, "clip": 10.0},
    "RegularizedGRU": {"zoneout": 0.1, "clip": 10.0},
    **{name: {} for name in ("LayerNormLSTM", "LayerNormGRU", "PeepholeLSTM", "CoupledLSTM")},
    **{name: {} for name in ("ResetBeforeGRU", "MGU", "IndRNN", "MinGRU", "MinLSTM", "SRU")},
    **{name: {} for name in ("QRNN", "SLSTM")},
}
XLSTM = "xlstm layer"
MODES = ("forward", "training", "step", "loop")
# What a call is given beyond x and hx: 5% resets; every cell state; documents of T to T/2 steps one
# after the other; checkpoints.
OPTIONS = ("resets", "cell states", "documents", "checkpoints")


@dataclass(frozen=True)
class Workload:
    """One row: T, N, I, H are time, batch, input and hidden size; proj is 0 for no projection.

    mode: "forward" without gradients; "training", forward, sum and backward, the gradient of the
    input included; "step", a call a time step (T = 1) with the state carried from call to call;
    "loop", T calls of a single-step cell, then sum and backward as in training.
    """

    name: str
    T: int
    N: int
    I: int  # noqa: E741 - the input size is I everywhere
    H: int
    cell: str = "lstm"
    layers: int = 1
    directions: int = 1
    proj: int = 0
    bias: bool = True
    batch_first: bool = False
    dropout: float = 0.0
    lengths: str = "full"  # "full", or "half": packed, spread evenly from T to T/2
    dtype: str = "float32"
    option: str = ""  # of OPTIONS
    mode: str = "forward"
    # At least so many times a provider's speed. At most so many microseconds a time step, by
    # provider, or by provider and instruction set: "lstm_fused on avx2".
    goals: Mapping[str, float] = field(default_factory=dict, hash=False)
    step_us: Mapping[str, float] = field(default_factory=dict, hash=False)
    group: str = ""  # the heading this row is shown under; empty: regime() finds one
    source: str = ""  # who published the shape

    @property
    def training(self) -> bool:
        return self.mode in ("training", "loop")

    @property
    def R(self) -> int:
        """Width of the recurrence: of h and of each direction's output."""
        return self.proj or self.H

    @property
    def plain(self) -> bool:
        """A dense LSTM layer with biases and no option beyond that."""
        options = (self.proj, self.batch_first, self.lengths != "full", not self.bias, self.option)
        return self.cell == "lstm" and self.layers == self.directions == 1 and not any(options)


def lengths_of(work: Workload) -> list[int]:
    """The length of each batch row, longest first."""
    if work.lengths == "full" and work.option != "documents":
        return [work.T] * work.N
    return torch.linspace(work.T, work.T // 2, work.N).round().long().tolist()


def batch_sizes_of(work: Workload) -> list[int]:
    """How many batch rows each of the T steps has."""
    lengths = lengths_of(work)
    return [sum(length > t for length in lengths) for t in range(work.T)]


def regime(work: Workload) -> str:
    """The heading a row belongs under: what decides its speed more than its exact size does."""
    rules = {
        work.group: work.group,
        work.option: work.option,
        "few steps with gradients": work.mode == "loop" or (work.training and work.T <= 8),
        "other cells": work.cell in LAYERS,
        XLSTM: work.cell == XLSTM,
        "GRU and RNN": work.cell != "lstm",
        "one step": work.T == 1,
        "variable length": work.lengths != "full",
        "other dtypes": work.dtype not in ("float32", "tf32"),
        "layers, directions, projection": not work.plain,
        "training": work.training,
        "forward, batch 1": work.N == 1,
        "forward, batch 2 to 8": work.N <= 8,
        "forward, batch above 8": True,
    }
    return next(heading for heading, applies in rules.items() if applies)


def parse(name: str, shape: str, **more) -> Workload:
    """The workload that the words of a shape describe, such as "packed T50 B8 H64 training".

    T is 100 where it is not said, B (or N) 1, and I as H.
    """
    found = {key: int(size) for key, size in re.findall(r"\b([TBNIH])(\d+)\b", shape)}
    sizes = {"T": 100, "N": found.pop("B", 1), "I": found["H"]} | found
    options = {
        "packed": {"lengths": "half"},
        "both directions": {"directions": 2},
        "2 layers": {"layers": 2},
        "dropout": {"dropout": 0.5},
        "no bias": {"bias": False},
        "batch_first": {"batch_first": True},
        **{"GRU": {"cell": "gru"}, "RNN": {"cell": "rnn_tanh"}},
        **{name: {"cell": name} for name in (*LAYERS, XLSTM)},
        **{dtype: {"dtype": dtype} for dtype in DTYPES},
        **{mode: {"mode": mode} for mode in MODES},
        **{option: {"option": option} for option in OPTIONS},
    }
    for word, option in options.items():
        sizes |= option if re.search(rf"\b{word}\b", shape) else {}
    if proj := re.search(r"\bprojection (\d+)\b", shape):
        sizes["proj"] = int(proj[1])
    return Workload(name, **sizes | more)


def expand(pattern: str) -> list[str]:
    """Every choice of "B{1,8} H{64,256}", those of the first braces in turn before the next's."""
    parts = re.split(r"[{}]", pattern)
    parts = [part.split(",") if k % 2 else [part] for k, part in enumerate(parts)]
    return ["".join(reversed(choice)) for choice in itertools.product(*reversed(parts))]


def rows(*patterns: str, shape="", **options) -> list[Workload]:
    """A workload of each name that a pattern expands to.

    shape: what the names leave unsaid. options: fields of Workload, and goals by the keys of GOALS,
    of all rows or, in a tuple, of each in turn.
    """
    names, found = [name for pattern in patterns for name in expand(pattern)], []
    for k, name in enumerate(names):
        own = {key: v[k] if isinstance(v, tuple) else v for key, v in options.items()}
        goals = {GOALS[key]: own.pop(key) for key in GOALS if key in own}
        goals = {provider: goal for provider, goal in goals.items() if goal}
        found.append(parse(name, f"{shape} {name}", goals=goals, **own))
    return found


BOTH = "{forward,training}"
CPU = (
    *rows("T1 B1 H{64,256,512} step", torch=10.0, cell=4.0, onnx=1.0),
    *rows("B1 H{64,128,256,512,1024} forward", torch=(3.0, 2.0, 1.5, 1.5, 1.4), onnx=1.05),
    *rows("B{2,4,8} H256 forward", torch=(1.5, 1.25, 1.2), onnx=1.05),
    *rows("B32 H{256,512} forward", torch=(1.1, 1.05), onnx=1.0),
    *rows("B128 H256 forward", "T50 B64 H1024 forward", torch=(1.15, 1.05), onnx=1.0),
    *rows(f"T1000 B16 I128 H64 {BOTH}", torch=(2.2, 1.8), onnx=(1.5, None)),
    *rows("B{1,8,32,128} H256 training", torch=(1.9, 1.2, 1.25, 1.25)),
    *rows("B32 H512 training", torch=1.2),
    *rows(f"packed B32 H256 {BOTH}", torch=(2.4, 4.0)),
    *rows(f"projection 64 B32 H256 {BOTH}", torch=(2.3, 1.5)),
    *rows("{2 layers dropout,both directions,batch_first,no bias} B32 H256 training", torch=1.2),
    *rows("both directions B4 H64 forward", torch=1.4),
    *rows(f"float64 B32 H256 {BOTH}", torch=(1.8, 1.6)),
    *rows(f"float16 B32 H256 {BOTH}", torch=(7.0, 15.0)),
    *rows(f"bfloat16 B32 H256 {BOTH}", torch=(1.15, 1.3)),
)
OTHER_CELLS = tuple(
    row
    for cell in ("GRU", "RNN")
    for row in rows(
        f"{cell} B32 H256 {BOTH}",
        f"{cell} packed B32 H256 {BOTH}",
        f"{cell} T1 B1 H256 step",
        torch=(1.5, 1.3, 2.0, 3.0, 5.0),
    )
)
FEW_STEPS = tuple(  # with gradients
    row
    for pattern in ("T{1,8} B{1,8} H128 training", "T10 B{1,8} H{32,128} loop", "T10 B4 H512 loop")
    for cell in ("", "GRU ", "RNN ")
    for row in rows(cell + pattern, torch=1.5)
)
GRID = rows("B{1,2,4,8,16,32,128} H{128,256,512,1024} forward", torch=1.0, onnx=1.05)
HEADLINE = (  # rows of the set cpu that README shows
    *("T1 B1 H256 step", "B1 H256 forward", "B4 H256 forward", "B32 H256 forward"),
    *("B32 H256 training", "packed B32 H256 training", "bfloat16 B32 H256 training"),
    "GRU B32 H256 training",
)
QUICK = (
    *rows("T1 B1 H{64,256} step"),
    *rows(
        f"B1 H128 {BOTH}",
        f"B4 H64 {BOTH}",
        f"B16 H128 {BOTH}",
        f"packed B8 H64 {BOTH}",
        f"projection 32 B4 H64 {BOTH}",
        "2 layers both directions B4 H64 forward",
        f"bfloat16 B8 H128 {BOTH}",
        shape="T50",
    ),
)


# The set gpu is a table of goals over nn.LSTM on cuDNN, a line of it a group here. Its "fp32" is
# "tf32": float32 with TF32 allowed, as torch allows it to recurrent layers by default. Where it
# names no dtype, as for packed data, projections and large batches, bfloat16 and tf32 are measured.
def on_gpu(pattern, goal, group, dtypes="{bfloat16,tf32}", **more) -> list[list[Workload]]:
    """The pair of forward and training row of each shape and dtype.

    goal: over nn.LSTM without graphs, and with graphs over graphs; in bfloat16 also over an nn.LSTM
    whose weights lie in one chunk.
    """
    pairs = []
    for shape, dtype in itertools.product(expand(pattern), expand(dtypes)):
        goals = {"torch": goal, "graph": goal, "chunk": goal if dtype == "bfloat16" else None}
        pairs.append(rows(f"{dtype} {shape} {BOTH}", group=group, **goals, **more))
    return pairs


WINDOW, NARROW, FLASHRNN = "cuDNN's best window", "{float16,bfloat16}", "T1024 B16 H768"
STACKED = "{2 layers,both directions,2 layers both directions} T100 B32 H512"
GPU_LINES = (  # most telling shapes first
    [
        *on_gpu(FLASHRNN, 1.2, WINDOW, "float16", step_us=({OURS: 1.6}, {OURS: 4.0})),
        *on_gpu(FLASHRNN, None, WINDOW, "bfloat16", step_us=({OURS: 1.6}, {OURS: 4.0})),
        *on_gpu("T100 B{32,8,64,128} H{512,1024,256}", 1.2, WINDOW, "float16"),
    ],
    on_gpu("T100 B{32,1,8,64,16} H{512,1024,256}", 2.0, "TF32 and bfloat16"),
    on_gpu(STACKED, (2.0, 1.7), "layers and directions", NARROW),
    # The table names no batch for these: 32, as for the other options.
    on_gpu("T100 B32 H{650,200,1000,320}", 2.0, "H no multiple of 128", NARROW),
    on_gpu("{packed,projection 128} T100 B32 H512", 2.0, "packed, projection"),
    on_gpu("T100 B{32,1,8} H512", 1.5, "full float32", "float32"),
    on_gpu("T50 B{32,8} H{2048,1536}", 1.3, "large H", "bfloat16"),
    on_gpu("T{32 B4096 H256,100 B256 H1024,32 B512 H256}", 1.0, "large batch"),
    on_gpu("T1000 B{64,1,512} H{128,32,64}", 1.2, "small H"),
)
GPU = (
    # A step is measured without graphs: its state is carried from call to call.
    *rows("T1 B1 H512 step", torch=1.5, dtype="tf32", group="one step"),
    # The first shape of each line, then the second: a run that is cut has some of every line.
    *(
        row
        for turn in itertools.zip_longest(*GPU_LINES, fillvalue=())
        for pair in turn
        for row in pair
    ),
)
DEEPBENCH = rows(
    "DeepBench T25 B{16,32,64,128} H{512,1024,2048,4096} training",
    "DeepBench T50 B{8,16,32} H1536 training",
    "DeepBench T150 B{16,32,64} H256 training",
    "DeepBench T25 B{1,2,4} H{512,1024,2048} forward",
    "DeepBench T50 B{1,2,4} H1536 forward",
    "DeepBench T150 B{1,2,4} H256 forward",
    source="Baidu DeepBench, rnn_bench",
)
RL = (
    *rows(f"rollouts T32 B4096 H256 {BOTH}", f"rollouts T128 B128 H256 {BOTH}"),
    *rows(f"IMPALA T20 B32 I256 H256 {BOTH}", source="Espeholt et al. 2018"),
    *rows("R2D2 T80 B64 H512 training", source="Kapturowski et al. 2019"),
    *rows("T1 B{1,16,64,256} H256 step"),
    *rows("{,GRU }T1 B{1,8,16,64} H256 training", "{,GRU }T16 B{1,8,32} H256 loop"),
)
ONE_STEP_US = {f"{OURS} on avx512": 5.0, f"{OURS} on avx2": 8.0, C_STREAM: 3.0}
STREAMING = (
    *rows("T1 B1 H64 step", onnx=1.0, step_us=ONE_STEP_US),
    *rows("T1 B1 H{128,256,512,1024} step", onnx=1.0, onnx_int8=(None, None, 1.1, None)),
    *rows("T1 B{2,4,8} H256 step"),
    *rows("T1 2 layers B1 H{128,256} step", group="two layers"),
    *rows("GRU T1 B1 H{64,256,512} step", onnx=1.0),
    *rows("GRU T1 2 layers B1 H{128,256} step", group="two layers"),
    *rows("chunk T{4,16} B1 H{256,512} forward"),
)
INT8 = (  # weights of 8 and of 16 bits, beside those of the same size
    *rows("T1 B1 H{64,256} step"),
    *rows("T1 B1 H{512,1024} step", onnx_int8=(1.1, None), bfloat16_over_float32=1.6),
    *rows("B1 H{64,128} forward"),
    *rows("B1 H256 forward", onnx_int8=1.1),
    *rows("B1 H{512,1024} forward", bfloat16_over_float32=1.6),
    *rows("B{4,8,32} H256 forward", "packed B8 H256 forward"),
    *rows("{2 layers,both directions,projection 64} B1 H256 forward"),
    *rows("{GRU,RNN} B1 H{256,512} forward", "{GRU,RNN} T1 B1 H512 step"),
)
REAL = tuple(  # recurrent layers of public models, at the batch and length their sources train with
    row
    for name, source, shape in (
        ("AWD-LSTM layer 2", "Merity et al. 2017, WikiText-2", "T70 B80 H1150"),
        ("word_language_model", "pytorch/examples", "2 layers dropout T35 B20 H650"),
        ("GNMT layer training", "Wu et al. 2016", "T50 B128 H1024"),
        ("ELMo biLM layer forward", "Peters et al. 2018", "projection 512 T20 B128 I512 H4096"),
        ("Deep Speech 2 layer", "Amodei et al. 2015, FlashRNN's shape", "T300 B20 H800"),
        ("FlashRNN layer forward", "Poeppel et al. 2024", "T1024 B16 H768"),
        ("Tacotron 2 encoder forward", "Shen et al. 2018", "both directions T150 I512 H256"),
        ("CRNN recogniser", "Shi et al. 2015", "2 layers both directions T26 B64 I512 H256"),
        ("Flair character LM forward", "Akbik et al. 2018", "T250 B32 I100 H2048"),
        ("DeepAR", "Salinas et al. 2017, GluonTS's defaults", "2 layers T72 B32 H40"),
        ("haste's benchmark T50 B32 H512", "lmnt-com/haste", "T50 B32 H512"),
        ("T1 Silero VAD B1 H128 step", "Silero VAD 5", ""),
    )
    for row in rows(name if name.endswith(MODES) else f"{name} {BOTH}", shape=shape, source=source)
)


def scattered(count):
    """Shapes between the lines, spread evenly: fractional parts of multiples of irrationals."""
    for k in range(1, count + 1):
        a, b, c = (k * 0.8191725134 % 1, k * 0.6710436067 % 1, k * 0.5497004779 % 1)
        yield round(400 ** (a * 0.8)), round(40**b), round(30 * (1100 / 30) ** c)


N_LINE = (*range(1, 13), 14, 16, 20, 24, 31, 32, 33, 40)
H_LINE = (30, 48, 64, 100, 128, 200, 256, 320, 400, 512, 650, 800, 1024, 1100)
T_LINE = (1, 2, 3, 4, 6, 8, 12, 20, 50, 100, 400)
SWEEP = tuple(  # none of which may be slower than torch's
    row
    for group, shapes in {
        "over N, H256": [(50, N, 256) for N in N_LINE],
        "over H, N1": [(50, 1, H) for H in H_LINE],
        "over H, N6": [(50, 6, H) for H in H_LINE if H not in (48, 320, 800, 1024)],
        "over T, N1 H128": [(T, 1, 128) for T in T_LINE],
        "over T, N8 H128": [(T, 8, 128) for T in T_LINE],
        "between the lines": scattered(24),
    }.items()
    for T, N, H in shapes
    for row in rows(f"{group}: T{T} N{N} H{H} {BOTH}", torch=1.0, group=group, N=N)
)
SEQUENCES = (  # beside loops over torch.nn's steps, and beside ours without the option
    *rows(f"resets T128 B16 H64 {BOTH}", torch=5.0, without=1 / 1.1),
    *rows(f"resets {{GRU,RNN,both directions}} T128 B16 H64 {BOTH}", without=1 / 1.1),
    *rows(f"resets T{{64,512}} B{{1,64}} H256 {BOTH}", without=1 / 1.1),
    *rows(f"cell states {{T128 B16 H64,T100 B32 H256}} {BOTH}", torch=1.0),
    *rows(f"documents {{T128 B16 H64,T100 B32 H256,T500 B8 H256}} {BOTH}", torch=1.0),
    *rows("checkpoints T100000 B1 H256 training", without=1 / 1.35),
    *rows("checkpoints {T2000 B16 H256,GRU T2000 B16 H256} training", without=1 / 1.35),
)
# Beside a Python loop over their steps, and beside a plain LSTM or GRU; xlstm's own layer, of which
# TiRex's is the second shape, beside its eager loop and beside one that is compiled.
OTHER_LAYERS = (
    *(row for name in LAYERS if name != "LayerNormLSTM" for row in rows(f"{name} B32 H256 {BOTH}")),
    *rows(f"LayerNormLSTM B32 H256 {BOTH}", plain=1 / 1.6),
    *rows(f"{XLSTM} {{T100 B32 H256,T64 B1 H512,T64 B16 H512}} {BOTH}", torch=5.0, compiled=5.0),
)
PLANS = rows(  # for choosing between CUDA plans and their tilings
    f"{{float16,bfloat16,tf32}} T1024 B16 H768 {BOTH}",
    f"tf32 T300 B20 H800 {BOTH}",
    f"float32 T150 B64 H256 {BOTH}",
    f"bfloat16 {{T150 B16 H256,T100 B32 H512,T50 B64 H1024,T25 B64 H2048,T32 B4096 H256}} {BOTH}",
    f"bfloat16 both directions {{T150 B64 H256,T100 B128 H512}} {BOTH}",
)

SETS = {
    "quick": QUICK,
    "cpu": (*CPU, *OTHER_CELLS, *FEW_STEPS),
    "gpu": GPU,
    "deepbench": DEEPBENCH,
    "rl": RL,
    "streaming": STREAMING,
    "real": REAL,
    "sweep": SWEEP,
    "grid": GRID,
    "int8": INT8,
    "sequences": SEQUENCES,
    "cells": OTHER_LAYERS,
    "plans": PLANS,
}

# What a set measures beside torch.nn where --providers names nothing; others what Provider.default
# says.
SET_PROVIDERS = {
    "plans": (OURS, *(f"{OURS} {plan}" for plan in cuda.KINDS)),
    "int8": (OURS, OURS_INT8, OURS_BFLOAT16, ONNX, ONNX_INT8, TORCH_INT8, TORCH_FLOAT16),
    "streaming": (OURS, STREAM, C_STREAM, INT8_STREAM, ONNX, ONNX_INT8),
    "cells": (OURS, PLAIN, COMPILED),
}

# What a set's tables call a provider, where it is not its name.
SET_NAMES = {"cells": {TORCH: "Python loop"}}

# The speed-ups that a set's table has: (provider, peer). Others have each peer's, of its
# counterpart.
SET_RATIOS = {
    "int8": (
        *((OURS_INT8, peer) for peer in (OURS, ONNX_INT8, TORCH_INT8)),
        *((OURS_BFLOAT16, peer) for peer in (OURS, TORCH_FLOAT16)),
    ),
    "streaming": (
        *((OURS, peer) for peer in (TORCH, ONNX)),
        *((STREAM, peer) for peer in (TORCH, ONNX)),
        (INT8_STREAM, ONNX_INT8),
    ),
    "cells": tuple((OURS, peer) for peer in (TORCH, PLAIN, COMPILED)),
}
