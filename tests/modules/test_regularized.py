"""Regularized LSTM and GRU: each option by a loop over steps that draws the same masks."""

import math
from functools import partial

import pytest
import torch
from torch.nn.functional import dropout

from lstm_fused import nn
from lstm_fused.cells import RegularizedGRU, RegularizedLSTM
from tests.helpers import cell_modules
from tests.helpers.compare_modules import H, I, T, draw, states_of

N, R, P = 4, 3, 0.4


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    cell_modules.allow_reference(monkeypatch)


def lstm(**options):
    return RegularizedLSTM(I, H, dtype=torch.float64, **options)


def gru(**options):
    return RegularizedGRU(I, H, dtype=torch.float64, **options)


def clamp(x, bound):
    return x if bound is None else x.clamp(-bound, bound)


def lstm_step(x, h, c, w, module, update=1, hidden=1):
    """h and c after a step, before zoneout."""
    preacts = x @ w["weight_ih"].t() + w["bias_ih"] + (hidden * h) @ w["weight_hh"].t()
    i, f, g, o = (preacts + w["bias_hh"]).chunk(4, 1)
    p_i, p_f, p_o = w.get("weight_ph", torch.zeros(3, H, dtype=x.dtype))
    i = clamp(i + p_i * c, module.clip).sigmoid()
    f = clamp(f + p_f * c, module.clip).sigmoid()
    new = clamp(f * c + i * update * clamp(g, module.clip).tanh(), module.cell_clip)
    h = clamp(o + p_o * new, module.clip).sigmoid() * new.tanh()
    if module.proj_size:
        h = clamp(h @ w["weight_hr"].t(), module.proj_clip)
    return h, new


def gru_step(x, h, _, w, module, update=1, hidden=1):
    r_x, z_x, n_x = (x @ w["weight_ih"].t() + w["bias_ih"]).chunk(3, 1)
    r_h, z_h, n_h = ((hidden * h) @ w["weight_hh"].t() + w["bias_hh"]).chunk(3, 1)
    r, z = clamp(r_x + r_h, module.clip).sigmoid(), clamp(z_x + z_h, module.clip).sigmoid()
    n = clamp(n_x + r * n_h, module.clip).tanh()
    return (1 - z) * update * n + z * h, None


class Masks:
    """The masks that a call of a dense input (T, N, I) draws, in its order."""

    def __init__(self, module, x):
        ones, p = x.new_ones(T, N, H), module.recurrent_dropout
        mode, training = module.recurrent_dropout_mode, module.training and p > 0
        self.update = dropout(ones, p) if training and mode == "update" else ones
        self.zone_c, self.zone_h = 0 * ones, 0 * ones
        is_lstm = isinstance(module, RegularizedLSTM)
        for name, p_zone in zip(
            ("zone_c", "zone_h")[-1 - is_lstm :], module._zoneouts(), strict=True
        ):
            constant = ones * p_zone
            drawn = module.training and p_zone
            setattr(self, name, torch.bernoulli(constant) if drawn else constant)
        self.hidden = ones[0]
        if training and mode == "variational":
            self.hidden = dropout(ones[0], p)


def by_loop(module, x, hx):
    """What module(x, hx) returns, from torch's current random state."""
    w = {name.removesuffix("_l0"): p for name, p in module.named_parameters()}
    step = lstm_step if isinstance(module, RegularizedLSTM) else gru_step
    if module.weight_dropout and module.training:
        w["weight_hh"] = dropout(w["weight_hh"], module.weight_dropout)
    h, c = (*[s[0] for s in states_of(hx)], None)[:2]
    masks, width, outputs = Masks(module, x), h.shape[1], []
    for t in range(T):
        zone_h, hidden = masks.zone_h[t, :, :width], masks.hidden[:, :width]
        h_new, c_new = step(x[t], h, c, w, module, masks.update[t], hidden)
        h = zone_h * h + (1 - zone_h) * h_new
        c = c if c is None else masks.zone_c[t] * c + (1 - masks.zone_c[t]) * c_new
        outputs.append(h)
    return torch.stack(outputs), h[None] if c is None else (h[None], c[None])


CASES = {
    "update": (lstm, {"recurrent_dropout": P, "recurrent_dropout_mode": "update"}),
    "variational": (lstm, {"recurrent_dropout": P}),
    "variational projection": (lstm, {"recurrent_dropout": P, "proj_size": R}),
    "zoneout": (lstm, {"zoneout_h": P, "zoneout_c": 0.2}),
    "zoneout projection": (lstm, {"zoneout_h": P, "zoneout_c": 0.2, "proj_size": R}),
    "weight_dropout": (lstm, {"weight_dropout": P}),
    "clips": (lstm, {"clip": 0.3, "cell_clip": 0.2, "peepholes": True}),
    "proj_clip": (lstm, {"proj_size": R, "proj_clip": 0.1, "cell_clip": 0.3}),
    "all": (
        lstm,
        {
            "recurrent_dropout": P,
            "zoneout_h": 0.1,
            "zoneout_c": 0.2,
            "weight_dropout": 0.1,
            "clip": 0.5,
            "cell_clip": 0.4,
            "peepholes": True,
        },
    ),
    "all update": (
        lstm,
        {"recurrent_dropout": P, "recurrent_dropout_mode": "update", "zoneout_h": 0.3, "clip": 1},
    ),
    "GRU update": (gru, {"recurrent_dropout": P, "recurrent_dropout_mode": "update"}),
    "GRU variational": (gru, {"recurrent_dropout": P, "zoneout": 0.2, "clip": 0.5}),
    "GRU zoneout": (gru, {"zoneout": P, "weight_dropout": 0.2}),
}


