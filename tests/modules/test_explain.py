"""explain describes the kernels that then run, as runtime.last_run reports them."""

import re

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import lstm_fused
from lstm_fused import runtime
from tests.helpers.compare_modules import each_cell, fitting, state_for, states_of
from tests.helpers.oracle import CELLS, has_cell_state
from tests.helpers.plan_coverage import FLOAT_ISAS

T, N, I, H = 7, 3, 5, 12  # noqa: E741


def make(cell, **options):
    name, more = CELLS[cell]
    return getattr(lstm_fused, name)(I, H, **more | fitting(cell, options))


def make_step(cell, **options):
    name, more = CELLS[cell]
    return getattr(lstm_fused, f"{name}Cell")(I, H, **more | options)


def packed(x):
    return pack_padded_sequence(x, [7, 4, 2])


# Options, how the input is made of (T, N, I), and the T and N to be told.
CALLS = {
    "dense": ({}, lambda x: x, (T, N)),
    "batch_first": ({"batch_first": True}, lambda x: x.transpose(0, 1), (T, N)),
    "unbatched": ({}, lambda x: x[:, 0], (T, 1)),
    "packed": ({}, packed, (T, N)),
    "projection": ({"proj_size": 4}, lambda x: x, (T, N)),
    "two directions": ({"bidirectional": True}, lambda x: x, (T, N)),
    "bfloat16": ({"dtype": torch.bfloat16}, lambda x: x.bfloat16(), (T, N)),
    "float64": ({"dtype": torch.float64}, lambda x: x.double(), (T, N)),
}


@each_cell
@pytest.mark.parametrize("grad", (True, False), ids=("grad", "no_grad"))
@pytest.mark.parametrize("isa", FLOAT_ISAS)
@pytest.mark.parametrize("options, form, sizes", CALLS.values(), ids=CALLS)
def test_explained_plan_runs(options, form, sizes, isa, grad, cell):
    runtime.set_isa(isa)
    module = make(cell, **options)
    input = form(torch.randn(T, N, I))
    with torch.set_grad_enabled(grad):
        (call,) = lstm_fused.explain(module, input).calls
        module(input)
    ran = runtime.last_run()
    (layer,) = call.layers
    assert call.reason is None
    assert (*sizes, I, H) == (layer.T, layer.N, layer.I, layer.H)
    assert (module.proj_size or H) == layer.R
    assert layer.training is grad
    assert ran.pop("pass") == "forward"
    assert {key: getattr(layer.plan, key) for key in ran} == ran


@each_cell
@pytest.mark.parametrize("grad", (True, False), ids=("grad", "no_grad"))
@pytest.mark.parametrize("isa", FLOAT_ISAS)
@pytest.mark.parametrize("rows", (None, 1, N, 200), ids=str)
def test_explained_cell_plan_runs(rows, isa, grad, cell):
    runtime.set_isa(isa)
    module = make_step(cell, dtype=torch.bfloat16)
    batch = () if rows is None else (rows,)
    states = [torch.randn(*batch, H).bfloat16() for _ in range(1 + has_cell_state(cell))]
    given = torch.randn(*batch, I).bfloat16(), tuple(states) if len(states) > 1 else states[0]
    with torch.set_grad_enabled(grad):
        (call,) = lstm_fused.explain(module, *given).calls
        module(*given)
    ran = runtime.last_run()
    (layer,) = call.layers
    assert (call.step, call.reason) == (True, None)
    assert (1, rows or 1, I, H, H) == (layer.T, layer.N, layer.I, layer.H, layer.R)
    assert layer.training is grad
    assert ran.pop("pass") == "forward"
    assert {key: getattr(layer.plan, key) for key in ran} == ran
    assert str(call).splitlines()[1].startswith(f"  step: T=1 N={rows or 1} I=5 H=12")


