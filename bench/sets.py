"""The sets of workloads: a new measurement is one more row in one of them."""

import itertools

from bench.workloads import Workload

TORCH, CELL, ONNX = "torch.nn", "torch.nn cell", "ONNX Runtime"
GRAPH, CHUNK = "torch.nn graph", "torch.nn one chunk"


def forward(name, over_torch=None, over_onnx=None, mode="forward", **sizes):
    """A forward row; a goal that is None is not asked for."""
    goals = {TORCH: over_torch, ONNX: over_onnx}
    goals = {name: goal for name, goal in goals.items() if goal is not None}
    return Workload(f"{name} {mode}", mode=mode, goals=goals, **sizes)


def training(name, over_torch=None, **sizes):
    return forward(name, over_torch, mode="training", **sizes)


def both(name, over_torch=(None, None), over_onnx=None, **sizes):
    """The forward row and the training row of one shape."""
    return (
        forward(name, over_torch[0], over_onnx, **sizes),
        training(name, over_torch[1], **sizes),
    )


def square(T, N, H, **more):
    """Sizes of a layer whose input is as wide as its output."""
    return {"T": T, "N": N, "I": H, "H": H, **more}


def step(H, words="", N=1, goals=None, **more):
    goals = goals or {}
    name = f"T1 {words}B{N} H{H} step"
    return Workload(name, mode="step", goals=goals, **square(1, N, H, **more))


B32 = square(100, 32, 256)
PLAIN = (
    *(step(H, goals={TORCH: 10.0, CELL: 4.0, ONNX: 1.0}) for H in (64, 256, 512)),
    *(
        forward(f"B1 H{H}", goal, 1.05, **square(100, 1, H))
        for H, goal in ((64, 3.0), (128, 2.0), (256, 1.5), (512, 1.5), (1024, 1.4))
    ),
    *(
        forward(f"B{N} H256", goal, 1.05, **square(100, N, 256))
        for N, goal in ((2, 1.5), (4, 1.25), (8, 1.2))
    ),
    forward("B32 H256", 1.1, 1.0, **B32),
    forward("B32 H512", 1.05, 1.0, **square(100, 32, 512)),
    forward("B128 H256", 1.15, 1.0, **square(100, 128, 256)),
    forward("T50 B64 H1024", 1.05, 1.0, **square(50, 64, 1024)),
    *both("T1000 B16 I128 H64", (2.2, 1.8), 1.5, T=1000, N=16, I=128, H=64),
    training("B1 H256", 1.9, **square(100, 1, 256)),
    training("B8 H256", 1.2, **square(100, 8, 256)),
    training("B32 H256", 1.25, **B32),
    training("B128 H256", 1.25, **square(100, 128, 256)),
    training("B32 H512", 1.2, **square(100, 32, 512)),
)
OPTIONS = (
    *both("packed B32 H256", (2.4, 4.0), lengths="half", **B32),
    *both("projection 64 B32 H256", (2.3, 1.5), proj=64, **B32),
    training("2 layers dropout B32 H256", 1.2, layers=2, dropout=0.5, **B32),
    training("both directions B32 H256", 1.2, directions=2, **B32),
    training("batch_first B32 H256", 1.2, batch_first=True, **B32),
    training("no bias B32 H256", 1.2, bias=False, **B32),
    forward("both directions B4 H64", 1.4, directions=2, **square(100, 4, 64)),
    *both("float64 B32 H256", (1.8, 1.6), dtype="float64", **B32),
    *both("float16 B32 H256", (7.0, 15.0), dtype="float16", **B32),
    *both("bfloat16 B32 H256", (1.15, 1.3), dtype="bfloat16", **B32),
)
OTHER_CELLS = tuple(
    row
    for cell, name in (("gru", "GRU"), ("rnn_tanh", "RNN"))
    for row in (
        *both(f"{name} B32 H256", (1.5, 1.3), cell=cell, **B32),
        *both(f"{name} packed B32 H256", (2.0, 3.0), cell=cell, lengths="half", **B32),
        forward(f"{name} T1 B1 H256", 5.0, mode="step", cell=cell, **square(1, 1, 256)),
    )
)
CPU = (*PLAIN, *OPTIONS, *OTHER_CELLS)

QUICK = (
    step(64),
    step(256),
    *both("B1 H128", **square(50, 1, 128)),
    *both("B4 H64", **square(50, 4, 64)),
    *both("B16 H128", **square(50, 16, 128)),
    *both("packed B8 H64", lengths="half", **square(50, 8, 64)),
    *both("projection 32 B4 H64", proj=32, **square(50, 4, 64)),
    forward("2 layers both directions B4 H64", layers=2, directions=2, **square(50, 4, 64)),
    *both("bfloat16 B8 H128", dtype="bfloat16", **square(50, 8, 128)),
)


