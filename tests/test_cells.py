"""LSTMCell, GRUCell and RNNCell beside torch.nn's: one step, in every form a caller may give it."""

import copy
import io
import pickle
import warnings
from itertools import product

import pytest
import torch
from beside import changed, states_of
from oracle import CELLS, Problem, has_cell_state
from paths import DTYPES, isas_for
from tolerance import allowed, error_of
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils import parametrizations, prune

import lstm_fused
from lstm_fused import ops, reference

pytestmark = pytest.mark.usefixtures("device")

I, H, N = 5, 21, 3  # noqa: E741
each_cell = pytest.mark.parametrize("cell", CELLS)


def make(cell, library, **options):
    """The single-step module of a cell, from one seed."""
    name, more = CELLS[cell]
    torch.manual_seed(1)
    return getattr(library, f"{name}Cell")(I, H, **{"dtype": torch.float64} | more | options)


def pair(cell, **options):
    return [make(cell, library, **options) for library in (nn, lstm_fused)]


def draw(*shape, dtype=torch.float64, grad=True):
    return torch.randn(*shape, dtype=dtype, requires_grad=grad)


def state_for(cell, *rows, dtype=torch.float64):
    """hx: h_0 (*rows, H), with c_0 alike if there is one."""
    states = tuple(draw(*rows, H, dtype=dtype) for _ in range(1 + has_cell_state(cell)))
    return states if has_cell_state(cell) else states[0]


