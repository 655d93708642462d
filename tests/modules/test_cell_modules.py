"""Layers of cells beyond torch.nn: their formulas, and that a call is as one of LSTM's."""

import copy
import io
import math
import pickle

import pytest
import torch

import lstm_fused
from lstm_fused import cells
from tests.helpers import cell_modules, loops
from tests.helpers.cell_modules import MODULES, make
from tests.helpers.compare_modules import H, I, T, changed, draw, states_of

N = 4
each_module = pytest.mark.parametrize("name", MODULES)
OPTIONS = {
    "plain": {},
    "two layers": {"num_layers": 2, "batch_first": True},
    "both": {"num_layers": 2, "bidirectional": True, "bias": False},
    "projection": {"bidirectional": True, "proj_size": 3},
}


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    """Whether a kernel runs is asserted where it matters, see test_kernels."""
    cell_modules.allow_reference(monkeypatch)


def state_of(module, rows):
    return changed(lambda s: torch.randn_like(s).requires_grad_(), module.init_state(rows))


def fitting(name, options):
    """options, without a projection where the layer has none."""
    return {k: v for k, v in options.items() if k != "proj_size" or MODULES[name][0].projects}


class Formulas:
    """One step of each cell, as its docstring has it: x (N, I), h and c (N, H) -> (h, c or None).

    w: the module's weights by name, without suffix.
    """

    @staticmethod
    def of_x(x, w):
        return x @ w["weight_ih"].t() + w["bias_ih"]

    def IndRNN(self, x, h, c, w):
        return torch.relu(self.of_x(x, w) + w["weight_u"] * h), None

    def MinGRU(self, x, h, c, w):
        z, new = self.of_x(x, w).chunk(2, 1)
        z = z.sigmoid()
        return (1 - z) * h + z * torch.where(new >= 0, new + 0.5, new.sigmoid()), None

    def MinLSTM(self, x, h, c, w):
        f, i, new = self.of_x(x, w).chunk(3, 1)
        f, i = f.sigmoid(), i.sigmoid()
        new = torch.where(new >= 0, new + 0.5, new.sigmoid())
        return (f * h + i * new) / (f + i), None

    def SRU(self, x, h, c, w):
        u, f, r, skip = (x @ w["weight_ih"].t()).chunk(4, 1)
        (v_f, v_r), (b_f, b_r) = w["weight_c"], w["bias_ih"].chunk(2)
        f, r = (f + v_f * c + b_f).sigmoid(), (r + v_r * c + b_r).sigmoid()
        c = f * c + (1 - f) * u
        return r * c + (1 - r) * skip, c

    def QRNN(self, x, h, c, w):
        z, f, o = self.of_x(x, w).chunk(3, 1)
        c = f.sigmoid() * c + (1 - f.sigmoid()) * z.tanh()
        return o.sigmoid() * c, c

    def PeepholeLSTM(self, x, h, c, w):
        p_i, p_f, p_o = w["weight_ph"]
        i, f, g, o = (self.of_x(x, w) + h @ w["weight_hh"].t() + w["bias_hh"]).chunk(4, 1)
        new = (f + p_f * c).sigmoid() * c + (i + p_i * c).sigmoid() * g.tanh()
        return (o + p_o * new).sigmoid() * new.tanh(), new

    def CoupledLSTM(self, x, h, c, w):
        i, g, o = (self.of_x(x, w) + h @ w["weight_hh"].t() + w["bias_hh"]).chunk(3, 1)
        new = (1 - i.sigmoid()) * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * new.tanh(), new


@pytest.mark.parametrize("name", [n for n in vars(Formulas) if n in MODULES])
def test_formula(name):
    module = make(name, I, H)
    weights = {n.removesuffix("_l0"): w for n, w in module.named_parameters()}
    hx = state_of(module, N)
    x = draw(T, N, I)
    h, c = ([s[0] for s in states_of(hx)] + [None])[:2]
    if isinstance(module, cells.base.CellState):
        h, c = None, h
    outputs = []
    for step in x:
        h, c = getattr(Formulas(), name)(step, h, c, weights)
        outputs.append(h)
    y, ends = module(x, hx)
    torch.testing.assert_close(y, torch.stack(outputs))
    expected = {1: (c,) if isinstance(module, cells.base.CellState) else (h,), 2: (h, c)}
    torch.testing.assert_close(states_of(ends), tuple(s[None] for s in expected[module._states]))