def test_printed_lstm():
    isa = runtime.available_isas()[0]
    runtime.set_isa(isa)
    lstm = lstm_fused.LSTM(I, H, num_layers=2, bidirectional=True, proj_size=4)
    lines = str(lstm_fused.explain(lstm, torch.randn(T, N, I))).splitlines()
    assert lines[0] == repr(lstm)
    assert lines[1].startswith("  layer 0: T=7 N=3 I=5 H=12 R=4, two directions, keeps gates")
    assert lines[3].startswith("  layer 1: T=7 N=3 I=8 H=12 R=4, two directions, keeps gates")
    assert len(lines) == 5
    for line in lines[1::2]:
        assert f"kernel, {isa}, float32" in line
    for line in lines[2::2]:
        assert re.fullmatch(
            r"    predicted .* [mu]s forward, .* [mu]s backward \(\d+% of all\)", line
        )


def test_predicted_times():
    lstm = lstm_fused.LSTM(I, H, num_layers=2)
    x = torch.randn(T, N, I)
    (call,) = lstm_fused.explain(lstm, x).calls
    assert [len(layer.seconds) for layer in call.layers] == [2, 2]
    assert call.seconds == sum(sum(layer.seconds) for layer in call.layers) > 0
    (call,) = lstm_fused.explain(lstm.requires_grad_(False), x).calls
    (forward,) = call.layers[0].seconds
    assert forward == call.layers[0].plan.nanoseconds / 1e9
    assert "backward" not in str(call)


@each_cell
def test_a_layer_is_not_run(cell):
    module = make(cell, num_layers=2, dropout=0.5)
    module.register_forward_hook(lambda *_: pytest.fail("it was called"))
    state = torch.get_rng_state()
    lstm_fused.explain(module, torch.randn(T, N, I, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), state)
    assert module.training


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, I)
        self.lstm = lstm_fused.LSTM(I, H, num_layers=2, dropout=0.5)
        self.gru = lstm_fused.GRU(H, H)
        self.head = nn.ModuleDict({"drop": nn.Dropout(), "top": nn.RNN(H, 4)})

    def forward(self, tokens, scale=1):
        x = self.head["drop"](self.gru(self.lstm(self.embed(tokens))[0])[0])
        return self.head["top"](scale * x)[0]


@pytest.mark.parametrize("given", (lambda t: t, lambda t: (t, 2), lambda t: {"tokens": t}))
def test_model(given):
    """Its layers are found in call order; mode, random state and hooks are as they were."""
    model, tokens = Model(), torch.zeros(T, N, dtype=torch.long)
    model.embed.eval()
    state = torch.get_rng_state()
    explanation = lstm_fused.explain(model, given(tokens))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and model.lstm.training and not model.embed.training
    assert not model.lstm._forward_pre_hooks
    fused, second, plain = explanation.calls
    assert (fused.name, second.name, plain.name) == ("lstm", "gru", "head.top")
    assert second.module == repr(model.gru) and len(second.layers) == 1
    assert [layer.I for layer in fused.layers] == [I, H]
    assert all(layer.training for layer in fused.layers)
    assert plain.layers == () and "lstm_fused.replace" in plain.reason
    lines = str(explanation).splitlines()
    assert lines[0] == f"lstm: {model.lstm}"
    assert lines[-2] == f"head.top: {model.head['top']}"
    assert lines[-1] == ("  runs through torch: it is not of lstm_fused, see lstm_fused.replace")


def test_model_without_gradients():
    model = Model().requires_grad_(False)
    calls = lstm_fused.explain(model, torch.zeros(T, N, dtype=torch.long)).calls
    assert not any(layer.training for call in calls for layer in call.layers)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = lstm_fused.LSTMCell(I, H), nn.GRUCell(H, I)

    def forward(self, x):
        state = None
        for _ in range(T):
            state = self.first(x, state)
            x = self.second(state[0], x)
        return x


