"""ONNX: one node for each layer by both of torch's exporters, run by ONNX Runtime and OpenVINO."""

import logging
import warnings
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import lstm_fused
from tests.helpers.exports import IN_ONNX, LAYER, SIZES, Model, dynamic_shapes, inputs, rows

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

ROWS = rows(LAYER | {"cell": (*LAYER["cell"], *IN_ONNX)})
NODES = {
    **{"lstm": "LSTM", "peephole_lstm": "LSTM", "coupled_lstm": "LSTM"},
    **{"gru": "GRU", "reset_before_gru": "GRU", "rnn_tanh": "RNN", "rnn_relu": "RNN"},
}
RECURRENT = {*NODES.values(), "Loop", "Scan", "If"}
EXPORTERS = ("dynamo", "traced", "program")


@contextmanager
def quiet():
    """Without the exporters' log messages and warnings."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def write(model, arguments, path, exporter, shapes):
    """shapes: {argument: {axis: Dim}}, or None where every axis is fixed."""
    if exporter == "dynamo":
        torch.onnx.export(model, arguments, path, dynamic_shapes=shapes, verbose=False)
    elif exporter == "program":
        program = torch.export.export(model, arguments, dynamic_shapes=shapes)
        torch.onnx.export(program, (), path, verbose=False)
    else:
        axes = {
            name: {axis: dim.__name__ for axis, dim in dims.items()}
            for name, dims in (shapes or {}).items()
        }
        names = list(axes) or None
        torch.onnx.export(
            model, arguments, path, dynamo=False, input_names=names, dynamic_axes=axes or None
        )


def export(model, arguments, path, exporter="dynamo", shapes=None):
    """Write model to path and return what ONNX Runtime gives for arguments, as a function."""
    with quiet():
        write(model.eval(), arguments, path, exporter, shapes)
    return session(path)


def session(path):
    made = onnxruntime.InferenceSession(path)

    def run(*given):
        names = [i.name for i in made.get_inputs()]
        feed = dict(zip(names, (t.numpy() for t in given), strict=True))
        return [torch.from_numpy(t) for t in made.run(None, feed)]

    return run


def count(path):
    """How many there are of each operator that recurs, or stands for steps."""
    operators = Counter(node.op_type for node in onnx.load(path).graph.node)
    return {op: n for op, n in operators.items() if op in RECURRENT}


@pytest.fixture(
    scope="module",
    params=[pytest.param(e, marks=pytest.mark.full if e == "program" else ()) for e in EXPORTERS],
)
def exported(request, tmp_path_factory):
    """The model of all rows: {row: (results, expected), for each of SIZES}, and the file."""
    torch.manual_seed(0)
    model = Model(ROWS)
    path = tmp_path_factory.mktemp(request.param) / "model.onnx"
    run = export(model, inputs(*SIZES[0]), path, request.param, dynamic_shapes())
    found = {name: [] for name in ROWS}
    for T, N in SIZES:
        given = inputs(T, N)
        with torch.no_grad():
            pairs = [model.results(ROWS, list(each(*given))) for each in (run, model)]
        for name in ROWS:
            found[name].append([each[name] for each in pairs])
    return found, path


@pytest.mark.parametrize("name", ROWS)
def test_agrees(exported, name):
    for found, expected in exported[0][name]:
        torch.testing.assert_close(found, expected)


def test_one_node_a_layer(exported):
    expected = Counter()
    for row in ROWS.values():
        expected[NODES[row["cell"]]] += row.get("num_layers", 1)
    assert count(exported[1]) == dict(expected)


def test_openvino_reads_it(tmp_path):
    """Lengths and any T, which an exported program has no operator of torch's for.

    Of one layer: OpenVINO 2026.4 confuses several, torch.nn's too, that share an input.
    """
    openvino = pytest.importorskip("openvino")
    row = {"cell": "lstm", "form": "hx and lengths", "num_layers": 2, "bidirectional": True}
    model, path = Model({"row": row}), tmp_path / "model.onnx"
    export(model, inputs(*SIZES[0]), path, shapes=dynamic_shapes())
    core = openvino.Core()
    precision = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(path), "CPU", precision)
    for T, N in SIZES:
        given = inputs(T, N)
        results = compiled([t.numpy() for t in given])
        found = [torch.from_numpy(results[k]) for k in range(len(results))]
        with torch.no_grad():
            torch.testing.assert_close(found, model(*given))


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_sequence_lens(exporter, tmp_path):
    """lengths= is the node's own input, also without an axis that is dynamic."""
    model = lstm_fused.GRU(3, 5, bidirectional=True)
    x, lengths = torch.randn(4, 3, 3), torch.tensor([4, 0, 2])
    path = tmp_path / "model.onnx"
    run = export(model, (x, None, lengths), path, exporter)
    (node,) = (n for n in onnx.load(path).graph.node if n.op_type == "GRU")
    assert node.input[4]
    attributes = {a.name: a for a in node.attribute}
    assert attributes["direction"].s == b"bidirectional"
    assert attributes["linear_before_reset"].i == 1
    with torch.no_grad():
        torch.testing.assert_close(run(x, lengths), list(model(x, lengths=lengths)))


