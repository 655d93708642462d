"""quantize_ and dequantize_: what becomes of a module's weights, and what stays as it was."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import lstm_fused
from lstm_fused import panels, runtime
from lstm_fused.fallback import Fused
from tests.helpers.compare_modules import states_of
from tests.helpers.distributed import one_process
from tests.helpers.oracle import CELLS, has_cell_state
from tests.helpers.quantized import FORMATS, groups_of, has_gates_in_another_order, module

pytestmark = pytest.mark.usefixtures("real_device")

# How far results may be from those of the same weights in float32: int8 rounds activations as well.
CLOSE = {
    torch.int8: {"rtol": 0, "atol": 1e-2},
    torch.bfloat16: {"rtol": 1e-5, "atol": 1e-6},
}
KINDS = {
    "two layers, both directions": {"num_layers": 2, "bidirectional": True},
    "no bias": {"bias": False},
    "projection": {"proj_size": 7, "num_layers": 2},
    "learned state": {"learned_initial_state": True},
    "step": {"step": True},
    "step, no bias": {"step": True, "bias": False},
}


CASES = [
    pytest.param(cell, options, id=f"{cell}-{name}")
    for cell in CELLS
    for name, options in KINDS.items()
    if "proj_size" not in options or has_cell_state(cell)
]
every_kind = pytest.mark.parametrize(("cell", "options"), CASES)
every_format = pytest.mark.parametrize("dtype", FORMATS, ids=str)


def input_of(q):
    return torch.randn(*(() if isinstance(q, nn.RNNCellBase) else (5,)), 3, q.input_size)


def outputs(q, *args, **options):
    """All tensors of a call, packed data's too."""

    def flat(found):
        if isinstance(found, PackedSequence):
            return [found.data]
        return [found] if isinstance(found, torch.Tensor) else sum(map(flat, found), [])

    return [t.detach() for t in flat(q(*args, **options))]


def cast(dtype, hx):
    return tuple(s.to(dtype) for s in hx) if isinstance(hx, tuple) else hx.to(dtype)


def assert_same(a, b, **options):
    torch.testing.assert_close(a, b, **(options or {"rtol": 0, "atol": 0}))