def test_steps_of_a_model():
    """Each call is found, and those that are alike are printed once."""
    model = Decoder()
    explanation = lstm_fused.explain(model, torch.randn(N, I))
    assert [call.name for call in explanation.calls] == ["first", "second"] * T
    assert all(call.step and call.layers[0].training for call in explanation.calls[::2])
    lines = str(explanation).splitlines()
    assert [lines[0], lines[4]] == [f"first: {model.first}", f"second: {model.second}"]
    assert lines[1].startswith("  step: T=1 N=3 I=5 H=12, keeps gates for backward")
    assert lines[5].startswith("  runs through torch: it is not of lstm_fused")
    assert lines[3::3] == ["  called 7 times"] * 2


def test_model_without_a_layer():
    said = str(lstm_fused.explain(nn.Linear(I, 2), torch.randn(3, I)))
    assert said == "no LSTM, GRU, RNN or single-step cell was called"


THROUGH_TORCH = {
    "meta": (lambda m: m.to("meta"), torch.ones(T, N, I, device="meta"), "input is on meta"),
    "weights": (lambda m: m.to("meta"), torch.ones(T, N, I), "a weight is on meta"),
    "complex": (lambda m: m, torch.ones(T, N, I, dtype=torch.complex64), "complex64"),
    "sparse": (lambda m: m, torch.ones(T, N, I).to_sparse(), "layout is torch.sparse_coo"),
    "torch.nn": (lstm_fused.restore, torch.ones(T, N, I), "it is not of lstm_fused"),
}


@each_cell
@pytest.mark.parametrize("change, input, reason", THROUGH_TORCH.values(), ids=THROUGH_TORCH)
def test_explains_fallback(change, input, reason, cell):
    module = change(make(cell))
    explanation = lstm_fused.explain(module, input)
    (call,) = explanation.calls
    assert reason in call.reason and call.layers == ()
    assert str(explanation) == f"{module}\n  runs through torch: {call.reason}"


STEPS_THROUGH_TORCH = {
    "meta": (lambda m: m.to("meta"), lambda: torch.ones(N, I, device="meta"), "input is on meta"),
    "complex": (
        lambda m: m.to(torch.complex64),
        lambda: torch.ones(N, I, dtype=torch.complex64),
        "complex64",
    ),
    "torch.nn": (lstm_fused.restore, lambda: torch.ones(N, I), "it is not of lstm_fused"),
    "width": (lambda m: m, lambda: torch.ones(N, 4), "input or hx does not fit"),
    "no input": (lambda m: type(m)(0, H), lambda: torch.ones(N, 0), "input_size and a hidden_size"),
}


@each_cell
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@pytest.mark.parametrize(
    "change, input, reason", STEPS_THROUGH_TORCH.values(), ids=STEPS_THROUGH_TORCH
)
def test_explains_cell_fallback(change, input, reason, cell):
    module = change(make_step(cell))
    explanation = lstm_fused.explain(module, input())
    (call,) = explanation.calls
    assert reason in call.reason and call.layers == ()
    assert str(explanation) == f"{module}\n  runs through torch: {call.reason}"


@each_cell
def test_step_under_autocast(cell):
    with torch.autocast("cpu", torch.bfloat16):
        (call,) = lstm_fused.explain(make_step(cell), torch.ones(N, I)).calls
    assert "does not run under autocast" in call.reason


@each_cell
def test_state_requires_grad_means_training(cell):
    module = make(cell).requires_grad_(False)
    x, state = torch.randn(T, N, I), state_for(module, N, torch.float32)
    for trains in (True, False):
        states_of(state)[-1].requires_grad_(trains)
        states_of(state)[0].requires_grad_(trains and len(states_of(state)) == 1)
        assert lstm_fused.explain(module, x, state).calls[0].layers[0].training is trains


