"""A user's program with every public function, for `mypy --strict`: the test expects no error."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import lstm_fused
from lstm_fused import integrations, loading, ops, runtime
from lstm_fused.testing import models, oracle, parity, tolerance


class Tagger(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.lstm = lstm_fused.LSTM(
            4, hidden, 2, bias=False, batch_first=True, dropout=0.1, bidirectional=True, proj_size=2
        )
        self.gru = lstm_fused.GRU(4, hidden, num_layers=1, device="cpu", dtype=torch.float32)
        self.rnn = lstm_fused.RNN(4, hidden, nonlinearity="relu", device=torch.device("cpu"))
        self.cell = lstm_fused.LSTMCell(4, hidden, bias=True)

    def forward(self, x: Tensor, lengths: list[int]) -> Tensor:
        y, (h_n, c_n) = self.lstm(x, lengths=lengths)
        again, _ = self.lstm(y, (h_n, c_n), lengths=torch.tensor(lengths))
        z, h = self.gru(again)
        _, h = self.rnn(z, h)
        one, _ = self.cell(x[0], None)
        return z + h + one


def quantized(tagger: Tagger) -> Tagger:
    lstm_fused.quantize_(tagger.gru, torch.bfloat16)
    again: Tagger = lstm_fused.dequantize_(lstm_fused.quantize_(tagger))
    dtype: torch.dtype | None = tagger.lstm.weights_dtype
    print(dtype)
    return again


class Named(lstm_fused.GRU):
    name = "named"


def packed(module: lstm_fused.LSTM, gru: Named) -> PackedSequence:
    sequence = pack_sequence([torch.ones(3, 4)])
    y, (h_n, c_n) = module(sequence)
    total: Tensor = h_n + c_n
    z, h = gru(module(y, (total, total))[0], total)
    both: tuple[PackedSequence, Tensor] = gru.forward(z, h)
    return both[0]


def options(lstm: lstm_fused.LSTM, gru: lstm_fused.GRU, x: Tensor, mask: Tensor) -> Tensor:
    reset = torch.zeros(1, 8), torch.zeros(1, 8)
    y, (h_n, c_n), cells = lstm(x, resets=mask, reset_state=reset, return_cell_states=True)
    z, (h_n, c_n) = lstm(x[0], cu_seqlens=torch.tensor([0, 4]), max_seqlen=4)
    packed, _, packed_cells = lstm(pack_sequence([x]), return_cell_states=True, resets=mask)
    both: tuple[PackedSequence, PackedSequence] = packed, packed_cells
    gru.checkpoint_every = "auto"
    learned = lstm_fused.LSTM(4, 8, learned_initial_state=True)
    h_n, c_n = lstm_fused.select_state(learned.init_state(3), [0, 2])
    only: Tensor = lstm_fused.where_state(mask, lstm_fused.detach_state(h_n), gru.init_state(3))
    h_n = lstm_fused.batch_first_state(only)
    for chunk in lstm_fused.truncated_bptt(learned, x, 5, resets=mask):
        print(chunk[0])
    print(
        lstm_fused.explain(learned, x, resets=mask), lstm_fused.gradient_flow(gru, x, resets=mask)
    )
    w, h = gru(x, resets=None, checkpoint_every=16)
    data, _, more = ops.layer(x, None, (), [x], cell_states=True, save_every=2)
    return y + cells + h_n + c_n + z + both[0].data + w + h + data + more


def other_cells(x: Tensor) -> Tensor:
    lstm = lstm_fused.RegularizedLSTM(
        4, 8, 2, proj_size=4, zoneout_h=0.1, clip=3.0, forget_bias=1.0, learned_initial_state=True
    )
    y, (h_n, c_n), cells = lstm(x, lengths=[3], return_cell_states=True)
    gru = lstm_fused.RegularizedGRU(4, 8, recurrent_dropout=0.1, zoneout=0.2)
    z, h = gru(x)
    peephole = lstm_fused.PeepholeLSTM(4, 8, bidirectional=True, proj_size=2)
    packed: PackedSequence = peephole(pack_sequence([x]), peephole.init_state(1))[0]
    coupled: tuple[Tensor, tuple[Tensor, Tensor]] = lstm_fused.CoupledLSTM(4, 8)(x)
    norm, _ = lstm_fused.LayerNormLSTM(4, 8, carries_normalized=True)(x)
    single: list[Tensor] = [
        lstm_fused.LayerNormGRU(4, 8, eps=1e-3)(x)[1],
        lstm_fused.ResetBeforeGRU(4, 8)(x, resets=None)[1],
        lstm_fused.MGU(4, 8)(x)[1],
        lstm_fused.IndRNN(4, 8, nonlinearity="tanh")(x)[1],
        lstm_fused.MinGRU(4, 8, device="cpu")(x)[1],
        lstm_fused.MinLSTM(4, 8, dtype=torch.float64)(x)[1],
        lstm_fused.SRU(4, 8, rescale=True, highway_bias=-1.0)(x)[1],
        lstm_fused.QRNN(4, 8, window=2)(x)[1],
    ]
    loaded: list[nn.RNNBase] = [
        loading.from_keras(x),
        loading.from_tensorflow(x, x, forget_bias=0.0, projection=x),
        loading.from_onnx(x, "node"),
        loading.from_haste(x),
        loading.from_torchrecurrent(x),
        loading.from_fastrnns(x, batch_first=True),
    ]
    print(loaded, coupled, lstm.clip, packed)
    total: Tensor = y + cells + h_n + c_n + z + h + norm + torch.stack(single)
    return total


def steps(x: Tensor) -> Tensor:
    lstm, gru = lstm_fused.LSTMCell(4, 4), lstm_fused.GRUCell(4, 4, False, "cpu")
    rnn = lstm_fused.RNNCell(4, 4, nonlinearity="relu", dtype=torch.float32)
    state: tuple[Tensor, Tensor] | None = None
    for row in x:
        state = lstm(row, state)
    h: Tensor = gru(x[0])
    return rnn(x[0], rnn.forward(x[0], h))


def model_functions(x: Tensor) -> Tagger:
    model = lstm_fused.replace(Tagger(8))
    same: Tagger = lstm_fused.restore(model, verbose=True)
    explanation = lstm_fused.explain(same.lstm, x)
    for call in explanation.calls:
        reason: str | None = call.reason
        seconds: float = call.seconds
        print(reason, seconds, [layer.plan.kernel for layer in call.layers])
    flow: Tensor = lstm_fused.gradient_flow(nn.GRU(4, 4), x, loss=lambda y: y.sum())
    program: torch.export.ExportedProgram = torch.export.export(model, (x + flow,))
    program.run_decompositions(lstm_fused.decompositions())
    integrations.register()
    stream = lstm_fused.stream(nn.GRU(4, 4), batch=2, threads=1)
    out: Tensor = stream(x[0], out=stream(x[0]))
    stream.reset([0])
    stream.state = stream.state
    address: int = stream.c_step()[0]
    print(lstm_fused.__version__, out, address)
    return model


def layer_functions(x: Tensor, weights: list[Tensor]) -> Tensor:
    y, states = ops.layer(x, None, (), weights, cell="gru", directions=1)
    data, _ = ops.layer(x, torch.tensor([1]), states, weights)
    stepped: Any = ops.step(x, (), weights, "gru")
    print(stepped)
    return y + data


def runtime_functions() -> str:
    runtime.set_isa()
    runtime.set_isa("avx2")
    names: tuple[str, ...] = runtime.available_isas()
    plan = runtime.plan("lstm", torch.float32, 10, 1, 4, 8, 8, 1, training=True, threads=2)
    isas: tuple[str, ...] = runtime.build_info()["isas"]
    last: dict[str, Any] = runtime.last_run("cpu")
    return f"{plan.nanoseconds + plan.threads} {names + isas} {last}"


def judge(model: nn.LSTM, x: Tensor) -> bool:
    exact = oracle.Oracle(oracle.in_float64(model))
    inputs = oracle.map_tensors({"x": x}, torch.clone)
    run = models.ModelRun(model, (x,))
    found = run.results("forward")
    truth = models.tensors_in(exact(inputs["x"]))
    verdicts = parity.compare(found, found, truth, row_of=parity.model_row)
    floor: float = tolerance.allowed("y", torch.float32, 0.0, 1.0)
    return parity.worst(verdicts).ok and parity.max_error(x, x) <= floor