@pytest.mark.covering
@each_module
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("form", loops.FORMS)
@pytest.mark.parametrize("given", ("nothing", "hx", "resets"))
def test_call(given, form, option, name):
    """Every form of input, by the layer itself called for one step of one row."""
    options = fitting(name, OPTIONS[option])
    module = make(name, I, H, **options)
    if name == "QRNN window" or (isinstance(module, cells.SRU) and module.bidirectional):
        pytest.skip("single steps are of another layer: see test_two_directions, test_window")
    call, lengths = loops.FORMS[form]
    x = draw(T, N, I)
    state, resets = (), None
    if given != "nothing":
        hx = state_of(module, N)
        state = states_of(hx)
    if given == "resets":
        resets = torch.rand(T, N) < 0.3
    leaves = {"x": x, **dict(module.named_parameters())}
    run = {"resets": resets, "lengths": lengths, "leaves": leaves}
    expected = loops.results(by_steps, module, x, state, **run)
    found = loops.results(call, module, x, state, **run)
    torch.testing.assert_close(found, expected)


def by_steps(module, x, state=(), resets=None, reset_state=None, lengths=None):
    layer_of = cell_modules.one_layer
    return loops.by_steps(module, x, state, resets, reset_state, lengths, layer_of)


@each_module
def test_unbatched_and_cell_states(name):
    module = make(name, I, H, num_layers=2)
    x, hx = draw(T, N, I), state_of(module, N)
    y, ends = module(x, hx)
    row, end = module(x[:, 1], changed(lambda s: s[:, 1], hx))
    torch.testing.assert_close(row, y[:, 1])
    torch.testing.assert_close(states_of(end), tuple(s[:, 1] for s in states_of(ends)))
    if not module._has_cell_state():
        with pytest.raises(TypeError, match="has no cell state"):
            module(x, hx, return_cell_states=True)
        return
    again, _, c = module(x, hx, return_cell_states=True)
    torch.testing.assert_close(again, y)
    own = [s[-1] for s in states_of(ends)]
    torch.testing.assert_close(c[-1], torch.cat(own[1:] or own, dim=-1))


@pytest.mark.parametrize("name", ("SRU", "SRU rescaled", "QRNN", "QRNN window"))
@pytest.mark.parametrize("width", (I, 2 * H))
def test_two_directions(name, width):
    """The reverse direction is the forward one of the input in reverse; SRU has its half of x."""
    if name.startswith("SRU") and width == I:
        width = 5
    both = make(name, width, H, bidirectional=True)
    x, hx = draw(T, N, width), state_of(both, N)
    y, ends = both(x, hx)
    for d, suffix in enumerate(("", "_reverse")):
        one = make(name, width, H)
        own = {n: getattr(both, n + suffix) for n in one.state_dict()}
        if one.weight_ih_l0.shape != both.weight_ih_l0.shape:  # with W_s, where both have identity
            half = torch.eye(width, dtype=x.dtype)[d * H : (d + 1) * H]
            own["weight_ih_l0"] = torch.cat((own["weight_ih_l0"], half))
        rows = x.flip(0) if d else x
        part, end = torch.func.functional_call(one, own, (rows, hx[d : d + 1]))
        part = part.flip(0) if d else part
        torch.testing.assert_close(y[..., d * H : (d + 1) * H], part)
        torch.testing.assert_close(ends[d : d + 1], end)


@pytest.mark.parametrize("bidirectional", (False, True))
@pytest.mark.parametrize("form", loops.FORMS)
def test_window(form, bidirectional):
    """By a layer of window 1 whose input is the windows of each row, made step by step."""
    module = make("QRNN window", I, H, bidirectional=bidirectional)
    call, lengths = loops.FORMS[form]
    x, resets = draw(T, N, I), torch.rand(T, N) < 0.3
    found, ends, _ = call(module, x, (), resets, lengths=lengths)
    for d, suffix in enumerate(("", "_reverse")[: 1 + bidirectional]):
        inputs = torch.zeros(T, N, 3 * I, dtype=x.dtype)
        for n, length in enumerate(lengths or [T] * N):
            for t in range(length):
                seen, at = [x[t, n]], t
                for _ in range(2):
                    boundary = at + 1 if d else at
                    at += 1 if d else -1
                    gone = not 0 <= at < length or resets[boundary, n] or seen[-1] is None
                    seen.append(None if gone else x[at, n])
                zeros = torch.zeros(I, dtype=x.dtype)
                inputs[t, n] = torch.cat([zeros if s is None else s for s in reversed(seen)])
        one = make("QRNN", 3 * I, H)
        own = {name: getattr(module, name + suffix) for name in one.state_dict()}

        def run(*given, one=one, own=own, **more):
            return torch.func.functional_call(one, own, given, more)

        run.batch_first, run.mode = False, ""
        rows = lengths or [T] * N
        order = [torch.arange(length) for length in rows]
        if d:
            order = [o.flip(0) for o in order]
        for n, o in enumerate(order):
            if not len(o):
                continue
            anew = resets[o, n]
            if d:  # a reset lies behind the step that follows it in this direction
                anew = torch.cat((torch.zeros(1, dtype=torch.bool), resets[o[:-1], n]))
            y, end = run(inputs[o, n], resets=anew)
            torch.testing.assert_close(found[o, n, d * H : (d + 1) * H], y)
            torch.testing.assert_close(ends[0][d, n], end[0])


