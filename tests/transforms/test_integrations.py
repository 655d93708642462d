"""Integrations that look up modules or operators by name: FLOPs, quantization, Opacus, profiler."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lstm_fused
from lstm_fused import runtime
from lstm_fused.fallback import Fused
from tests.helpers.compare_modules import each_option, pair, state_for, states_of


@pytest.mark.parametrize("hx", [True, False])
@each_option
def test_flops(cell, options, hx):
    """As many as torch.nn's layer has, forward and backward."""
    counts = []
    for module in pair(cell=cell, **options):
        x = torch.randn(5, 3, module.input_size, dtype=torch.float64, requires_grad=True)
        x_given = x.transpose(0, 1) if module.batch_first else x
        with FlopCounterMode(display=False) as forward:
            y, ends = module(x_given, state_for(module, 3) if hx else None)
        with FlopCounterMode(display=False) as backward:
            sum(t.sum() for t in (y, *states_of(ends))).backward()
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
    assert counts[1] == counts[0] and min(counts[0]) > 0


def test_flops_of_checkpoints():
    """Backward runs the forward pass again."""
    module, x = lstm_fused.LSTM(3, 5), torch.randn(6, 2, 3)
    counts = {}
    for every in (None, 2):
        with FlopCounterMode(display=False) as forward:
            y, _ = module(x, checkpoint_every=every)
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
        counts[every] = forward.get_total_flops(), backward.get_total_flops()
    assert counts[2][0] == counts[None][0]
    assert counts[2][1] == counts[None][1] + counts[None][0]


def test_flops_of_packed_data_are_those_of_its_rows():
    module = lstm_fused.GRU(3, 5)
    rows = nn.utils.rnn.pack_padded_sequence(torch.randn(4, 2, 3), [4, 1])
    with FlopCounterMode(display=False) as forward:
        module(rows)
    assert forward.get_total_flops() == 2 * 5 * (15 * 3 + 15 * 5)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.gru = nn.LSTM(4, 6, num_layers=2), nn.GRU(6, 6, bidirectional=True)
        self.rnn = nn.RNN(12, 5)
        self.cells = nn.ModuleList([nn.LSTMCell(5, 5), nn.GRUCell(5, 5), nn.RNNCell(5, 5)])
        self.out = nn.Linear(5, 2)

    def forward(self, x):
        y = self.rnn(self.gru(self.lstm(x)[0])[0])[0][-1]
        lstm, gru, rnn = self.cells
        return self.out(rnn(gru(lstm(y)[0])))


@pytest.fixture
def models():
    """A model of torch.nn's modules, and the same of ours."""
    theirs = Model().eval()
    return theirs, lstm_fused.replace(copy.deepcopy(theirs))


def kinds(model):
    return {name: type(m) for name, m in model.named_modules()}


def restored_kinds(model):
    return {name: getattr(kind, "_torch_class", kind) for name, kind in kinds(model).items()}


