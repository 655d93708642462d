"""LSTMCell, GRUCell and RNNCell against torch.nn's: parity, forms of input, errors, fallback."""

import copy
import io
import pickle
import warnings
from itertools import product

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils import parametrizations, prune

import lstm_fused
from lstm_fused import reference, runtime
from lstm_fused.testing.tolerance import allowed, error_of
from tests.helpers.compare_modules import autocast, changed, ones, outcome, states_of
from tests.helpers.oracle import CELLS, Problem, has_cell_state, on_default_device
from tests.helpers.plan_coverage import DTYPES, isas_for

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
    ours = isinstance(module, lstm_fused.single_step.Cell) and x.numel()
    assert not ours or runtime.last_run()["pass"] == "forward"
    leaves = {"x": x, **dict(zip(("h0", "c0"), states_of(hx), strict=False))}
    leaves |= module.named_parameters()
    leaves = {name: t for name, t in leaves.items() if t.requires_grad}
    d_out = [torch.linspace(-1, 1, t.numel()).to(t).view_as(t) for t in found.values()]
    grads = torch.autograd.grad(list(found.values()), list(leaves.values()), d_out)
    assert not ours or runtime.last_run()["pass"] == "backward"
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
        runtime.set_isa(isa)
        theirs, ours = pair(cell, dtype=dtype)
        x, hx = draw(rows, I, dtype=dtype), state_for(cell, rows, dtype=dtype)
        if cell == "rnn_relu":
            for module in (theirs, ours):
                module.bias_ih.data[: H // 2], module.bias_ih.data[H // 2 :] = 16, -16
        exact = exact_step(cell, theirs, x, hx)
        expected, found = run(theirs, x, hx), run(ours, x, hx)
        assert not isa or runtime.last_run()["isa"].startswith(isa.removesuffix("_bf16"))
        assert found.keys() == expected.keys() == exact.keys()
        for name, truth in exact.items():
            assert found[name].dtype is dtype
            largest, theirs_off = truth.abs().max().item(), error_of(expected[name], truth)
            limit = allowed(name, dtype, theirs_off, largest)
            assert error_of(found[name], truth) <= limit, (name, isa, rows)


@each_cell
def test_cell_loop_equals_layer(cell):
    """Called on its own states step by step: outputs, and gradients through all steps."""
    p = on_default_device(Problem(6, N, I, H, torch.float64, cell=cell))
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
    assert runtime.last_run()["pass"] == "backward"


# Of an input (N, I) and a state (N, H) those that are given, the state twice to an LSTMCell.
ERRORS = {
    "0-D": lambda x, s: (x[0, 0], None),
    "3-D": lambda x, s: (x[None], None),
    "width": lambda x, s: (x[:, 1:], None),
    "width of one": lambda x, s: (x[0, 1:], None),
    "float32": lambda x, s: (x.float(), None),
    "integers": lambda x, s: (x.long(), None),
    "state rows": lambda x, s: (x, s[1:]),
    "state width": lambda x, s: (x, s[:, 1:]),
    "state 3-D": lambda x, s: (x, s[None]),
    "state float32": lambda x, s: (x, s.float()),
    "state on meta": lambda x, s: (x, s.to("meta")),
    "state 0-D": lambda x, s: (x[0], s[0, 0]),
    "no input": lambda x, s: (None, None),
    "list": lambda x, s: ([1.0], None),
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


@each_cell
@pytest.mark.parametrize("given", ERRORS.values(), ids=ERRORS)
def test_same_errors_as_torch(given, cell):
    """The error is torch's, because torch's forward raises it."""
    x, state = given(ones(N, I), ones(N, H))
    hx = (state, state) if has_cell_state(cell) and state is not None else state
    theirs, ours = pair(cell)
    expected = outcome(theirs, x, hx)
    assert isinstance(expected[0], type), "torch raises"
    assert outcome(ours, x, hx) == expected


# Shapes of an input and of states of which at least one is of another rank.
RANKS = {
    "rows for one": ((I,), (N, H), (N, H)),
    "H rows for one": ((I,), (H, H), (H, H)),
    "h of rows for one": ((I,), (H, H), (H,)),
    "c of rows for one": ((I,), (H,), (H, H)),
    "c of one column for one": ((I,), (H,), (H, 1)),
    "one for rows": ((N, I), (H,), (H,)),
    "one for H rows": ((H, I), (H,), (H,)),
    "h of one for rows": ((H, I), (H,), (H, H)),
    "c of one for rows": ((H, I), (H, H), (H,)),
}


@each_cell
@pytest.mark.parametrize("grad", (True, False), ids=("grad", "no_grad"))
@pytest.mark.parametrize("shapes", RANKS.values(), ids=RANKS)
def test_ranks(shapes, grad, cell):
    """An error here; torch.nn gives a wrong shape or crashes for the first of these."""
    x, *states = (draw(*shape, grad=grad) for shape in shapes)
    name, forms = r"hx\[[01]\]", (tuple(states), states)
    if not has_cell_state(cell):
        wrong = [s for s in states if s.dim() != x.dim()]
        name, forms = "hx", wrong[:1]
    for hx in forms:
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=f"input, {name} "):
            make(cell, lstm_fused)(x, hx)


@each_cell
@pytest.mark.filterwarnings("ignore:lstm_fused.* ran through torch")
@pytest.mark.parametrize("rows", (None, 0, 2), ids=str)
@pytest.mark.parametrize("sizes", ((0, 2), (2, 0), (0, 0)), ids=str)
def test_zero_sizes(sizes, rows, cell):
    """Which torch.nn's cells take, and its layers do not."""
    name, more = CELLS[cell]
    batch = () if rows is None else (rows,)
    for bias, with_state, grad in product((True, False), repeat=3):
        results = []
        for library in (nn, lstm_fused):
            torch.manual_seed(1)
            kind = getattr(library, f"{name}Cell")
            module = kind(*sizes, bias=bias, dtype=torch.float64, **more)
            x = draw(*batch, sizes[0])
            states = tuple(draw(*batch, sizes[1]) for _ in range(1 + has_cell_state(cell)))
            hx = (states if has_cell_state(cell) else states[0]) if with_state else None
            with torch.set_grad_enabled(grad):
                out = states_of(module(x, hx))
            leaves = [x, *states_of(hx), *module.parameters()]
            loss = sum(s.square().sum() for s in out)
            grads = torch.autograd.grad(loss, leaves, allow_unused=True) if grad else ()
            results.append((out, grads))
        torch.testing.assert_close(*results, rtol=0, atol=0)


@each_cell
@pytest.mark.parametrize("odd", ODD_STATES.values(), ids=ODD_STATES)
def test_unusual_states(odd, cell):
    """Accepted or an error as in torch.nn."""
    theirs, ours = pair(cell)
    for rows in ((N,), ()):
        x, hx = ones(*rows, I), odd(ones(*rows, H))
        expected, found = outcome(theirs, x, hx), outcome(ours, x, hx)
        if isinstance(expected[0], type):
            assert found[0] is expected[0]
            assert found[1] == expected[1] or "input, hx should" in found[1]
        else:
            torch.testing.assert_close(found, expected)


class Named(torch.Tensor):
    pass


THROUGH_TORCH = {
    "jit.trace": (lambda m, x: torch.jit.trace(m, x)(x), "torch.jit.trace"),
    "jit.script": (lambda m, x: torch.jit.script(nn.Sequential(m))(x), "torch.jit.script"),
    "subclass": (lambda m, x: m(x.as_subclass(Named)), "Named is a Tensor subclass"),
    "meta": (lambda m, x: m.to("meta")(x.to("meta")), "input is on meta"),
    "sparse": (lambda m, x: m(x.to_sparse()), "input's layout is torch.sparse_coo"),
    "no input": (
        lambda m, x: type(m)(0, H, bias=False, dtype=x.dtype)(x[:, :0]),
        "needs an input_size and a hidden_size of at least 1",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "cell, call, reason",
    [
        pytest.param(cell, *row, id=f"{cell} {name}")
        for cell in CELLS
        for name, row in THROUGH_TORCH.items()
    ],
)
def test_fallback_warns_once(cell, call, reason, device):
    theirs, ours = pair(cell)
    x = ones(N, I)
    expected = outcome(call, theirs, x)
    if expected[0] is NotImplementedError:  # forward mode, where torch has a fused cell
        assert device == "cuda" and outcome(call, ours, x) == expected
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [call(copy.deepcopy(ours), x), call(ours, x)]
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
        given = ones(N, I).to(of_x), state_for(cell, N, dtype=of_state)
        with autocast(torch.bfloat16):
            expected, found = outcome(theirs, *given), outcome(ours, *given)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_autocast_says_so():
    with (
        autocast(torch.bfloat16),
        pytest.warns(UserWarning, match="does not run under autocast"),
    ):
        make("gru", lstm_fused)(ones(N, I))


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
def test_changes_take_effect(change, cell):
    theirs, ours = pair(cell)
    x = ones(N, I)
    before = assert_same(theirs, ours, x, state_for(cell, N))["h_n"]
    for module in (theirs, ours):
        change(module)
    after = assert_same(theirs, ours, x, state_for(cell, N))["h_n"]
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
        assert_same(theirs, twin, ones(N, I), state_for(cell, N))


@each_cell
def test_modes(cell):
    theirs, ours = pair(cell)
    x, hx = ones(N, I), state_for(cell, N)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = states_of(ours(x, hx))
            torch.testing.assert_close(found, states_of(theirs(x, hx)))
        assert all(t.is_inference() is (mode is torch.inference_mode) for t in found)
        assert not any(t.requires_grad for t in found)


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
    hx = changed(torch.Tensor.detach, state_for(cell, N))
    program = torch.export.export(module, (ones(N, I), hx))
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(torch.ops.lstm_fused.recurrent_forward.default) == 1
    torch._dynamo.reset()


@each_cell
def test_fx_keeps_layers_as_leaves(cell):
    """As torch.fx does torch.nn's own."""
    traced = torch.fx.symbolic_trace(nn.Sequential(make(cell, lstm_fused)))
    assert [n.op for n in traced.graph.nodes] == ["placeholder", "call_module", "output"]
    x = ones(N, I)
    torch.testing.assert_close(states_of(traced(x)), states_of(make(cell, lstm_fused)(x)))


def test_unknown_nonlinearity():
    """torch.nn.RNNCell accepts any nonlinearity and raises when called."""
    for library in (nn, lstm_fused):
        with pytest.raises(RuntimeError, match="Unknown nonlinearity: sin"):
            library.RNNCell(I, H, nonlinearity="sin", dtype=torch.float64)(ones(N, I))
