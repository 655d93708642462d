"""States outside of a call: to begin with, learned, selected, masked, detached, carried."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import lstm_fused
from tests.helpers import loops
from tests.helpers.compare_modules import (
    H,
    I,
    N,
    T,
    assert_same,
    draw,
    each_cell,
    each_option,
    fitting,
    pair,
    state_for,
    states_of,
)
from tests.helpers.oracle import CELLS

SIZES = ((1, 1), (3, 5), (2, 7))  # layers times directions, rows


def learned(cell, **options):
    """Our module with a learned initial state that is not zero."""
    name, more = CELLS[cell]
    options = {"dtype": torch.float64} | more | fitting(cell, options)
    module = getattr(lstm_fused, name)(I, H, learned_initial_state=True, **options)
    with torch.no_grad():
        for p in initial_of(module):
            p.normal_()
    return module


def initial_of(module):
    return [p for name, p in module.named_parameters() if name.startswith("initial_")]


def of_rows(module, rows):
    """Its initial state, as hx."""
    return loops.as_hx(module, [s.unsqueeze(1).repeat(1, rows, 1) for s in initial_of(module)])


@each_option
@pytest.mark.parametrize("batch_size", (None, 0, 3))
def test_init_state(batch_size, cell, options):
    _, ours = pair(cell=cell, **options)
    found = ours.init_state(batch_size)
    expected = state_for(ours, batch_size)
    assert type(found) is type(expected)
    for mine, like in zip(states_of(found), states_of(expected), strict=True):
        assert mine.shape == like.shape and mine.dtype is like.dtype and not mine.any()
    if batch_size == 3:
        x = draw(3, T, I) if ours.batch_first else draw(T, 3, I)
        torch.testing.assert_close(ours(x, found), ours(x))


def test_init_state_follows_the_weights():
    module = lstm_fused.GRU(I, H, dtype=torch.bfloat16, device="meta")
    state = module.init_state(2)
    assert state.dtype is torch.bfloat16 and state.device.type == "meta"


@each_option
def test_learned_initial_state(cell, options):
    """As if it were given as hx; of every form of input."""
    ours = learned(cell, **options)
    x = draw(T, N, I)
    padded = x.transpose(0, 1) if ours.batch_first else x
    packed = pack_padded_sequence(x, [2, 5, 1], enforce_sorted=False)
    calls = {
        "dense": (padded, N, {}),
        "packed": (packed, N, {}),
        "unbatched": (x[:, 0], None, {}),
        "lengths": (padded, N, {"lengths": [2, 0, 5]}),
        "documents": (x.flatten(0, 1), 3, {"cu_seqlens": torch.tensor([0, 4, 4, 15])}),
    }
    for name, (input, rows, more) in calls.items():
        given = loops.as_hx(ours, initial_of(ours)) if rows is None else of_rows(ours, rows)
        results = []
        for hx in (None, given):
            y, ends = ours(input, hx, **more)
            outputs = [y.data if name == "packed" else y, *states_of(ends)]
            loss = sum(t.cos().sum() for t in outputs)
            results.append([*outputs, *torch.autograd.grad(loss, list(ours.parameters()))])
        torch.testing.assert_close(*results)
        assert all(g.any() for g in results[0][-len(initial_of(ours)) :])
        with torch.no_grad():
            torch.testing.assert_close(ours(input, **more)[1], ours(input, given, **more)[1])


@each_cell
def test_learned_state_is_what_resets_put_in(cell):
    ours = learned(cell, bidirectional=True)
    x, mask = draw(T, N, I), torch.rand(T, N) < 0.4
    state = loops.as_hx(ours, initial_of(ours))
    expected = ours(x, of_rows(ours, N), resets=mask, reset_state=state)
    torch.testing.assert_close(ours(x, resets=mask), expected)
    zeros = loops.as_hx(ours, [torch.zeros_like(s) for s in initial_of(ours)])
    other = ours(x, resets=mask, reset_state=zeros)
    assert not torch.equal(other[0], expected[0])


@each_cell
def test_learned_parameters(cell):
    """New ones are zeros, last, and not in a module without the option."""
    name, more = CELLS[cell]
    theirs = getattr(nn, name)(I, H, 2, bidirectional=True, **more)
    kind = getattr(lstm_fused, name)
    plain = kind(I, H, 2, bidirectional=True, **more)
    module = kind(I, H, 2, bidirectional=True, learned_initial_state=True, **more)
    assert list(plain.state_dict()) == list(theirs.state_dict())
    added = list(module.state_dict())[len(theirs.state_dict()) :]
    assert added == ["initial_h", "initial_c"][: len(states_of(state_for(plain, 1)))]
    assert all(getattr(module, name).shape == (4, H) for name in added)
    assert not any(p.any() for p in initial_of(module))
    assert module.learned_initial_state and not plain.learned_initial_state
    assert "learned_initial_state=True" in repr(module) and repr(plain) == repr(theirs)
    module.load_state_dict(theirs.state_dict(), strict=False)
    x = torch.randn(T, N, I)
    torch.testing.assert_close(module(x), theirs(x))
    with torch.no_grad():
        module.initial_h.normal_()
    module.reset_parameters()
    assert not module.initial_h.any() and module.weight_hh_l0.any()


@each_cell
def test_learned_state_is_copied(cell):
    ours = learned(cell)
    x = draw(T, N, I)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), saved):
        torch.testing.assert_close(other(x), ours(x))
        assert other.initial_h is not ours.initial_h and repr(other) == repr(ours)


def test_learned_state_under_transforms():
    ours = learned("lstm", num_layers=2)
    x = draw(T, N, I, grad=False)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), ours(x))
    torch.testing.assert_close(torch.export.export(ours, (x,)).module()(x), ours(x))
    weights = dict(ours.named_parameters())
    found = torch.func.functional_call(ours, weights | {"initial_h": torch.zeros(2, H).double()}, x)
    assert not torch.equal(found[0], ours(x)[0])
    parametrized = copy.deepcopy(ours)
    nn.utils.parametrize.register_parametrization(parametrized, "initial_h", nn.Identity())
    torch.testing.assert_close(parametrized(x), ours(x))
    with torch.autocast("cpu", torch.bfloat16):
        single = ours.float()
        single(x.float())[0].sum().backward()
    assert single.initial_h.grad.isfinite().all() and single.initial_c.grad.any()


def test_restore_leaves_a_learned_state_alone():
    model = nn.Sequential(learned("gru"), lstm_fused.LSTM(I, H))
    with pytest.warns(UserWarning, match="0, a GRU with a learned initial state, which torch.nn"):
        lstm_fused.restore(model)
    assert type(model[0]) is lstm_fused.GRU and type(model[1]) is nn.LSTM
    with pytest.raises(RuntimeError, match="cannot compile GRU with a learned initial state"):
        torch.jit.script(model)


@pytest.mark.filterwarnings("ignore:.*ran through torch.nn")
def test_torch_runs_a_learned_state():
    """Where a call falls back, it gets the state as well."""
    ours = learned("lstm")
    x = draw(T, N, I)
    found = ours(x.as_subclass(type("Named", (torch.Tensor,), {})))
    torch.testing.assert_close(found[0].as_subclass(torch.Tensor), ours(x)[0])


class Users(nn.LSTM):
    """A user's class with names that ours has too."""

    def init_state(self):
        return "mine"

    def extra_repr(self):
        return f"mine, {super().extra_repr()}"

    def reset_parameters(self):
        for weight in self.parameters():
            nn.init.constant_(weight, 0.5)