@each_module
def test_interop(name):
    module = make(name, I, H, num_layers=2, bidirectional=True, learned_initial_state=True)
    x = draw(T, N, I)
    expected = module(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(other(x), expected)
    fresh = make(name, I, H, num_layers=2, bidirectional=True, learned_initial_state=True)
    fresh.load_state_dict(module.state_dict())
    torch.testing.assert_close(fresh(x), expected)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(x), expected)
    assert repr(module).startswith(f"{type(module).__name__}({I}, {H}, num_layers=2")
    torch.testing.assert_close(module(x, module.init_state(N)), expected)
    (expected[0].sum() + states_of(expected[1])[0].sum()).backward()
    assert all(p.grad is not None for p in module.parameters())


@each_module
def test_truncated_bptt(name):
    if name == "QRNN window":
        pytest.skip("a call does not see the inputs of the call before")
    module = make(name, I, H)
    x = draw(T, N, I)
    parts = [y for y, _ in lstm_fused.truncated_bptt(module, x, 2)]
    torch.testing.assert_close(torch.cat(parts), module(x)[0])


@each_module
def test_dtypes_and_autocast(name):
    module = make(name, I, H, dtype=torch.float32)
    x = draw(T, N, I, dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        y, ends = copy.deepcopy(module).to(dtype)(x.to(dtype))
        assert {t.dtype for t in (y, *states_of(ends))} == {dtype}
        torch.testing.assert_close(y.float(), module(x)[0], atol=0.05, rtol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        y, ends = module(x)
    assert {t.dtype for t in (y, *states_of(ends))} == {torch.bfloat16}


@each_module
def test_kernels(name):
    """Kernels run every call; test_call holds them to the steps."""
    module = make(name, I, H)
    assert module._fallback_reason(draw(T, N, I), None, module._weights()) is None


def test_plain_options_run_plain_kernels():
    module = cells.RegularizedLSTM(I, H, weight_dropout=0.5, forget_bias=1, dtype=torch.float64)
    assert module._cell() == "lstm" and module._unsupported_reason() is None
    gru = cells.RegularizedGRU(I, H, recurrent_dropout=0.5)
    assert gru._cell() == "variational_gru" and gru.eval()._cell() == "gru"


@each_module
def test_errors(name):
    module = make(name, I, H)
    kind = type(module).__name__
    with pytest.raises(ValueError, match=f"{kind}: Expected input to be 2D or 3D, got 4D"):
        module(draw(1, T, N, I))
    with pytest.raises(RuntimeError, match="must be equal to input_size"):
        module(draw(T, N, I + 1))
    with pytest.raises((RuntimeError, AttributeError, TypeError, IndexError)):
        module(draw(T, N, I), draw(1, N, H + 1))
    with pytest.raises(RuntimeError, match="torch.jit.script cannot compile"):
        torch.jit.script(module)
    with pytest.raises(ValueError, match="dropout should be a number"):
        make(name, I, H, dropout=2)
    if not module.projects:
        with pytest.raises(ValueError, match=f"not {kind}"):
            make(name, I, H, proj_size=2)


def test_models():
    """replace leaves them alone, restore and quantize_ say so."""
    model = torch.nn.Sequential(cells.MinGRU(I, H))
    lstm_fused.replace(model)
    for function in (lstm_fused.restore, lstm_fused.quantize_):
        with pytest.warns(UserWarning, match="left alone: 0, a MinGRU"):
            function(model)
    assert type(model[0]) is cells.MinGRU
    with pytest.raises(TypeError, match="streams have the cells of torch.nn alone"):
        lstm_fused.stream(model[0])


def test_initial_values():
    sru = cells.SRU(I, 64, highway_bias=-2.0)
    b_f, b_r = sru.bias_ih_l0.detach().chunk(2)
    assert (b_f == 0).all() and (b_r == -2).all()
    assert sru.weight_ih_l0.abs().max() <= math.sqrt(3 / I)
    norm = cells.LayerNormLSTM(I, H)
    assert (norm.gamma_ih_l0 == 1).all() and (norm.beta_c_l0 == 0).all()
    assert (cells.IndRNN(I, H).weight_u_l0 >= 0).all()


def test_wrong_options():
    with pytest.raises(ValueError, match="nonlinearity must be"):
        cells.IndRNN(I, H, nonlinearity="gelu")
    for window in (0, True, 1.5):
        with pytest.raises(ValueError, match="window must be an int of at least 1"):
            cells.QRNN(I, H, window=window)


def test_compile():
    module = make("PeepholeLSTM", I, H, num_layers=2)
    x = draw(T, N, I)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))


def test_wrong_state():
    with pytest.raises(RuntimeError, match="Expected hidden"):
        make("PeepholeLSTM", I, H)(draw(T, N, I), (draw(1, N, H), draw(1, N, H + 1)))