@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize("case", CASES)
def test_options(case, training):
    make, options = CASES[case]
    module = make(**options).train(training)
    x = draw(T, N, I)
    hx = module.init_state(N)
    hx = torch.randn_like(hx) if isinstance(hx, torch.Tensor) else tuple(map(torch.randn_like, hx))
    leaves = [x, *module.parameters()]
    results = []
    for run in (module, partial(by_loop, module)):
        torch.manual_seed(3)
        y, ends = run(x, hx)
        loss = sum(
            (t * torch.arange(t.numel()).view(t.shape).cos()).sum() for t in (y, *states_of(ends))
        )
        results.append([y, *states_of(ends), *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_drawn_in_evaluation(case):
    make, options = CASES[case]
    module = make(**options).eval()
    before = torch.get_rng_state()
    module(torch.ones(T, N, I, dtype=torch.float64))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("make", (lstm, gru))
def test_one_mask_for_all_steps_of_a_row(make):
    """Of every form of input: with W_ih = 0 and a mask that drops, units of h show it."""
    module = make(recurrent_dropout=0.5)
    lengths = [2, 5, 0]
    x = torch.zeros(sum(lengths), I, dtype=torch.float64)
    documents = torch.tensor([0, *lengths]).cumsum(0)[None]
    mask = module._hidden_mask(x, documents)
    for n, part in enumerate(mask.split(lengths)):
        assert (part == part[:1]).all(), n
    packed = torch.tensor([3, 3, 1])
    mask = module._hidden_mask(x, packed)
    assert torch.equal(mask[0], mask[3]) and torch.equal(mask[0], mask[6])
    assert not torch.equal(mask[0], mask[1])
    assert set(mask.unique().tolist()) == {0.0, 2.0}


def test_forget_bias():
    module = RegularizedLSTM(I, H, forget_bias=1.0, num_layers=2, bidirectional=True)
    for names in module._all_weights:
        b_ih, b_hh = (getattr(module, n) for n in names if n.startswith("bias"))
        assert (b_ih[H : 2 * H] == 1).all() and (b_hh[H : 2 * H] == 0).all()
        assert b_ih[:H].unique().numel() == H


def test_weights_are_torchs():
    module = lstm(zoneout_h=0.1, clip=50)
    plain = nn.LSTM(I, H, dtype=torch.float64)
    plain.load_state_dict(module.state_dict())
    module.zoneout_h = 0.0
    x = draw(T, N, I)
    torch.testing.assert_close(module(x), plain(x))


@pytest.mark.parametrize("make, plain", ((lstm, "lstm"), (gru, "gru")))
def test_cheapest_cell(make, plain):
    module = make(recurrent_dropout=P, weight_dropout=P)
    assert module._cell() != plain and module.eval()._cell() == plain
    assert make(weight_dropout=P)._cell() == plain


@pytest.mark.parametrize(
    "make, options, words",
    (
        (lstm, {"recurrent_dropout": 1.5}, "recurrent_dropout must be a probability"),
        (lstm, {"zoneout_h": True}, "zoneout_h must be a probability"),
        (lstm, {"zoneout_c": "half"}, "zoneout_c must be a probability"),
        (gru, {"weight_dropout": -1}, "weight_dropout must be a probability"),
        (lstm, {"recurrent_dropout_mode": "gal"}, "recurrent_dropout_mode must be"),
        (lstm, {"clip": 0}, "clip must be a number above 0 or None"),
        (lstm, {"cell_clip": math.nan}, "cell_clip must be a number above 0 or None"),
        (lstm, {"proj_clip": 1.0}, "proj_clip needs a proj_size"),
        (lstm, {"forget_bias": 1.0, "bias": False}, "forget_bias needs bias=True"),
    ),
)
def test_wrong_options(make, options, words):
    with pytest.raises(ValueError, match=words):
        make(**options)


def test_repr():
    assert repr(lstm(zoneout_h=0.1, clip=3)) == "RegularizedLSTM(4, 6, zoneout_h=0.1, clip=3.0)"


def test_the_reference_is_announced(monkeypatch):
    monkeypatch.setattr("lstm_fused.fallback._warned", set())
    x = torch.ones(T, N, I, dtype=torch.float64)
    with pytest.warns(UserWarning, match="RegularizedLSTM ran through its reference in pure torch"):
        lstm(recurrent_dropout=P, proj_size=2)(x)