def test_replace_keeps_a_users_methods():
    model = Users(I, H).double()
    expected = repr(model)
    theirs = copy.deepcopy(model)
    lstm_fused.replace(model)
    assert isinstance(model, lstm_fused.LSTM) and type(model) is not Users
    assert model.init_state() == "mine" and repr(model) == expected
    model.reset_parameters()
    assert torch.equal(model.weight_hh_l0, torch.full_like(model.weight_hh_l0, 0.5))
    assert_same(theirs, model, draw(T, N, I))


def state_of(layers, rows, states, width=3):
    drawn = tuple(torch.randn(layers, rows, width + k) for k in range(states))
    return drawn if states == 2 else drawn[0]


each_state = pytest.mark.parametrize("states", (1, 2))
each_size = pytest.mark.parametrize("layers, rows", SIZES)


@each_state
@each_size
def test_select_state(layers, rows, states):
    state = state_of(layers, rows, states)
    at = torch.randint(rows, (9,))
    for given in (at, at.tolist(), at.int()):
        found = lstm_fused.select_state(state, given)
        assert type(found) is type(state)
        for mine, whole in zip(states_of(found), states_of(state), strict=True):
            assert torch.equal(mine, whole[:, at])
    of_a_cell = lstm_fused.select_state(states_of(state)[0][0], at)  # (N, width)
    assert torch.equal(of_a_cell, states_of(state)[0][0][at])
    with pytest.raises((IndexError, RuntimeError)):
        lstm_fused.select_state(state, [rows])