def test_error_messages():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
        lstm_fused.explain("lstm", torch.ones(T, N, I))
    with pytest.raises(TypeError, match="hx goes with a layer or a cell, model is a Linear"):
        lstm_fused.explain(nn.Linear(I, 2), torch.ones(3, I), hx=())


# Options of a call, and the T and N to be told.
WITH_OPTIONS = {
    "resets": (lambda x: {"resets": torch.rand(T, N) < 0.5}, (T, N)),
    "cell states": (lambda x: {"return_cell_states": True}, (T, N)),
    "lengths": (
        lambda x: {"lengths": [0, 3, 5], "resets": torch.rand(T, N) < 0.5},
        (5, 2),
    ),
    "documents": (lambda x: {"cu_seqlens": torch.tensor([0, 4, 4, 9, 21])}, (12, 4)),
}


@pytest.mark.parametrize("grad", (True, False), ids=("grad", "no_grad"))
@pytest.mark.parametrize("options, sizes", WITH_OPTIONS.values(), ids=WITH_OPTIONS)
def test_explained_plan_runs_with_options(options, sizes, grad):
    module = make("lstm", bidirectional=True)
    x = torch.randn(T, N, I)
    more = options(x)
    x = x.flatten(0, 1) if "cu_seqlens" in more else x
    with torch.set_grad_enabled(grad):
        (call,) = lstm_fused.explain(module, x, **more).calls
        module(x, **more)
    ran = runtime.last_run()
    (layer,) = call.layers
    assert sizes == (layer.T, layer.N)
    assert ran.pop("pass") == "forward"
    assert {key: getattr(layer.plan, key) for key in ran} == ran


def test_printed_options():
    module = make("lstm", num_layers=2)
    x, mask = torch.randn(100, N, I), torch.rand(100, N) < 0.5
    more = {"resets": mask, "return_cell_states": True, "checkpoint_every": 10}
    lines = str(lstm_fused.explain(module, x, **more)).splitlines()
    assert lines[1] == "  resets: in the kernel, to zeros"
    assert lines[2] == "  cell states: of every step, of the last layer"
    # 9 states of h and c; 100 steps of 4 gates and c, H padded to 16.
    kept = "(2.6 kB in place of 96 kB)"
    assert f"keeps the states of every 10 steps for backward {kept}" in lines[3]
    (call,) = lstm_fused.explain(module, x, checkpoint_every=10).calls
    assert call.layers[0].save_every == 10
    assert call.layers[0].kept_bytes == 9 * N * 2 * H * 4
    assert call.layers[0].kept_bytes_of_every_step == 100 * N * 5 * 16 * 4
    module.checkpoint_every = 1
    assert "keeps gates for backward" in str(lstm_fused.explain(module, x))
    more["reset_state"] = state_for(module, N, torch.float32)
    assert "resets: in the kernel, to reset_state" in str(lstm_fused.explain(module, x, **more))
    rows = x.flatten(0, 1)
    text = str(lstm_fused.explain(module, rows, cu_seqlens=torch.tensor([0, 300])))
    assert "  documents: read in place" in text
    learned = lstm_fused.GRU(I, H, learned_initial_state=True)
    assert "to the learned initial state" in str(lstm_fused.explain(learned, x, resets=mask))


def test_options_that_the_reference_runs():
    module = make("gru").to("meta")
    x, mask = torch.randn(T, N, I, device="meta"), torch.zeros(T, N, dtype=torch.bool)
    text = str(lstm_fused.explain(module, x, resets=mask))
    assert "  runs through its reference in pure torch: the input is on meta" in text


def test_options_go_with_a_layer():
    with pytest.raises(
        TypeError, match="resets goes with a layer or a cell, model is a Sequential"
    ):
        lstm_fused.explain(nn.Sequential(make("gru")), torch.randn(T, N, I), resets=None)
    with pytest.raises(TypeError, match="unexpected keyword argument 'reset'"):
        lstm_fused.explain(make("gru"), torch.randn(T, N, I), reset=None)