# The set gpu is a table of goals over nn.LSTM on cuDNN, a line of it a group here. Its "fp32" is
# "tf32": float32 with TF32 allowed, as torch allows it to recurrent layers by default. Where it
# names no dtype, as for packed data, projections and large batches, both of SILENT are measured.
SILENT = ("bfloat16", "tf32")
NARROW = ("float16", "bfloat16")


def on_gpu(group, over_torch, shapes, dtypes, words="", step_us=(0.0, 0.0), **more):
    """Per shape (T, N, H) and dtype its forward and its training row.

    over_torch: the goals of both. They hold without graphs, and for graphs beside each other; in
    bfloat16 also beside an nn.LSTM whose weights lie in one chunk. step_us: as in Workload.
    """
    pairs = []
    for (T, N, H), dtype in itertools.product(shapes, dtypes):
        others = (TORCH, GRAPH, CHUNK) if dtype == "bfloat16" else (TORCH, GRAPH)
        pairs.append(
            tuple(
                Workload(
                    f"{dtype} {words}T{T} B{N} H{H} {mode}",
                    mode=mode,
                    goals=dict.fromkeys(others, goal) if goal else {},
                    step_us=each,
                    group=group,
                    dtype=dtype,
                    **square(T, N, H, **more),
                )
                for mode, goal, each in zip(
                    ("forward", "training"), over_torch, step_us, strict=True
                )
            )
        )
    return pairs


def shapes(T, batches, hiddens):
    """(T, N, H) of each combination, those of the first hidden size first."""
    return [(T, N, H) for H, N in itertools.product(hiddens, batches)]


WINDOW, LAYERS, VARIED = "cuDNN's best window", "layers and directions", "packed, projection"
FLASHRNN = [(1024, 16, 768)]
GPU_LINES = (  # most telling shapes first: see rounds
    [
        *on_gpu(WINDOW, (1.2, 1.2), FLASHRNN, ["float16"], step_us=(1.6, 4.0)),
        *on_gpu(WINDOW, (None, None), FLASHRNN, ["bfloat16"], step_us=(1.6, 4.0)),
        *on_gpu(WINDOW, (1.2, 1.2), shapes(100, (32, 8, 64, 128), (512, 1024, 256)), ["float16"]),
    ],
    on_gpu(
        "TF32 and bfloat16",
        (2.0, 2.0),
        shapes(100, (32, 1, 8, 64, 16), (512, 1024, 256)),
        ("bfloat16", "tf32"),
    ),
    [
        *on_gpu(LAYERS, (2.0, 1.7), [(100, 32, 512)], NARROW, "2 layers ", layers=2),
        *on_gpu(LAYERS, (2.0, 1.7), [(100, 32, 512)], NARROW, "both directions ", directions=2),
        *on_gpu(
            LAYERS,
            (2.0, 1.7),
            [(100, 32, 512)],
            NARROW,
            "2 layers both directions ",
            layers=2,
            directions=2,
        ),
    ],
    # The table names no batch for these: 32, as for the other options.
    on_gpu("H no multiple of 128", (2.0, 2.0), shapes(100, (32,), (650, 200, 1000, 320)), NARROW),
    [
        *on_gpu(VARIED, (2.0, 2.0), [(100, 32, 512)], SILENT, "packed ", lengths="half"),
        *on_gpu(VARIED, (2.0, 2.0), [(100, 32, 512)], SILENT, "projection 128 ", proj=128),
    ],
    on_gpu("full float32", (1.5, 1.5), shapes(100, (32, 1, 8), (512,)), ["float32"]),
    on_gpu("large H", (1.3, 1.3), shapes(50, (32, 8), (2048, 1536)), ["bfloat16"]),
    on_gpu(
        "large batch",
        (1.0, 1.0),
        [(32, 4096, 256), (100, 256, 1024), (32, 512, 256)],
        SILENT,
    ),
    on_gpu("small H", (1.2, 1.2), shapes(1000, (64, 1, 512), (128, 32, 64)), ("bfloat16", "tf32")),
)


def rounds(lines):
    """The first shape of each line, then the second: a run that is cut has some of every line."""
    for turn in itertools.zip_longest(*lines, fillvalue=()):
        yield from itertools.chain.from_iterable(turn)


# A step is measured without graphs: its state is carried from call to call.
GPU = (
    step(512, dtype="tf32", goals={TORCH: 1.5}, group="one step"),
    *rounds(GPU_LINES),
)