@each_state
@each_size
def test_where_state(layers, rows, states):
    state, other = state_of(layers, rows, states), state_of(layers, rows, states)
    for mask in (torch.rand(rows) < 0.5, torch.ones(rows).bool(), torch.zeros(rows).bool()):
        column = mask[None, :, None]
        for given in (other, None, first_row_of(other)):
            found = lstm_fused.where_state(mask, state, given)
            filled = [0] * states if given is None else states_of(given)
            for mine, s, o in zip(states_of(found), states_of(state), filled, strict=True):
                o = o.unsqueeze(1) if torch.is_tensor(o) and o.dim() == 2 else o
                assert torch.equal(mine, torch.where(column, s, o))
            assert type(found) is type(state)


def first_row_of(state):
    """Each (L*D, width): the form of one state for all rows."""
    first = tuple(s[:, 0] for s in states_of(state))
    return first if isinstance(state, tuple) else first[0]


def test_where_state_begins_episodes_as_resets_do():
    """The loop of a rollout, one step a call, against one call with resets."""
    ours = learned("lstm")
    x, done = draw(T, N, I), torch.rand(T, N) < 0.5
    state, outputs = ours.init_state(N), []
    for t in range(T):
        state = lstm_fused.where_state(~done[t], state, ours.init_state(N))
        y, state = ours(x[t : t + 1], state)
        outputs.append(y)
    torch.testing.assert_close((torch.cat(outputs), state), ours(x, resets=done))


@pytest.mark.parametrize(
    "mask, kind, words",
    [
        (torch.ones(3), TypeError, "mask must be a bool Tensor"),
        ([True] * 3, TypeError, "got list"),
        (torch.ones(4).bool(), ValueError, r"shape \(3,\), a value a row, got \(4,\)"),
        (torch.ones(1, 3).bool(), ValueError, r"got \(1, 3\)"),
    ],
    ids=str,
)
def test_where_state_errors(mask, kind, words):
    with pytest.raises(kind, match=words):
        lstm_fused.where_state(mask, state_of(2, 3, 2))


@pytest.mark.parametrize("state", (None, 3, (), (torch.ones(1, 1, 1), None)), ids=str)
def test_states_are_checked(state):
    for call in (
        lambda: lstm_fused.select_state(state, [0]),
        lambda: lstm_fused.where_state(torch.ones(1).bool(), state),
        lambda: lstm_fused.detach_state(state),
        lambda: lstm_fused.batch_first_state(state),
    ):
        with pytest.raises(TypeError, match="state must be a Tensor or a tuple of them"):
            call()