def run(module, x, hx=None):
    """The states after the step and every gradient, by name; a fused module must have run fused."""
    out = module(x, hx)
    assert type(out) is (tuple if isinstance(module, nn.LSTMCell) else torch.Tensor)
    found = dict(zip(("h_n", "c_n"), states_of(out), strict=False))
    ours = isinstance(module, lstm_fused.cells.Cell) and x.numel()
    assert not ours or ops.last_run()["pass"] == "forward"
    leaves = {"x": x, **dict(zip(("h0", "c0"), states_of(hx), strict=False))}
    leaves |= module.named_parameters()
    leaves = {name: t for name, t in leaves.items() if t.requires_grad}
    d_out = [torch.linspace(-1, 1, t.numel()).to(t).view_as(t) for t in found.values()]
    grads = torch.autograd.grad(list(found.values()), list(leaves.values()), d_out)
    assert not ours or ops.last_run()["pass"] == "backward"
    return found | {f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def assert_same(theirs, ours, *args):
    expected, found = run(theirs, *args), run(ours, *args)
    torch.testing.assert_close(found, expected)
    return found


FORMS = {
    "rows": lambda cell: (draw(N, I), None),
    "rows hx": lambda cell: (draw(N, I), state_for(cell, N)),
    "one": lambda cell: (draw(I), None),
    "one hx": lambda cell: (draw(I), state_for(cell)),
    "no rows": lambda cell: (draw(0, I), state_for(cell, 0)),
    "strided": lambda cell: (
        draw(2 * N, 2 * I)[::2, ::2],
        changed(lambda s: s.mT.clone().mT, state_for(cell, N)),
    ),
    "expanded": lambda cell: (
        draw(1, I).expand(N, I),
        changed(lambda s: s[:1].expand(N, H), state_for(cell, N)),
    ),
}


@each_cell
@pytest.mark.parametrize("bias", (True, False), ids=("bias", "nobias"))
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_agrees(form, bias, cell):
    assert_same(*pair(cell, bias=bias), *form(cell))


def exact_step(cell, module, x, hx):
    """The reference of the step in float64, and its gradients, named as run does."""
    weights = {name: w.detach().double().requires_grad_() for name, w in module.named_parameters()}
    given = [t.detach().double().requires_grad_() for t in (x, *states_of(hx))]
    x, *state = given
    _, ends = reference.CELLS[cell](
        x[None], None, tuple(s[None] for s in state), [*weights.values()]
    )
    found = dict(zip(("h_n", "c_n"), (end[0] for end in ends), strict=False))
    leaves = {"x": x, **dict(zip(("h0", "c0"), state, strict=False)), **weights}
    d_out = [torch.linspace(-1, 1, t.numel()).to(module.weight_ih).double() for t in found.values()]
    d_out = [d.view_as(t) for d, t in zip(d_out, found.values(), strict=True)]
    grads = torch.autograd.grad(list(found.values()), list(leaves.values()), d_out)
    return found | {f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


@each_cell
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_as_accurate_as_torch(dtype, cell, device):
    """Every ISA, for few rows and for more than a tile; relu's kink is far from every sum."""
    for isa, rows in product(isas_for(dtype, device), (1, 17)):
        ops.set_isa(isa)
        theirs, ours = pair(cell, dtype=dtype)
        x, hx = draw(rows, I, dtype=dtype), state_for(cell, rows, dtype=dtype)
        if cell == "rnn_relu":
            for module in (theirs, ours):
                module.bias_ih.data[: H // 2], module.bias_ih.data[H // 2 :] = 16, -16
        exact = exact_step(cell, theirs, x, hx)
        expected, found = run(theirs, x, hx), run(ours, x, hx)
        assert not isa or ops.last_run()["isa"].startswith(isa.removesuffix("_bf16"))
        assert found.keys() == expected.keys() == exact.keys()
        for name, truth in exact.items():
            assert found[name].dtype is dtype
            largest, theirs_off = truth.abs().max().item(), error_of(expected[name], truth)
            limit = allowed(name, dtype, theirs_off, largest)
            assert error_of(found[name], truth) <= limit, (name, isa, rows)


@each_cell
def test_a_loop_of_steps_is_the_layer(cell):
    """Fed with its own states, as a decoder does: outputs, and gradients through all steps."""
    p = Problem(6, N, I, H, torch.float64, cell=cell)
    layer, step = p.module(lstm_fused), make(cell, lstm_fused)
    layer.load_state_dict({f"{name}_l0": w for name, w in step.state_dict().items()})
    x, hx, ys = draw(6, N, I), None, []
    for x_t in x:
        hx = step(x_t, hx)
        ys.append(states_of(hx)[0])
    expected = layer(x)[0]
    torch.testing.assert_close(torch.stack(ys), expected)
    found = torch.autograd.grad(torch.stack(ys).square().sum(), [x, *step.parameters()])
    by_layer = torch.autograd.grad(expected.square().sum(), [x, *layer.parameters()])
    torch.testing.assert_close(found, by_layer)


@each_cell
def test_gradients_of_every_order(cell):
    module, x = make(cell, lstm_fused), draw(2, I)
    leaves = (x, *states_of(state_for(cell, 2)), *module.parameters())
    count = 1 + has_cell_state(cell)

    def call(x, *tensors):
        states, weights = tensors[:count], tensors[count:]
        names = (name for name, _ in module.named_parameters())
        given = x, states if count > 1 else states[0]
        weights = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(module, weights, given)

    assert gradcheck(call, leaves, fast_mode=True)
    assert gradgradcheck(call, leaves, fast_mode=True)
    assert ops.last_run()["pass"] == "backward"


X = torch.ones(N, I, dtype=torch.float64)
S = torch.zeros(N, H, dtype=torch.float64)
# The input, and a state: given twice to an LSTMCell.
REFUSED = {
    "0-D": (X[0, 0], None),
    "3-D": (X[None], None),
    "width": (X[:, 1:], None),
    "width of one": (X[0, 1:], None),
    "float32": (X.float(), None),
    "integers": (X.long(), None),
    "state rows": (X, S[1:]),
    "state width": (X, S[:, 1:]),
    "state 3-D": (X, S[None]),
    "state float32": (X, S.float()),
    "state on meta": (X, S.to("meta")),
    "state of rows for one": (X[0], S),
    "no input": (None, None),
    "list": ([1.0], None),
}
ODD_STATES = {
    "number": lambda s: 3,
    "one": lambda s: (s,),
    "three": lambda s: (s, s, s),
    "empty": lambda s: (),
    "None and a state": lambda s: (None, s),
    "stacked": lambda s: torch.stack((s, s)),
    "list": lambda s: [s, s],
}


def outcome(module, *args):
    try:
        return states_of(module(*args))
    except Exception as error:
        return type(error), str(error)


@each_cell
@pytest.mark.parametrize("x, state", REFUSED.values(), ids=REFUSED)
def test_refused_alike(x, state, cell):
    """In torch's words, since its own forward is what refuses."""
    hx = (state, state) if has_cell_state(cell) and state is not None else state
    theirs, ours = pair(cell)
    expected = outcome(theirs, x, hx)
    assert isinstance(expected[0], type), "torch refuses it"
    assert outcome(ours, x, hx) == expected


@each_cell
@pytest.mark.parametrize("odd", ODD_STATES.values(), ids=ODD_STATES)
def test_odd_states(odd, cell):
    """Taken or refused as torch.nn does."""
    theirs, ours = pair(cell)
    expected, found = outcome(theirs, X, odd(S)), outcome(ours, X, odd(S))
    if isinstance(expected[0], type):
        assert found == expected
    else:
        torch.testing.assert_close(found, expected)


class Named(torch.Tensor):
    pass


THROUGH_TORCH = {
    "jvp": (lambda m: torch.func.jvp(m, (X,), (X,))[1], "jvp"),
    "vmap": (lambda m: torch.func.vmap(m)(X.expand(2, N, I)), "vmap"),
    "jit.trace": (lambda m: torch.jit.trace(m, X)(X), "torch.jit.trace"),
    "jit.script": (lambda m: torch.jit.script(nn.Sequential(m))(X), "torch.jit.script"),
    "subclass": (lambda m: m(X.as_subclass(Named)), "Named is a Tensor subclass"),
    "meta": (lambda m: m.to("meta")(X.to("meta")), "input is on meta"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "cell, call, reason",
    [
        pytest.param(cell, *row, id=f"{cell} {name}")
        for cell in CELLS
        for name, row in THROUGH_TORCH.items()
        if (cell, name) != ("lstm", "vmap")  # torch has no rule for it
    ],
)
def test_through_torch_with_one_warning(cell, call, reason):
    theirs, ours = pair(cell)
    expected = call(theirs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [call(copy.deepcopy(ours)), call(ours)]
    for result in found:
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
    said = [str(w.message) for w in caught if "lstm_fused" in str(w.message)]
    assert len(said) == 1
    assert f"ran through torch.nn.{CELLS[cell][0]}Cell" in said[0] and reason in said[0]


@each_cell
@pytest.mark.filterwarnings("ignore:lstm_fused.* ran through torch")
def test_autocast(cell):
    """Through torch, so that dtypes are torch's: a single step would only cast its weights."""
    theirs, ours = pair(cell, dtype=torch.float32)
    for of_x, of_state in product((torch.float32, torch.bfloat16), repeat=2):
        given = X.to(of_x), state_for(cell, N, dtype=of_state)
        with torch.autocast("cpu", torch.bfloat16):
            expected, found = outcome(theirs, *given), outcome(ours, *given)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_autocast_says_so():
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.warns(UserWarning, match="does not run under autocast"),
    ):
        make("gru", lstm_fused)(X)


CHANGES = {
    "data": lambda m: m.weight_hh.data.mul_(2),
    "Parameter": lambda m: setattr(m, "weight_ih", nn.Parameter(2 * m.weight_ih.detach())),
    "state_dict": lambda m: m.load_state_dict({k: 2 * w for k, w in m.state_dict().items()}),
    "weight_norm": lambda m: (
        parametrizations.weight_norm(m, "weight_hh")
        .parametrizations["weight_hh"]
        .original0.data.mul_(2)
    ),
    "pruned": lambda m: prune.l1_unstructured(m, "weight_ih", amount=0.5),
    "half and back": lambda m: m.half().double(),
}


@each_cell
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_next_call_sees(change, cell):
    theirs, ours = pair(cell)
    before = assert_same(theirs, ours, X, state_for(cell, N))["h_n"]
    for module in (theirs, ours):
        change(module)
    after = assert_same(theirs, ours, X, state_for(cell, N))["h_n"]
    assert not torch.equal(before, after)


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@each_cell
def test_copies_and_state_dict(cell):
    theirs, ours = pair(cell)
    assert repr(ours) == repr(theirs) and isinstance(ours, type(theirs))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), saved(ours)):
        assert type(twin) is type(ours)
        assert_same(theirs, twin, X, state_for(cell, N))


@each_cell
def test_modes(cell):
    theirs, ours = pair(cell)
    hx = state_for(cell, N)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = states_of(ours(X, hx))
            torch.testing.assert_close(found, states_of(theirs(X, hx)))
        assert all(t.is_inference() is (mode is torch.inference_mode) for t in found)
        assert not any(t.requires_grad for t in found)


@pytest.mark.dispatched
@each_cell
def test_compiles_and_exports(cell):
    torch._dynamo.reset()
    module = make(cell, lstm_fused)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 4, 7):
        given = draw(rows, I), state_for(cell, rows)
        found, expected = states_of(compiled(*given)), states_of(module(*given))
        torch.testing.assert_close(found, expected)
        leaves = [*states_of(given[1]), *module.parameters()]
        grads = [
            torch.autograd.grad([s.square().sum() for s in out], leaves)
            for out in (found, expected)
        ]
        torch.testing.assert_close(*grads)
    program = torch.export.export(module, (X, changed(torch.Tensor.detach, state_for(cell, N))))
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(torch.ops.lstm_fused.recurrent_forward.default) == 1
    torch._dynamo.reset()


@each_cell
def test_fx_keeps_it_whole(cell):
    """As torch.fx does torch.nn's own."""
    traced = torch.fx.symbolic_trace(nn.Sequential(make(cell, lstm_fused)))
    assert [n.op for n in traced.graph.nodes] == ["placeholder", "call_module", "output"]
    torch.testing.assert_close(states_of(traced(X)), states_of(make(cell, lstm_fused)(X)))


def test_unknown_nonlinearity():
    """torch.nn.RNNCell takes any word, and refuses it when called."""
    for library in (nn, lstm_fused):
        with pytest.raises(RuntimeError, match="Unknown nonlinearity: sin"):
            library.RNNCell(I, H, nonlinearity="sin", dtype=torch.float64)(X)