DEEPBENCH_SOURCE = "Baidu DeepBench, rnn_bench"
DEEPBENCH = (
    *(
        training(f"DeepBench T{T} B{N} H{H}", source=DEEPBENCH_SOURCE, **square(T, N, H))
        for T, batches, hiddens in (
            (25, (16, 32, 64, 128), (512, 1024, 2048, 4096)),
            (50, (8, 16, 32), (1536,)),
            (150, (16, 32, 64), (256,)),
        )
        for H, N in itertools.product(hiddens, batches)
    ),
    *(
        forward(f"DeepBench T{T} B{N} H{H}", source=DEEPBENCH_SOURCE, **square(T, N, H))
        for T, H in ((25, 512), (25, 1024), (25, 2048), (50, 1536), (150, 256))
        for N in (1, 2, 4)
    ),
)

RL = (
    *both("rollouts T32 B4096 H256", **square(32, 4096, 256)),
    *both("rollouts T128 B128 H256", **square(128, 128, 256)),
    *both("IMPALA T20 B32 I256 H256", source="Espeholt et al. 2018", **square(20, 32, 256)),
    training("R2D2 T80 B64 H512", source="Kapturowski et al. 2019", **square(80, 64, 512)),
    *(step(256, N=N) for N in (1, 16, 64, 256)),
)

STREAMING = (
    *(step(H) for H in (64, 128, 256, 512, 1024)),
    *(step(256, N=N) for N in (2, 4, 8)),
    step(128, "2 layers ", layers=2, group="two layers"),
    *(
        forward(f"chunk T{T} B1 H{H}", **square(T, 1, H))
        for T, H in itertools.product((4, 16), (256, 512))
    ),
)


def public(model, source, T, N, I, H, modes=("forward", "training"), **more):  # noqa: E741
    """The recurrent layer of a public model, at the batch and length its source trains with."""
    build = {"forward": forward, "training": training}
    return tuple(build[m](model, T=T, N=N, I=I, H=H, source=source, **more) for m in modes)


REAL = (
    *public("AWD-LSTM layer 2", "Merity et al. 2017, WikiText-2", 70, 80, 1150, 1150),
    *public("word_language_model", "pytorch/examples", 35, 20, 650, 650, layers=2, dropout=0.5),
    *public("GNMT layer", "Wu et al. 2016", 50, 128, 1024, 1024, ("training",)),
    *public("ELMo biLM layer", "Peters et al. 2018", 20, 128, 512, 4096, ("forward",), proj=512),
    *public("Deep Speech 2 layer", "Amodei et al. 2015, FlashRNN's shape", 300, 20, 800, 800),
    *public("FlashRNN layer", "Poeppel et al. 2024", 1024, 16, 768, 768, ("forward",)),
    *public("Tacotron 2 encoder", "Shen et al. 2018", 150, 1, 512, 256, ("forward",), directions=2),
    *public(
        "CRNN recogniser",
        "Shi et al. 2015",
        26,
        64,
        512,
        256,
        layers=2,
        directions=2,
    ),
    *public("Flair character LM", "Akbik et al. 2018", 250, 32, 100, 2048, ("forward",)),
    *public("DeepAR", "Salinas et al. 2017, GluonTS's defaults", 72, 32, 40, 40, layers=2),
    *public("haste's benchmark T50 B32 H512", "lmnt-com/haste", 50, 32, 512, 512),
    step(128, "Silero VAD ", source="Silero VAD 5", group="voice activity detector"),
)


def points(group, shapes):
    """Both modes of (T, N, H) shapes, none of which may be slower than torch's."""
    for T, N, H in shapes:
        yield from both(f"{group}: T{T} N{N} H{H}", (1.0, 1.0), group=group, **square(T, N, H))


def scattered(count):
    """Shapes between the lines, spread evenly: fractional parts of multiples of irrationals."""
    for k in range(1, count + 1):
        a, b, c = (k * 0.8191725134 % 1, k * 0.6710436067 % 1, k * 0.5497004779 % 1)
        yield round(400 ** (a * 0.8)), round(40**b), round(30 * (1100 / 30) ** c)


SWEEP = (
    *points(
        "over N, H256", ((50, N, 256) for N in (*range(1, 13), 14, 16, 20, 24, 31, 32, 33, 40))
    ),
    *points(
        "over H, N1",
        ((50, 1, H) for H in (30, 48, 64, 100, 128, 200, 256, 320, 400, 512, 650, 800, 1024, 1100)),
    ),
    *points("over H, N6", ((50, 6, H) for H in (30, 64, 100, 128, 200, 256, 400, 512, 650, 1100))),
    *points("over T, N1 H128", ((T, 1, 128) for T in (1, 2, 3, 4, 6, 8, 12, 20, 50, 100, 400))),
    *points("over T, N8 H128", ((T, 8, 128) for T in (1, 2, 3, 4, 6, 8, 12, 20, 50, 100, 400))),
    *points("between the lines", scattered(24)),
)

SETS = {
    "quick": QUICK,
    "cpu": CPU,
    "gpu": GPU,
    "deepbench": DEEPBENCH,
    "rl": RL,
    "streaming": STREAMING,
    "real": REAL,
    "sweep": SWEEP,
}