@each_state
@each_size
def test_batch_first_state(layers, rows, states):
    state = state_of(layers, rows, states)
    turned = lstm_fused.batch_first_state(state)
    assert all(t.shape[:2] == (rows, layers) for t in states_of(turned))
    back = lstm_fused.batch_first_state(turned)
    assert type(turned) is type(back) is type(state)
    for mine, s in zip(states_of(back), states_of(state), strict=True):
        assert torch.equal(mine, s) and mine.data_ptr() == s.data_ptr()


@pytest.mark.covering
@each_option
@pytest.mark.parametrize("steps", (1, 2, T, T + 1))
@pytest.mark.parametrize("form", ("dense", "unbatched", "resets", "lengths", "hx", "all"))
def test_truncated_bptt(form, steps, cell, options):
    """The results of one call; gradients those of a loop that detaches by hand."""
    options = options | {"bidirectional": False}
    _, ours = pair(cell=cell, **options)
    rows = None if form == "unbatched" else N
    hx = state_for(ours, rows) if form in ("hx", "all") else None
    x = draw(T, I) if rows is None else draw(T, N, I)
    swap = ours.batch_first and rows is not None
    mask = torch.rand(T, N) < 0.4
    more = {"resets": mask.t() if swap else mask} if form in ("resets", "all") else {}
    more |= {"lengths": [5, 0, 2]} if form in ("lengths", "all") else {}
    input = x.transpose(0, 1) if swap else x
    time = 1 if swap else 0

    chunks = list(lstm_fused.truncated_bptt(ours, input, steps, hx, **more))
    assert len(chunks) == -(-T // steps)
    output = torch.cat([y for y, _ in chunks], time)
    torch.testing.assert_close((output, chunks[-1][1]), ours(input, hx, **more))

    losses, state = [], hx
    for begin in range(0, T, steps):
        part = {k: v for k, v in more.items() if k != "lengths"}
        if "resets" in part:
            part["resets"] = part["resets"].split(steps, time)[begin // steps]
        if "lengths" in more:
            part["lengths"] = [max(0, min(steps, T - begin, n - begin)) for n in more["lengths"]]
        y, state = ours(input.split(steps, time)[begin // steps], state, **part)
        losses.append(y.cos().sum() + sum(s.cos().sum() for s in states_of(state)))
        state = loops.as_hx(ours, [s.detach() for s in states_of(state)])
    leaves = [x, *states_of(hx), *ours.parameters()]
    expected = torch.autograd.grad(sum(losses), leaves)
    found = sum(y.cos().sum() + sum(s.cos().sum() for s in states_of(state)) for y, state in chunks)
    torch.testing.assert_close(torch.autograd.grad(found, leaves), expected)


def test_truncated_bptt_passes_options_on():
    ours = learned("lstm")
    x = draw(T, N, I)
    chunks = list(
        lstm_fused.truncated_bptt(ours, x, 2, return_cell_states=True, checkpoint_every=1)
    )
    cells = torch.cat([c for _, _, c in chunks])
    torch.testing.assert_close(cells, ours(x, return_cell_states=True)[2])
    theirs = list(lstm_fused.truncated_bptt(nn.GRU(I, H).double(), x, 2))
    assert len(theirs) == 3


@pytest.mark.parametrize(
    "change, kind, words",
    [
        ({"module": nn.Linear(I, H)}, TypeError, "LSTM, GRU or RNN, got Linear"),
        ({"module": nn.GRU(I, H, bidirectional=True)}, ValueError, "must have one direction"),
        ({"input": [1.0]}, TypeError, "input must be a Tensor, got list"),
        ({"input": torch.zeros(3)}, ValueError, "2-D or 3-D, got 1-D"),
        ({"steps": 0}, ValueError, "steps must be an int of at least 1, got 0"),
        ({"steps": 1.5}, ValueError, "got 1.5"),
    ],
    ids=lambda v: str(v)[:20],
)
def test_truncated_bptt_errors(change, kind, words):
    """At once, not at the first chunk."""
    given = {"module": lstm_fused.GRU(I, H), "input": torch.zeros(T, N, I), "steps": 2} | change
    with pytest.raises(kind, match=words):
        lstm_fused.truncated_bptt(**given)