def test_packed_data(tmp_path):
    """Data and batch sizes of a PackedSequence, as a program that was decomposed has them too."""

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = lstm_fused.LSTM(3, 5, num_layers=2, bidirectional=True)

        def forward(self, data, batch_sizes, h, c):
            rows = nn.utils.rnn.PackedSequence(data, batch_sizes)
            y, ends = self.layer(rows, (h, c))
            return y.data, *ends

    model, path = Packed(), tmp_path / "model.onnx"
    N, S, T = (torch.export.Dim(name, min=2) for name in "NST")
    shapes = {"data": {0: S}, "batch_sizes": {0: T}, "h": {1: N}, "c": {1: N}}

    def arguments(*sizes):
        states = torch.randn(2, 4, sizes[0], 5)
        return torch.randn(sum(sizes), 3), torch.tensor(sizes), *states

    run = export(model, arguments(4, 4, 2, 1), path, shapes=shapes)
    assert count(path) == {"LSTM": 2}
    for sizes in ((4, 4, 2, 1), (3, 1, 1)):
        given = arguments(*sizes)
        with torch.no_grad():
            torch.testing.assert_close(run(*given), list(model(*given)))


@pytest.mark.filterwarnings("ignore:lstm_fused.* ran through torch")
def test_packed_inside_a_traced_model(tmp_path):
    """The exporter on TorchScript finds torch's operator between packing and padding."""

    class Packs(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = lstm_fused.GRU(3, 5, num_layers=2, bidirectional=True)

        def forward(self, x, lengths):
            y, ends = self.layer(nn.utils.rnn.pack_padded_sequence(x, lengths))
            return nn.utils.rnn.pad_packed_sequence(y)[0], ends

    model, path = Packs(), tmp_path / "model.onnx"
    T, N = (torch.export.Dim(name) for name in "TN")
    given = torch.randn(6, 3, 3), torch.tensor([6, 4, 1])
    run = export(model, given, path, "traced", {"x": {0: T, 1: N}, "lengths": {0: N}})
    assert count(path) == {"GRU": 2}
    for x, lengths in (given, (torch.randn(8, 2, 3), torch.tensor([8, 3]))):
        with torch.no_grad():
            torch.testing.assert_close(run(x, lengths), list(model(x, lengths)))


def test_decomposed_lengths(tmp_path):
    """A program whose lengths have become packed data and padding behind it."""
    model = lstm_fused.RNN(3, 5, nonlinearity="relu").eval()
    x, lengths = torch.randn(4, 3, 3), torch.tensor([4, 0, 2])
    program = torch.export.export(model, (x, None, lengths)).run_decompositions()
    path = tmp_path / "model.onnx"
    with quiet():
        torch.onnx.export(program, (), path, verbose=False)
    run = session(path)
    assert count(path) == {"RNN": 1}
    with torch.no_grad():
        torch.testing.assert_close(run(x, lengths), list(model(x, lengths=lengths)))