QUANTIZED = {
    "default": ({}, {}),
    "float16": ({"dtype": torch.float16}, {"dtype": torch.float16}),
    "of torch.nn's classes": ({"qconfig_spec": {nn.LSTM, nn.GRUCell}},) * 2,
    "of our classes": (
        {"qconfig_spec": {nn.LSTM, nn.GRUCell}},
        {"qconfig_spec": {lstm_fused.LSTM, lstm_fused.GRUCell}},
    ),
    "by name": ({"qconfig_spec": {"gru"}},) * 2,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", QUANTIZED)
def test_quantize_dynamic(models, name):
    """Quantizes the modules that it would of torch.nn's; the others stay ours."""
    theirs, ours = models
    before = kinds(ours)
    for_theirs, for_ours = QUANTIZED[name]
    expected = torch.ao.quantization.quantize_dynamic(theirs, **for_theirs)
    found = torch.ao.quantization.quantize_dynamic(ours, **for_ours)
    assert kinds(ours) == before
    assert restored_kinds(found) == kinds(expected)
    assert kinds(found) != before
    assert isinstance(found.rnn, Fused)  # torch has no quantized RNN
    x = torch.randn(5, 3, 4)
    torch.testing.assert_close(found(x), expected(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantize_dynamic_of_one_module():
    """torch converts modules inside a model only: alone, ours stays ours."""
    for module in (nn.LSTM(4, 6), lstm_fused.LSTM(4, 6)):
        assert type(torch.ao.quantization.quantize_dynamic(module)) is type(module)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:.*:UserWarning:torch")
def test_quantize_fx():
    from torch.ao.quantization import QConfigMapping, default_dynamic_qconfig
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.out = nn.LSTM(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.out(self.lstm(x)[0])

    theirs = Small().eval()
    ours = lstm_fused.replace(copy.deepcopy(theirs))
    mapping, x = QConfigMapping().set_global(default_dynamic_qconfig), torch.randn(5, 3, 4)
    expected = convert_fx(prepare_fx(theirs, mapping, (x,)))
    with pytest.warns(UserWarning, match="replace brings the fused module back"):
        found = convert_fx(prepare_fx(ours, mapping, (x,)))
    assert type(found.lstm) is type(expected.lstm) is torch.ao.nn.quantized.dynamic.LSTM
    torch.testing.assert_close(found(x), expected(x))


@pytest.fixture(scope="module")
def opacus():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("opacus")


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
def test_opacus_validation_matches_torch(opacus, kind):
    validator = opacus.validators.ModuleValidator
    for options in ({}, {"bias": False}):
        theirs, ours = (getattr(library, kind)(3, 4, **options) for library in (nn, lstm_fused))
        words = [[str(e) for e in validator.validate(module)] for module in (theirs, ours)]
        assert words[1] == words[0] and bool(words[0]) == (kind in ("LSTM", "GRU"))
        ours.load_state_dict(theirs.state_dict())
        fixed = [validator.fix(nn.Sequential(module))[0] for module in (theirs, ours)]
        if not words[0]:
            assert fixed[1].__class__ is ours.__class__
            continue
        assert type(fixed[1]) is type(fixed[0]) and not isinstance(fixed[1], Fused)
        x = torch.randn(5, 2, 3)
        torch.testing.assert_close(fixed[1](x)[0], fixed[0](x)[0], rtol=0, atol=0)
        torch.testing.assert_close(fixed[1](x)[0], ours(x)[0])


class Last(nn.Module):
    """On top level, since opacus pickles what it fixes."""

    def __init__(self, kind):
        super().__init__()
        self.rnn, self.out = getattr(nn, kind)(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.out(self.rnn(x)[0][:, -1])


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_opacus_trains_what_it_fixed_and_refuses_the_rest(opacus, kind):
    """A model after replace is refused as before; fixed, it trains with per-sample gradients."""

    def private(model):
        rows = torch.utils.data.TensorDataset(torch.randn(8, 5, 3))
        return opacus.PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), 0.1),
            data_loader=torch.utils.data.DataLoader(rows, 4),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )

    model = lstm_fused.replace(Last(kind))
    assert isinstance(model.rnn, Fused)
    with pytest.raises(opacus.validators.errors.UnsupportedModuleError, match=f"nn.{kind}"):
        private(model)
    model, optimizer, _ = private(opacus.validators.ModuleValidator.fix(model))
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(4, 5, 3)).sum().backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_dropout_compiled():
    """Inductor draws its own masks unless told to draw those of eager mode."""
    module = lstm_fused.LSTM(4, 6, num_layers=3, dropout=0.5)
    x = torch.randn(5, 3, 4)
    torch._dynamo.reset()
    with torch._inductor.config.patch(fallback_random=True):
        compiled = torch.compile(module, fullgraph=True)
        results = []
        for call in (module, compiled):
            torch.manual_seed(3)
            results.append(call(x))
    torch.testing.assert_close(results[1], results[0])
    assert runtime.last_run()["pass"] == "forward"


def test_profiler_names_the_layer():
    module, x = lstm_fused.GRU(4, 6, num_layers=2), torch.randn(5, 3, 4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        module(x)
    names = [event.name for event in profile.events()]
    assert [names.count(f"lstm_fused.GRU layer {k}") for k in range(3)] == [1, 1, 0]