# The numbers.


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 50])
def test_scales_have_the_least_error(columns):
    w = torch.randn(7, columns) * torch.logspace(-3, 2, 7).unsqueeze(1)
    q, scales = panels.quantized(w)
    assert q.dtype is torch.int8 and int(q.abs().max()) <= 127
    assert scales.dtype is torch.bfloat16 and scales.shape == (7, -(-columns // panels.GROUP))
    for row in range(7):
        for k, group in enumerate(w[row].split(panels.GROUP)):
            first = (group.abs().max() / 127).item()
            candidates = []
            scale = torch.tensor(first).to(torch.bfloat16)
            scale = scale if float(scale) >= first else torch.nextafter(scale, scale * 2)
            for _ in range(32):
                values = (group / scale).round() * scale.float()
                candidates.append((values - group).square().sum().item())
                scale = torch.nextafter(scale, scale * 2)
            found = q[row].split(panels.GROUP)[k].float() * scales[row, k].float()
            error = (found - group).square().sum().item()
            assert error <= min(candidates) * (1 + 1e-5)


def test_rows_of_zeros_and_of_tiny_numbers():
    w = torch.stack((torch.zeros(20), torch.full((20,), 1e-41), torch.full((20,), 3e38)))
    found = panels.dequantized(*panels.quantized(w))
    assert torch.equal(found[0], w[0])
    assert found.isfinite().all()
    assert_same(found[2], w[2], rtol=1e-2, atol=0)


@every_format
@pytest.mark.parametrize("gates", [(0,), (0, 1, 2, 3), (2, 0, 1)], ids=str)
@pytest.mark.parametrize(("units", "columns"), [(1, 1), (16, 16), (17, 5), (33, 50)])
def test_panels(dtype, gates, units, columns):
    """Panels hold every number once, and give the weight back."""
    form = panels.Form(units, columns, gates)
    w = torch.randint(1, 120, form.shape).to(dtype)
    made = panels.packed(w, form)
    assert made.is_contiguous() and made.shape[-2] == 16
    assert torch.equal(panels.unpacked(made, form), w)
    if dtype is torch.bfloat16:
        assert made.count_nonzero() == w.numel()
    depth = made.shape[-1]
    at = made[(units - 1) // 16, (columns - 1) // depth, -1, (units - 1) % 16]
    last = at[(columns - 1) % depth].item()
    if dtype is torch.int8:
        last -= 128  # as kernels multiply bytes
    assert last == w.view(len(gates), units, columns)[gates[-1], -1, -1].item()


def test_cells_differ_in_the_order_of_gates():
    """Or test_panels and the tests of every cell would prove less."""
    assert {has_gates_in_another_order(cell) for cell in CELLS} == {True, False}


# Modules.


@every_format
@every_kind
def test_agrees_with_the_same_weights_in_float32(cell, options, dtype):
    q = module(cell, 13, 21, dtype, **options)
    plain = lstm_fused.dequantize_(copy.deepcopy(q))
    for name, w in plain.named_parameters():
        assert torch.equal(w, getattr(q, name)), name
        assert w.requires_grad
    x = input_of(q)
    assert_same(outputs(q, x), outputs(plain, x), **CLOSE[dtype])


@every_format
@every_kind
def test_weights_are_close_to_what_they_were(cell, options, dtype):
    kind, more = CELLS[cell]
    options = dict(options)
    kind += "Cell" * options.pop("step", False)
    plain = getattr(lstm_fused, kind)(13, 21, **more, **options)
    q = lstm_fused.quantize_(copy.deepcopy(plain), dtype)
    for name, w in plain.named_parameters():
        found = getattr(q, name)
        assert found.dtype is torch.float32 and found.shape == w.shape
        if "weight" not in name:
            assert torch.equal(found, w)
        elif dtype is torch.bfloat16:
            assert torch.equal(found, w.to(dtype).float())
        else:
            step = w.detach().abs().max() / 127
            assert float((found - w).abs().max()) <= 0.6 * step
            assert not torch.equal(found, w)


@every_format
@every_kind
def test_state_dict(cell, options, dtype):
    """It has torch's names and shapes, and loads strictly where the weights differ."""
    q, other = (module(cell, 13, 21, dtype, **options) for _ in range(2))
    plain = lstm_fused.dequantize_(copy.deepcopy(q)).state_dict()
    state = q.state_dict()
    names = [name for name in state if not name.endswith("_scale")]
    assert names == list(plain)
    for name in names:
        assert state[name].shape == plain[name].shape
        weight = name.startswith("weight")
        assert state[name].dtype is (dtype if weight else torch.float32)
        scales = state.get(name + "_scale")
        assert (scales is not None) == (weight and dtype is torch.int8)
        assert torch.equal(panels.dequantized(state[name], scales), plain[name])
    x = input_of(q)
    expected = outputs(q, x)
    assert not torch.equal(outputs(other, x)[0], expected[0])
    other.load_state_dict(state)  # also: what changes in place counts in the next call
    assert_same(outputs(other, x), expected)
    written = io.BytesIO()
    torch.save(state, written)
    written.seek(0)
    third = module(cell, 13, 21, dtype, **options)
    third.load_state_dict(torch.load(written, weights_only=True), assign=True)
    assert_same(outputs(third, x), expected)


def test_state_dict_is_a_quarter_of_the_size():
    plain = lstm_fused.LSTM(256, 256)

    def size(state):
        return sum(t.numel() * t.element_size() for t in state.values())

    whole = size(plain.state_dict())
    assert size(lstm_fused.quantize_(copy.deepcopy(plain)).state_dict()) < 0.29 * whole
    half = lstm_fused.quantize_(copy.deepcopy(plain), torch.bfloat16)
    assert size(half.state_dict()) < 0.51 * whole


def test_buffers_are_the_one_copy_of_the_weights():
    q = module("lstm", 256, 256, torch.int8)
    held = sum(t.numel() * t.element_size() for t in q.buffers())
    assert held == sum(t.numel() * t.element_size() for t in q.state_dict().values())
    assert not list(q.parameters())


def changed(state, **changes):
    return {name: t for name, t in (state | changes).items() if t is not None}


@pytest.mark.parametrize(
    ("dtype", "change", "message"),
    [
        (torch.int8, {"weight_hh_l0": None}, 'Missing key.*"rnn.weight_hh_l0"'),
        (torch.int8, {"weight_hh_l0_scale": None}, 'Missing key.*"rnn.weight_hh_l0_scale"'),
        (torch.int8, {"bias_hh_l0": None}, 'Missing key.*"rnn.bias_hh_l0"'),
        (torch.int8, {"weight_xx": torch.ones(1)}, 'Unexpected key.*"rnn.weight_xx"'),
        (torch.bfloat16, {"weight_hh_l0_scale": torch.ones(1)}, "Unexpected key"),
        (
            torch.int8,
            {"weight_ih_l0": torch.ones(84, 13)},
            r"rnn.weight_ih_l0 must be torch.int8 \(84, 13\), got torch.float32 \(84, 13\).*before",
        ),
        (
            torch.bfloat16,
            {"weight_ih_l0": torch.ones(84, 13, dtype=torch.int8)},
            "rnn.weight_ih_l0 must be torch.bfloat16",
        ),
        (
            torch.int8,
            {"weight_ih_l0": torch.ones(84, 14, dtype=torch.int8)},
            r"got torch.int8 \(84, 14\)",
        ),
        (torch.int8, {"bias_ih_l0": torch.ones(1)}, "rnn.bias_ih_l0 must be torch.float32"),
    ],
)
def test_a_state_dict_that_does_not_fit(dtype, change, message):
    model = nn.ModuleDict({"rnn": module("lstm", 13, 21, dtype)})
    state = changed(model.rnn.state_dict(), **change)
    state = {f"rnn.{name}": t for name, t in state.items()}
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state)


def test_a_part_of_a_state_dict():
    q = module("lstm", 13, 21, torch.int8)
    kept = q.weight_hh_l0
    state = {"bias_ih_l0": torch.ones(84), "other": torch.ones(1)}
    found = q.load_state_dict(state, strict=False)
    assert found.unexpected_keys == ["other"]
    assert set(found.missing_keys) == q.state_dict().keys() - state.keys()
    assert torch.equal(q.bias_ih_l0, torch.ones(84)) and torch.equal(q.weight_hh_l0, kept)


def test_a_float_module_refuses_an_int8_state_dict():
    with pytest.raises(RuntimeError, match='Unexpected key.*"weight_ih_l0_scale"'):
        lstm_fused.LSTM(13, 21).load_state_dict(module("lstm", 13, 21, torch.int8).state_dict())


@every_format
def test_a_model_on_meta_takes_the_weights_of_a_file(dtype):
    q = module("lstm", 13, 21, dtype, num_layers=2)
    with torch.device("meta"):
        made = lstm_fused.quantize_(lstm_fused.LSTM(13, 21, num_layers=2), dtype)
    assert all(t.is_meta for t in made.state_dict().values())
    moved = copy.deepcopy(made).to_empty(device=torch.get_default_device())
    made.load_state_dict(q.state_dict(), assign=True)
    moved.load_state_dict(q.state_dict())
    x = input_of(q)
    for other in (made, moved):
        assert_same(outputs(other, x), outputs(q, x))


@every_format
@every_kind
def test_copies(cell, options, dtype):
    q = module(cell, 13, 21, dtype, **options)
    x = input_of(q)
    expected = outputs(q, x)
    written = io.BytesIO()
    torch.save(q, written)
    written.seek(0)
    for other in (
        copy.deepcopy(q),
        pickle.loads(pickle.dumps(q)),
        torch.load(written, weights_only=False),
    ):
        assert type(other) is type(q) and repr(other) == repr(q)
        assert_same(outputs(other, x), expected)
        other.load_state_dict(module(cell, 13, 21, dtype, **options).state_dict())
        assert not torch.equal(outputs(other, x)[0], expected[0])
    assert_same(outputs(q, x), expected)


@every_format
def test_conversions_of_the_model_leave_the_weights(dtype):
    """half() and double() as well as channels_last, which would lay out anew what has 4 axes."""
    q = module("gru", 13, 21, dtype, learned_initial_state=True)
    x = input_of(q)
    expected, before = outputs(q, x), dict(q.named_buffers())
    model = nn.ModuleList([nn.Linear(3, 3), q])
    for convert in (
        model.half,
        model.double,
        lambda: model.to(torch.bfloat16),
        lambda: model.to(memory_format=torch.channels_last),
        model.float,
    ):
        convert()
        for name, t in q.named_buffers():
            assert t.dtype is before[name].dtype and t.is_contiguous()
            assert torch.equal(t, before[name])
        assert_same(outputs(q, x), expected)
    assert model[0].weight.dtype is torch.float32


def test_share_memory():
    q = module("lstm", 13, 21, torch.int8).cpu()
    assert all(t.is_shared() for t in q.share_memory().buffers())


@every_format
def test_moved_to_another_device_and_back(dtype):
    q = module("lstm", 13, 21, dtype)
    x = input_of(q)
    expected = outputs(q, x)
    assert_same(outputs(q.cpu().to(x.device), x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y, _ = q.to("meta")(x.to("meta", torch.float16))
    assert y.is_meta and y.shape == expected[0].shape and y.dtype is torch.float16


# Inputs.


@every_format
@pytest.mark.parametrize("of_input", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@every_kind
def test_dtypes_of_inputs(cell, options, dtype, of_input):
    """Computed in float32: the results are those of the input as float32, rounded."""
    q = module(cell, 13, 21, dtype, **options)
    x = input_of(q).to(of_input)
    expected = [t.to(of_input) for t in outputs(q, x.float())]
    assert_same(outputs(q, x), expected)
    states = outputs(q, x) if options.get("step") else outputs(q, x)[1:]
    for given in (states, [s.float() for s in states]):
        hx = tuple(given) if len(given) > 1 else given[0]
        expected = outputs(q, x.float(), cast(torch.float32, hx))
        assert_same(outputs(q, x, hx), [t.to(of_input) for t in expected])
    assert_same(outputs(q, x.float(), hx), expected)


@every_format
def test_dtypes_in_every_form(dtype):
    q = module("lstm", 13, 21, dtype, learned_initial_state=True)
    x = torch.randn(5, 3, 13)
    state = tuple(torch.randn(1, 21).half() for _ in range(2))
    resets = torch.rand(5, 3) < 0.5
    calls = [
        ((x,), {"resets": resets, "reset_state": state}),
        ((x,), {"lengths": [3, 0, 5], "return_cell_states": True}),
        ((x.flatten(0, 1),), {"cu_seqlens": torch.tensor([0, 4, 15])}),
        ((pack_sequence([x[:, 0], x[:3, 1]]),), {}),
        ((x[:, 0],), {}),
    ]
    for (given,), options in calls:
        narrow = given.to(torch.bfloat16)
        wide = {
            k: tuple(s.float() for s in v) if k == "reset_state" else v for k, v in options.items()
        }
        expected = [t.to(torch.bfloat16) for t in outputs(q, narrow.to(torch.float32), **wide)]
        assert_same(outputs(q, narrow, **options), expected)


@every_format
@every_kind
def test_autocast_does_not_matter(cell, options, dtype):
    q = module(cell, 13, 21, dtype, **options)
    x = input_of(q)
    expected = outputs(q, x)
    hx = q(x) if options.get("step") else q(x)[1]
    narrow, narrow_hx = x.to(torch.bfloat16), cast(torch.bfloat16, hx)
    of_narrow = outputs(q, narrow.float())
    from_narrow = outputs(q, x, cast(torch.float32, narrow_hx))
    with torch.autocast(x.device.type, torch.bfloat16):
        assert_same(outputs(q, x), expected)
        assert_same(outputs(q, narrow), [t.to(torch.bfloat16) for t in of_narrow])
        assert_same(outputs(q, x, narrow_hx), from_narrow)


def test_errors_of_inputs_are_the_float_modules():
    q, plain = module("lstm", 13, 21, torch.int8), lstm_fused.LSTM(13, 21)
    for args in (
        (torch.randn(5, 3, 12),),
        (torch.randn(5),),
        (torch.randint(3, (5, 3, 13)),),
        (torch.randn(0, 3, 13),),
        (torch.randn(5, 3, 13), torch.randn(1, 3, 21)),
        (torch.randn(5, 3, 13), (torch.randn(1, 3, 20), torch.randn(1, 3, 21))),
    ):
        with pytest.raises(Exception) as expected:
            plain(*args)
        with pytest.raises(type(expected.value)) as found:
            q(*args)
        assert str(found.value) == str(expected.value)


@every_format
@every_kind
def test_gradients_raise_in_backward(cell, options, dtype):
    q = module(cell, 13, 21, dtype, **options)
    plain = input_of(q)
    x = plain.clone().requires_grad_()
    assert_same(outputs(q, x), outputs(q, plain))
    found = q(x)
    with pytest.raises(RuntimeError, match="for inference.*dequantize_"):
        states_of(found)[0].sum().backward()
    y = states_of(q(plain, found if options.get("step") else found[1]))[0]
    with pytest.raises(RuntimeError, match="for inference.*dequantize_"):
        y.sum().backward()
    with torch.inference_mode():
        assert_same(outputs(q, plain), outputs(q, x.detach()))


def test_the_initial_state_is_float32():
    q = module("lstm", 13, 21, torch.int8)
    x = input_of(q)
    hx = q.init_state(3)
    assert all(s.dtype is torch.float32 and not s.any() for s in hx)
    assert_same(outputs(q, x, hx), outputs(q, x))


# Models.


class Own(nn.LSTM):
    """A user's class."""

    def name(self):
        return "own"


class OwnOfOurs(lstm_fused.LSTM):
    """A user's class with a forward."""

    def forward(self, input, hx=None):
        return super().forward(input, hx)[0]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 6, num_layers=2, dropout=0.2)
        self.shared = lstm_fused.LSTM(6, 6, bidirectional=True)
        self.again = nn.ModuleList([nn.Linear(12, 6), self.shared])
        self.own, self.own_of_ours = Own(12, 5), OwnOfOurs(5, 5)
        self.gru, self.rnn = nn.GRU(5, 5), lstm_fused.RNN(5, 5, nonlinearity="relu")
        self.cells = nn.ModuleList([nn.LSTMCell(5, 4), nn.GRUCell(4, 4), nn.RNNCell(4, 3)])

    def forward(self, x):
        x = self.again[0](self.shared(self.lstm(x)[0])[0])
        x = self.own_of_ours(self.own(self.shared(x)[0])[0])
        x = self.rnn(self.gru(x)[0])[0]
        lstm, gru, rnn = self.cells
        return rnn(gru(lstm(x[-1])[0]))


def recurrent(model):
    return [m for m in model.modules() if isinstance(m, (nn.RNNBase, nn.RNNCellBase))]


@every_format
def test_a_model_and_back(dtype):
    model = Model().eval()
    classes, modules = [type(m) for m in recurrent(model)], recurrent(model)
    x = torch.randn(5, 3, 4)
    expected = model(x)
    assert lstm_fused.quantize_(model, dtype) is model
    assert recurrent(model) == modules
    for m, cls in zip(recurrent(model), classes, strict=True):
        assert m.weights_dtype is dtype
        kind = cls.__name__ if cls in (Own, OwnOfOurs) else "Quantized" + cls.__name__
        assert type(m).__name__ == kind and isinstance(m, Fused)
        assert isinstance(m, cls) or cls.__module__.startswith("torch")
        assert isinstance(m, (nn.RNNBase, nn.RNNCellBase))
    assert model.own.name() == "own"
    assert "weights=" in repr(model.own)
    found = model(x)
    assert_same(found, expected, rtol=0, atol=3e-2)
    again = pickle.loads(pickle.dumps(model))
    assert_same(again(x), found)
    lstm_fused.quantize_(model, dtype)  # once more: nothing to do
    assert_same(model(x), found)
    lstm_fused.dequantize_(model)
    assert all(isinstance(m, Fused) and m.weights_dtype is None for m in recurrent(model))
    assert type(model.own_of_ours) is OwnOfOurs
    assert_same(model(x), found, rtol=0, atol=2e-2)
    again = lstm_fused.quantize_(copy.deepcopy(model), dtype)
    with pytest.warns(UserWarning, match="OwnOfOurs, which is derived from lstm_fused's own"):
        lstm_fused.restore(again)
    assert type(again.lstm) is nn.LSTM and type(again.cells[2]) is nn.RNNCell
    assert type(again.own) is Own and type(again.own_of_ours).__mro__[2] is OwnOfOurs
    assert_same(again(x), found, rtol=0, atol=2e-2)
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_other_modules_and_buffers_of_a_user_stay():
    q = Own(13, 21)
    q.register_buffer("mean", torch.ones(3, dtype=torch.float64))
    q.register_parameter("gain", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    lstm_fused.quantize_(q)
    assert {"mean", "gain"} < set(q.state_dict())
    lstm_fused.dequantize_(q)
    assert q.mean.dtype is q.gain.dtype is torch.float64
    assert {"mean", "gain", "weight_ih_l0"} < set(q.state_dict())


def test_a_shared_weight_is_copied():
    first, second = lstm_fused.LSTM(6, 6), lstm_fused.LSTM(6, 6)
    second.weight_hh_l0 = first.weight_hh_l0
    kept = first.weight_hh_l0.detach().clone()
    lstm_fused.quantize_(first)
    assert torch.equal(second.weight_hh_l0, kept)
    lstm_fused.quantize_(second)
    assert torch.equal(second.weight_hh_l0, first.weight_hh_l0)


@pytest.mark.parametrize("of_weights", [torch.float64, torch.float16], ids=str)
def test_a_model_in_another_dtype(of_weights):
    """Weights are rounded once; everything else becomes float32."""
    plain = lstm_fused.LSTM(13, 21, dtype=of_weights, learned_initial_state=True)
    with torch.no_grad():
        plain.initial_h.normal_()
    q = lstm_fused.quantize_(copy.deepcopy(plain), torch.bfloat16)
    assert torch.equal(q.weight_ih_l0, plain.weight_ih_l0.to(torch.bfloat16).float())
    x = torch.randn(5, 3, 13).to(of_weights)
    found = outputs(q, x)
    assert found[0].dtype is of_weights
    assert_same(found, outputs(plain, x), rtol=0, atol=2e-2)
    assert {p.dtype for p in lstm_fused.dequantize_(q).parameters()} == {torch.float32}
    outputs(q, x.float())


def parametrized(layer):
    return parametrizations.weight_norm(layer, "weight_hh_l0")


def pruned(layer):
    return prune.random_unstructured(layer, "weight_hh_l0", 0.5)


class OwnForward(nn.LSTM):
    def forward(self, input, hx=None):
        return super().forward(input, hx)


def of_a_class_with_a_forward(layer):
    return OwnForward(6, 6)


def without_input(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lstm_fused.LSTMCell(0, 6)


@pytest.mark.parametrize("change", [parametrized, pruned, of_a_class_with_a_forward, without_input])
def test_left_alone(change):
    model = nn.ModuleList([change(lstm_fused.LSTM(6, 6)), lstm_fused.GRU(6, 6)])
    before = model[0].state_dict().keys()
    with pytest.warns(UserWarning, match="quantize_ left alone: 0, a") as caught:
        lstm_fused.quantize_(model)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert getattr(model[0], "weights_dtype", None) is None
    assert model[0].state_dict().keys() == before
    assert model[1].weights_dtype is torch.int8


def test_errors():
    q = module("lstm", 13, 21, torch.int8)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module"):
        lstm_fused.quantize_({})
    with pytest.raises(TypeError, match="model must be a torch.nn.Module"):
        lstm_fused.dequantize_({})
    with pytest.raises(ValueError, match="dtype must be torch.int8 or torch.bfloat16"):
        lstm_fused.quantize_(lstm_fused.LSTM(3, 3), torch.float16)
    with pytest.raises(ValueError, match="the model has torch.int8 weights already"):
        lstm_fused.quantize_(q, torch.bfloat16)
    with pytest.raises(AttributeError, match="weight_ih_l0 is quantized and cannot be assigned"):
        q.weight_ih_l0 = nn.Parameter(torch.ones(84, 13))
    with pytest.raises(AttributeError, match="nothing"):
        q.nothing  # noqa: B018
    with pytest.raises(RuntimeError, match="dequantize_"):
        q.reset_parameters()
    with pytest.raises(RuntimeError, match="torch.jit.script.*dequantize_"):
        torch.jit.script(q)
    with pytest.raises(TypeError, match="made by lstm_fused.quantize_"):
        type(q)(3, 3)


def test_nothing_changes_if_a_weight_is_not_finite():
    model = nn.ModuleDict({"a": lstm_fused.LSTM(3, 3), "b": lstm_fused.GRU(3, 3)})
    with torch.no_grad():
        model.b.weight_hh_l0[1, 1] = float("inf")
    with pytest.raises(ValueError, match="weight_hh_l0 of b has values that are not finite"):
        lstm_fused.quantize_(model)
    assert model.a.weights_dtype is model.b.weights_dtype is None


# Other functions of lstm_fused and torch.


@every_format
@pytest.mark.parametrize("of_input", [torch.float32, torch.float16], ids=str)
def test_explain(dtype, of_input):
    """It names the kernel that then runs, whatever the dtype of the input."""
    name = str(dtype).removeprefix("torch.")
    for options in ({"num_layers": 2, "learned_initial_state": True}, {"step": True}):
        q = module("lstm", 13, 21, dtype, **options)
        x = input_of(q).to(of_input)
        (call,) = lstm_fused.explain(q, x).calls
        assert call.reason is None and f"weights={name}" in str(call)
        assert len(call.layers) == options.get("num_layers", 1)
        for layer in call.layers:
            assert layer.plan.dtype == "float32" and not layer.training
        if x.is_cpu:
            assert {layer.plan.kernel for layer in call.layers} == {name}
            q(x)
            assert runtime.last_run()["kernel"] == name


def test_gradient_flow_is_that_of_the_dequantized_weights():
    q = module("lstm", 13, 21, torch.int8, num_layers=2)
    plain = lstm_fused.dequantize_(copy.deepcopy(q))
    x = input_of(q)
    assert_same(lstm_fused.gradient_flow(q, x), lstm_fused.gradient_flow(plain, x))


def test_a_sequence_by_parts():
    q, x = module("lstm", 13, 21, torch.int8), torch.randn(11, 3, 13)
    whole, end = q(x)
    *_, (_, state) = parts = list(lstm_fused.truncated_bptt(q, x, 4))
    assert_same(torch.cat([y for y, _ in parts]), whole)
    assert_same(state, end)


class Tagger(nn.Module):
    """A quantized layer below one that trains."""

    def __init__(self):
        super().__init__()
        self.rnn = lstm_fused.quantize_(nn.LSTM(13, 21))
        self.head = nn.Linear(21, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


@pytest.mark.parametrize("wrap", ["DistributedDataParallel", "fully_shard"])
def test_distributed(wrap):
    from torch.distributed.fsdp import fully_shard

    with one_process(), torch.device("cpu"):
        model, x = Tagger(), torch.randn(5, 3, 13)
        expected = model(x)
        wrapped = (
            nn.parallel.DistributedDataParallel(model)
            if wrap == "DistributedDataParallel"
            else fully_shard(model)
        )
        found = wrapped(x)
        assert_same(found, expected)
        found.sum().backward()
        assert model.head.weight.grad is not None


def test_classes_made_by_torch_distributed():
    from torch.distributed.fsdp import fully_shard

    with one_process(), torch.device("cpu"):
        model = nn.ModuleList([lstm_fused.LSTM(4, 6), lstm_fused.GRU(4, 6)])
        fully_shard(model[0])
        with pytest.warns(UserWarning, match="quantize_ left alone: 0, a .*torch.distributed"):
            lstm_fused.quantize_(model)
        assert model[0].weights_dtype is None and model[1].weights_dtype is torch.int8


def test_replace_leaves_it():
    q = module("lstm", 13, 21, torch.int8)
    cls = type(q)
    assert type(lstm_fused.replace(q)) is cls


def test_torchs_quantization_leaves_it():
    model = nn.ModuleList(
        [module("lstm", 13, 21, torch.int8).cpu(), nn.LSTM(3, 3), nn.Linear(3, 3)]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM, nn.Linear})
    assert type(found[0]) is type(model[0]) and found[0].weights_dtype is torch.int8
    assert "dynamic" in type(found[2]).__module__


def test_scales_differ_along_a_row():
    """One scale a row would be within every other test's tolerance."""
    for w, scales in groups_of(module("lstm", 64, 64, torch.int8)):
        assert scales.shape[1] == -(-w.shape[1] // panels.GROUP) > 1
        assert bool((scales[:, 0] != scales[:, 1]).any())
