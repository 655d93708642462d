"""Layers of other libraries as ours: outputs by the libraries themselves, or kept of them."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lstm_fused import cells, loading, nn
from tests.helpers import cell_modules
from tests.helpers.compare_modules import H, I, N, T

np = pytest.importorskip("numpy")  # not needed by `make gpu-check`

KERAS = json.loads((Path(__file__).parents[1] / "data" / "keras_layers.json").read_text())


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    cell_modules.allow_reference(monkeypatch)


def array(*shape):
    return torch.randn(*shape, dtype=torch.float64).numpy()


# Keras.


def keras_layer(case, **more):
    """A stand-in with what from_keras reads of the layer that keras_layers.py described."""
    layer = type(case["class"], (), {})()
    layer.get_weights = lambda: [np.array(w, "float32") for w in case["weights"]]
    if "directions" in case:
        layer.forward_layer, layer.backward_layer = map(keras_layer, case["directions"])
    for name, value in (case | more).items():
        if name.endswith("activation"):
            value = SimpleNamespace(__name__=value)
        setattr(layer, name, value)
    return layer


@pytest.mark.parametrize("case", KERAS["cases"])
def test_keras(case):
    case, x = KERAS["cases"][case], torch.tensor(KERAS["x"])
    module = loading.from_keras(keras_layer(case)).eval()
    torch.testing.assert_close(module(x)[0], torch.tensor(case["output"]), atol=2e-6, rtol=0)


def test_keras_stack():
    first = keras_layer(KERAS["cases"]["LSTM"])
    second = keras_layer(KERAS["cases"]["LSTM"])
    second.get_weights = lambda: [np.ones((3, 12)), *first.get_weights()[1:]]
    module = loading.from_keras([first, second])
    x = torch.tensor(KERAS["x"])
    expected = loading.from_keras(second)(loading.from_keras(first)(x)[0].double())[0]
    torch.testing.assert_close(module(x)[0].double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "name, more, words",
    (
        ("LSTM", {"activation": "relu"}, "activation must be tanh, got relu"),
        ("GRU", {"recurrent_activation": "hard_sigmoid"}, "must be sigmoid, got hard_sigmoid"),
        ("LSTM", {"class": "ConvLSTM1D"}, "from_keras knows LSTM, GRU"),
        ("LSTM", {"go_backwards": True}, "go_backwards=True has no counterpart"),
        ("LSTM", {"get_weights": list}, "has no weights"),
        ("Bidirectional", {"merge_mode": "sum"}, "merge_mode must be"),
        ("GRU reset before", {"recurrent_dropout": 0.1}, "has no counterpart"),
        ("SimpleRNN", {"recurrent_dropout": 0.1}, "has no counterpart"),
    ),
)
def test_keras_errors(name, more, words):
    case = KERAS["cases"][name] | {k: v for k, v in more.items() if k == "class"}
    with pytest.raises(ValueError, match=words):
        loading.from_keras(keras_layer(case, **more))


def test_keras_lists():
    lstm, gru = (keras_layer(KERAS["cases"][name]) for name in ("LSTM", "GRU"))
    for layers, words in (([], "at least one"), ([lstm, gru], "of one class")):
        with pytest.raises(ValueError, match=words):
            loading.from_keras(layers)


def norm(width, **more):
    return SimpleNamespace(gamma=array(width), beta=array(width), **more)


def test_tf_addons():
    """By its formula: LN of both products, and the carried c is LN(c)."""
    cell = type("LayerNormLSTMCell", (), {})()
    cell.use_bias, cell.recurrent_dropout = True, 0
    cell.activation = SimpleNamespace(__name__="tanh")
    cell.recurrent_activation = SimpleNamespace(__name__="sigmoid")
    cell.kernel, cell.recurrent_kernel, cell.bias = array(I, 4 * H), array(H, 4 * H), array(4 * H)
    cell.kernel_norm, cell.recurrent_norm = norm(4 * H, epsilon=1e-3), norm(4 * H, epsilon=1e-3)
    cell.state_norm = norm(H, epsilon=1e-3)
    rnn = type("RNN", (), {})()
    rnn.cell, rnn.get_weights = cell, lambda: [cell.kernel, cell.recurrent_kernel, cell.bias]
    module = loading.from_keras(rnn)
    x = torch.randn(N, T, I, dtype=torch.float64)

    def normalized(v, n):
        v = (v - v.mean(1, keepdim=True)) / (v.var(1, unbiased=False, keepdim=True) + 1e-3).sqrt()
        return v * torch.tensor(n.gamma) + torch.tensor(n.beta)

    h = c = torch.zeros(N, H, dtype=torch.float64)
    for step in x.unbind(1):
        z = normalized(step @ torch.tensor(cell.kernel), cell.kernel_norm)
        z = z + normalized(h @ torch.tensor(cell.recurrent_kernel), cell.recurrent_norm)
        i, f, g, o = (z + torch.tensor(cell.bias)).chunk(4, 1)
        c = normalized(f.sigmoid() * c + i.sigmoid() * g.tanh(), cell.state_norm)
        h = o.sigmoid() * c.tanh()
    torch.testing.assert_close(module(x)[1], (h[None], c[None]))


# TensorFlow 1, by the formula in LSTMCell's source.


@pytest.mark.parametrize("peepholes", (False, True))
@pytest.mark.parametrize("projection", (False, True))
@pytest.mark.parametrize("clips", (False, True))
def test_tensorflow(clips, projection, peepholes):
    R = 3 if projection else H
    kernel, bias, w_hr = array(I + R, 4 * H), array(4 * H), array(H, R) if projection else None
    diagonals = [array(H) for _ in range(3)] if peepholes else None
    cell_clip, proj_clip = (0.5, 0.2 if projection else None) if clips else (None, None)
    module = loading.from_tensorflow(
        kernel,
        bias,
        forget_bias=0.7,
        peepholes=diagonals,
        projection=w_hr,
        cell_clip=cell_clip,
        proj_clip=proj_clip,
    )
    x = torch.randn(N, T, I, dtype=torch.float64)
    m, c = x.new_zeros(N, R), x.new_zeros(N, H)
    w_i, w_f, w_o = torch.tensor(np.array(diagonals)) if peepholes else (0, 0, 0)
    for step in x.unbind(1):
        matrix = torch.cat((step, m), 1) @ torch.tensor(kernel) + torch.tensor(bias)
        i, j, f, o = matrix.chunk(4, 1)
        c = (f + 0.7 + w_f * c).sigmoid() * c + (i + w_i * c).sigmoid() * j.tanh()
        c = c.clamp(-0.5, 0.5) if clips else c
        m = (o + w_o * c).sigmoid() * c.tanh()
        if projection:
            m = m @ torch.tensor(w_hr)
            m = m.clamp(-0.2, 0.2) if clips else m
    torch.testing.assert_close(module(x)[1], (m[None], c[None]))


def test_tensorflow_errors():
    with pytest.raises(ValueError, match="kernel must be"):
        loading.from_tensorflow(array(I + H, 4 * H), array(3 * H))


# ONNX, by onnxruntime.


def onnx_model(kind, directions=1, bias=True, peepholes=False, count=1, **attributes):
    """A model with nodes rnn0, rnn1, ...; its input X (T, N, I), or (N, T, I) with layout=1."""
    onnx = pytest.importorskip("onnx")
    G = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    weights = {"W": (directions, G * H, I), "R": (directions, G * H, H)}
    names = ["X", "W", "R", "B" if bias else "", "", "", "", "P" if peepholes else ""]
    weights |= {"B": (directions, 2 * G * H)} if bias else {}
    weights |= {"P": (directions, 3 * H)} if peepholes else {}
    while not names[-1]:
        names.pop()
    direction = "bidirectional" if directions == 2 else attributes.pop("direction", "forward")
    nodes = [
        onnx.helper.make_node(
            *(kind, names, [f"Y{k}"]),
            name=f"rnn{k}",
            hidden_size=H,
            direction=direction,
            **attributes,
        )
        for k in range(count)
    ]
    initializers = [
        onnx.numpy_helper.from_array(array(*shape).astype("float32"), name)
        for name, shape in weights.items()
    ]
    shape = [N, T, I] if attributes.get("layout") else [T, N, I]
    values = [
        onnx.helper.make_tensor_value_info("X", onnx.TensorProto.FLOAT, shape),
        onnx.helper.make_tensor_value_info("Y0", onnx.TensorProto.FLOAT, None),
    ]
    graph = onnx.helper.make_graph(nodes, "g", values[:1], values[1:], initializers)
    opset = onnx.helper.make_opsetid("", 14)
    return onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)


@pytest.mark.parametrize(
    "kind, options, expected",
    (
        ("LSTM", {"directions": 2}, nn.LSTM),
        ("LSTM", {"bias": False}, nn.LSTM),
        ("LSTM", {"peepholes": True, "directions": 2}, cells.PeepholeLSTM),
        ("LSTM", {"clip": 0.5, "peepholes": True}, cells.RegularizedLSTM),
        ("LSTM", {"input_forget": 1}, cells.CoupledLSTM),
        ("GRU", {"directions": 2}, cells.ResetBeforeGRU),
        ("GRU", {"linear_before_reset": 1}, nn.GRU),
        ("GRU", {"linear_before_reset": 1, "clip": 0.4}, cells.RegularizedGRU),
        ("RNN", {"directions": 2}, nn.RNN),
        ("RNN", {"activations": ["Relu"]}, nn.RNN),
    ),
)
def test_onnx(kind, options, expected):
    runtime = pytest.importorskip("onnxruntime")
    model = onnx_model(kind, **options)
    module = loading.from_onnx(model)
    assert type(module) is expected
    x = torch.randn(T, N, I)
    session = runtime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (y,) = session.run(["Y0"], {"X": x.numpy()})  # (T, D, N, H)
    expected = torch.tensor(y).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module(x)[0], expected, atol=2e-6, rtol=0)


def test_onnx_by_name_and_layout():
    model = onnx_model("LSTM", count=2, layout=1)
    assert loading.from_onnx(model, "rnn1").batch_first
    with pytest.raises(ValueError, match="must have one LSTM, GRU or RNN node, got 2"):
        loading.from_onnx(model)
    with pytest.raises(ValueError, match="of the name 'rnn', got 0"):
        loading.from_onnx(model, "rnn")


@pytest.mark.parametrize(
    "kind, options, words",
    (
        ("LSTM", {"direction": "reverse"}, "direction reverse"),
        ("LSTM", {"activations": ["Relu", "Tanh", "Tanh"]}, "activations must be"),
        ("LSTM", {"activation_alpha": [0.1]}, "activation_alpha have no counterpart"),
        ("LSTM", {"input_forget": 1, "clip": 1.0}, "input_forget with clip"),
        ("GRU", {"clip": 1.0}, "clip with linear_before_reset=0"),
        ("RNN", {"activations": ["Affine"]}, "must have tanh or relu"),
    ),
)
def test_onnx_errors(kind, options, words):
    with pytest.raises(ValueError, match=words):
        loading.from_onnx(onnx_model(kind, **options))


def test_onnx_weights_are_initializers():
    model = onnx_model("LSTM")
    del model.graph.initializer[0]
    with pytest.raises(ValueError, match="'W' of the node is no initializer"):
        loading.from_onnx(model)


# torch's fastrnns benchmark, by the formula in its LayerNormLSTMCell.


def test_fastrnns():
    cell = torch.nn.Module()
    cell.weight_ih = torch.nn.Parameter(torch.randn(4 * H, I, dtype=torch.float64))
    cell.weight_hh = torch.nn.Parameter(torch.randn(4 * H, H, dtype=torch.float64))
    for name, width in (("i", 4 * H), ("h", 4 * H), ("c", H)):
        layer = torch.nn.LayerNorm(width, dtype=torch.float64)
        for p in layer.parameters():
            torch.nn.init.normal_(p)
        setattr(cell, f"layernorm_{name}", layer)
    x = torch.randn(T, N, I, dtype=torch.float64)
    h, c = x.new_zeros(N, H), x.new_zeros(N, H)
    for step in x:
        gates = cell.layernorm_i(step @ cell.weight_ih.t())
        i, f, g, o = (gates + cell.layernorm_h(h @ cell.weight_hh.t())).chunk(4, 1)
        c = cell.layernorm_c(f.sigmoid() * c + i.sigmoid() * g.tanh())
        h = o.sigmoid() * c.tanh()
    torch.testing.assert_close(loading.from_fastrnns(cell)(x)[1], (h[None], c[None]))
