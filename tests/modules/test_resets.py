"""resets= is what a loop over the rows and steps with torch.nn gives, in every form of input."""

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import lstm_fused
from lstm_fused import runtime
from tests.helpers import loops
from tests.helpers.compare_modules import (
    H,
    I,
    T,
    assert_accurate,
    draw,
    each_cell,
    each_option,
    pair,
    state_for,
    states_of,
)
from tests.helpers.oracle import CELLS

N = 4


def at(*places):
    """(T, N), True at the places (t, n)."""
    mask = torch.zeros(T, N, dtype=torch.bool)
    for t, n in places:
        mask[t, n] = True
    return mask


MASKS = {
    "none": at(),
    "all": torch.ones(T, N, dtype=torch.bool),
    "first step": at(*((0, n) for n in range(N))),
    "last step": at(*((T - 1, n) for n in range(N))),
    "adjacent": at((2, 0), (3, 0), (1, 1), (2, 2), (3, 3), (4, 3)),
    "one row": at((0, 2), (2, 2)),
}


def reset_states(kind, module):
    """reset_state: None, one for all rows, or one a row."""
    if kind == "zeros":
        return None
    return states_of(state_for(module, None if kind == "one" else N))


def of_each_row(states, rows=N):
    """Each (L*D, rows, width)."""
    return states and tuple(
        s.unsqueeze(1).expand(-1, rows, -1) if s.dim() == 2 else s for s in states
    )


def leaves_of(module, x, state, reset_state):
    named = {"x": x, **dict(module.named_parameters())}
    for name, states in (("0", state), ("_reset", reset_state)):
        named |= {f"{kind}{name}": s for kind, s in zip("hc", states or (), strict=False)}
    return named


def compare(form, cell, options, mask, with_state=True, kind="row", **more):
    """Assert that ours gives what the loop with torch.nn does; returns what ours gave."""
    theirs, ours = pair(cell=cell, **options)
    call, lengths = loops.FORMS[form]
    x = draw(T, N, I)
    state = states_of(state_for(ours, N)) if with_state else ()
    reset = reset_states(kind, ours)
    expected = loops.results(
        loops.by_steps,
        *(theirs, x, state, mask, of_each_row(reset), lengths),
        leaves=leaves_of(theirs, x, state, reset),
    )
    leaves = leaves_of(ours, x, state, reset)
    found = loops.results(call, ours, x, state, mask, reset, lengths, leaves=leaves, **more)
    torch.testing.assert_close(found, expected)
    return found


@pytest.mark.usefixtures("device")
@pytest.mark.covering
@each_option
@pytest.mark.parametrize("kind", ("zeros", "one", "row"))
@pytest.mark.parametrize("with_state", (False, True), ids=("", "hx"))
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("form", loops.FORMS)
def test_resets(form, mask, with_state, kind, cell, options):
    compare(form, cell, options, mask, with_state, kind)
    assert runtime.last_run()["pass"] == "backward"


def test_random_masks():
    """Of any form, size and mask; lengths are drawn for the forms that have them."""
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.settings(max_examples=40)
    @hypothesis.given(data=st.data())
    def check(data):
        cell = data.draw(st.sampled_from(tuple(CELLS)))
        form = data.draw(st.sampled_from(tuple(loops.FORMS)))
        T, N, features, hidden = (data.draw(st.integers(1, most)) for most in (6, 4, 3, 19))
        options = {"num_layers": data.draw(st.integers(1, 2))}
        options |= {name: data.draw(st.booleans()) for name in ("bidirectional", "batch_first")}
        theirs, ours = pair(features, hidden, cell=cell, **options)
        row = st.lists(st.booleans(), min_size=N, max_size=N)
        mask = torch.tensor(data.draw(st.lists(row, min_size=T, max_size=T)))
        call, lengths = loops.FORMS[form]
        if lengths is not None:
            least = 1 if "packed" in call.__name__ else 0
            each = st.lists(st.integers(least, T), min_size=N, max_size=N)
            lengths = data.draw(each.filter(lambda found: sum(found) > 0))
            if least:  # a PackedSequence is as long as its longest row
                mask = mask[: max(lengths)]
        x = draw(len(mask), N, features)
        state, reset = (states_of(state_for(ours, N)) for _ in range(2))
        results = []
        for run, module in ((loops.by_steps, theirs), (call, ours)):
            leaves = leaves_of(module, x, state, reset)
            given = x, state, mask, reset, lengths
            results.append(loops.results(run, module, *given, leaves=leaves))
        torch.testing.assert_close(*results)

    check()


@each_option
@pytest.mark.parametrize("kind", ("zeros", "one"))
def test_unbatched(kind, cell, options):
    theirs, ours = pair(cell=cell, **options)
    x, mask = draw(T, 1, I), MASKS["adjacent"][:, :1]
    state, reset = states_of(state_for(ours, 1)), reset_states(kind, ours)
    leaves = [leaves_of(module, x, state, reset) for module in (theirs, ours)]
    each = of_each_row(reset, 1)
    expected = loops.results(loops.by_steps, theirs, x, state, mask, each, leaves=leaves[0])
    found = loops.results(loops.unbatched, ours, x, state, mask, reset, leaves=leaves[1])
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("device")
@each_cell
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("directions", (1, 2))
def test_accuracy(directions, dtype, cell):
    """At most twice the error of torch.nn in the same dtype."""
    theirs, ours = pair(cell=cell, bidirectional=directions == 2, dtype=dtype)
    x, mask = draw(T, N, I, dtype=dtype), MASKS["adjacent"]
    state, reset = (states_of(state_for(ours, N, dtype)) for _ in range(2))
    with torch.no_grad():
        found = loops.results(loops.dense, ours, x, state, mask, reset, leaves={})
        expected = loops.results(loops.by_steps, theirs, x, state, mask, reset, leaves={})
        doubled = [tuple(s.double() for s in states) for states in (state, reset)]
        exactly = theirs.double(), x.double(), doubled[0], mask, doubled[1]
        exact = loops.results(loops.by_steps, *exactly, leaves={})
    assert_accurate(found, expected, exact, dtype)


@each_cell
def test_nothing_passes_a_reset(cell):
    """NaN before a reset stays there, and so do gradients, in both directions."""
    _, ours = pair(cell=cell, bidirectional=True)
    x = draw(T, N, I)
    mask = torch.zeros(T, N, dtype=torch.bool)
    mask[2] = True
    y, _ = ours(x, resets=mask)
    (grad,) = torch.autograd.grad(y[:2].sum(), x)
    assert grad[:2].all() and not grad[2:].any()
    x = x.detach().clone()
    x[:2] = float("nan")
    y, _ = ours(x, resets=mask)
    assert y[:2].isnan().all() and y[2:].isfinite().all()


@each_cell
def test_inference(cell):
    _, ours = pair(cell=cell, num_layers=2)
    x, mask = draw(T, N, I), MASKS["adjacent"]
    with torch.inference_mode():
        found = ours(x, resets=mask)
    torch.testing.assert_close(found, ours(x, resets=mask))
    assert not found[0].requires_grad


def test_dropout_draws_the_same_masks():
    _, ours = pair(num_layers=3, dropout=0.4)
    x = draw(T, N, I)
    found = []
    for resets in (None, MASKS["none"]):
        torch.manual_seed(2)
        found.append(ours(x, resets=resets))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("layers", (1, 2))
def test_autocast(layers):
    _, ours = pair(num_layers=layers, dtype=torch.float32)
    x, mask = draw(T, N, I, dtype=torch.float32), MASKS["adjacent"]
    reset = state_for(ours, N, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, (h, c) = ours(x, resets=mask, reset_state=reset)
        plain = ours(x)
    assert y.dtype is plain[0].dtype and c.dtype is plain[1][1].dtype
    exact = ours.double()(x.double(), resets=mask, reset_state=tuple(s.double() for s in reset))
    torch.testing.assert_close(y.double(), exact[0], rtol=0, atol=0.03)
    y.sum().backward()
    assert x.grad.isfinite().all() and all(s.grad.any() for s in reset)


@pytest.mark.parametrize("name", ("dense", "lengths", "packed", "documents"))
def test_compiles(name):
    _, ours = pair(bidirectional=True, num_layers=2)
    x, mask, reset = draw(T, N, I), MASKS["adjacent"], state_for(ours, N)
    hx = state_for(ours, N)
    given = {
        "dense": (lambda: x, {}),
        "lengths": (lambda: x, {"lengths": torch.tensor(loops.LENGTHS)}),
        "packed": (lambda: pack_padded_sequence(x, [5, 3, 3, 1]), {}),
        "documents": (lambda: x.flatten(0, 1)[:9], {"cu_seqlens": torch.tensor([0, 2, 2, 8, 9])}),
    }
    input, more = given[name]
    more |= {"resets": mask if name != "documents" else mask.flatten()[:9], "reset_state": reset}
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    leaves = [x, *states_of(hx), *states_of(reset), *ours.parameters()]
    results = []
    for module in (compiled, ours):
        y, ends = module(input(), hx, **more)
        outputs = [y.data if name == "packed" else y, *ends]
        loss = sum((t * t.detach().cos()).sum() for t in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(*results)


def test_exports():
    _, ours = pair(num_layers=2)
    x, mask = draw(T, N, I, grad=False), MASKS["adjacent"]
    program = torch.export.export(ours, (x,), {"resets": mask})
    other = ~mask
    torch.testing.assert_close(program.module()(x, resets=other), ours(x, resets=other))
    program = program.run_decompositions(lstm_fused.decompositions())
    assert "lstm_fused" not in str(program.graph)
    torch.testing.assert_close(program.module()(x, resets=other), ours(x, resets=other))


def test_vmap_and_func_grad():
    _, ours = pair(bidirectional=True)
    x = draw(3, T, N, I, grad=False)
    masks = torch.rand(3, T, N) < 0.3

    def loss(x, mask):
        return ours(x, resets=mask)[0].square().sum()

    found = torch.func.vmap(torch.func.grad(loss))(x, masks)
    each = [torch.func.grad(loss)(*pair) for pair in zip(x, masks, strict=True)]
    torch.testing.assert_close(found, torch.stack(each))


@each_cell
def test_gradcheck(cell):
    _, ours = pair(cell=cell, bidirectional=True)
    x, reset = draw(3, 2, I), state_for(ours, 2)
    mask = torch.tensor([[1, 0], [0, 1], [1, 0]]).bool()

    def call(x, *reset):
        y, ends = ours(x, resets=mask, reset_state=loops.as_hx(ours, reset))
        return y, *states_of(ends)

    assert torch.autograd.gradcheck(call, (x, *states_of(reset)))
    assert torch.autograd.gradgradcheck(call, (x, *states_of(reset)), atol=1e-4)


BOOLS = torch.zeros(T, N, dtype=torch.bool)
ERRORS = {
    "list": (lambda m, x: m(x, resets=[[True]]), TypeError, "resets must be a bool Tensor"),
    "float": (lambda m, x: m(x, resets=BOOLS.float()), TypeError, "dtype torch.bool, got"),
    "transposed": (
        lambda m, x: m(x, resets=BOOLS.t()),
        ValueError,
        r"resets must have shape \(T, N\), \(5, 4\) here, got \(4, 5\)",
    ),
    "unbatched": (lambda m, x: m(x[:, 0], resets=BOOLS), ValueError, r"\(T,\), \(5,\) here"),
    "meta": (
        lambda m, x: m(x, resets=BOOLS.to("meta")),
        RuntimeError,
        "resets must be on cpu as input is, got meta",
    ),
    "packed shape": (
        lambda m, x: m(pack_padded_sequence(x, [5, 3, 3, 1]), resets=BOOLS[:4]),
        ValueError,
        r"\(T, N\), \(5, 4\) here, got \(4, 4\)",
    ),
    "packed otherwise": (
        lambda m, x: m(
            pack_padded_sequence(x, [5, 3, 3, 1]),
            resets=pack_padded_sequence(BOOLS, [5, 4, 2, 1]),
        ),
        ValueError,
        "resets must be packed as input is",
    ),
    "packed resets of a padded input": (
        lambda m, x: m(x, resets=pack_padded_sequence(BOOLS, [5, 3, 3, 1])),
        TypeError,
        "got PackedSequence",
    ),
    "reset_state alone": (
        lambda m, x: m(x, reset_state=state_for(m, N)),
        ValueError,
        "reset_state is given without resets",
    ),
    "reset_state width": (
        lambda m, x: m(x, resets=BOOLS, reset_state=(draw(1, H), draw(1, H + 1))),
        RuntimeError,
        r"reset_state\[1\] must have shape \(1, 6\), or \(1, 4, 6\)",
    ),
    "reset_state rows": (
        lambda m, x: m(x, resets=BOOLS, reset_state=(draw(1, 3, H), draw(1, H))),
        RuntimeError,
        r"reset_state\[0\] must have",
    ),
    "reset_state a tensor": (
        lambda m, x: m(x, resets=BOOLS, reset_state=draw(1, H)),
        TypeError,
        r"reset_state must be a tuple \(h, c\)",
    ),
    "reset_state dtype": (
        lambda m, x: m(x, resets=BOOLS, reset_state=(draw(1, H).float(), draw(1, H))),
        RuntimeError,
        r"reset_state\[0\] with torch.float32",
    ),
    "hx dtype": (
        lambda m, x: m(
            *(x, (draw(1, N, H).float(), draw(1, N, H))),
            resets=BOOLS,
            reset_state=state_for(m, N),
        ),
        RuntimeError,
        r"hx\[0\] with torch.float32",
    ),
    "jit.trace": (
        lambda m, x: torch.jit.trace(lambda x: m(x, resets=BOOLS), x),
        RuntimeError,
        "torch.export records them",
    ),
    "nested": (
        lambda m, x: m(torch.nested.nested_tensor([*x]), resets=BOOLS),
        RuntimeError,
        "beyond torch.nn, which would run this call: the input is a nested tensor",
    ),
}


@pytest.mark.parametrize("call, kind, words", ERRORS.values(), ids=ERRORS)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*nested", "ignore:.*trace")
def test_errors(call, kind, words):
    with pytest.raises(kind, match=words):
        call(pair()[1], draw(T, N, I, grad=False))


def test_onnx_says_what_to_do():
    pytest.importorskip("onnxscript")
    _, ours = pair(dtype=torch.float32)
    given = draw(T, N, I, dtype=torch.float32, grad=False), None, None
    with pytest.raises(Exception, match="ONNX's LSTM, GRU and RNN have no resets: export a model"):
        torch.onnx.export(ours, given[:1], kwargs={"resets": BOOLS}, dynamo=True, verbose=False)


class Named(torch.Tensor):
    pass


@pytest.mark.parametrize("cell", ("lstm", "gru"))
@pytest.mark.parametrize("every", (None, 2))
def test_reference_runs_what_no_kernel_does(every, cell):
    """With one warning, and the same results and gradients."""
    _, ours = pair(cell=cell, bidirectional=True, num_layers=2)
    x, mask, reset = draw(T, N, I), MASKS["adjacent"], state_for(ours, N)
    more = {"resets": mask, "reset_state": reset, "checkpoint_every": every}
    more |= {"return_cell_states": True} if cell == "lstm" else {}
    with pytest.warns(UserWarning, match="ran through its reference in pure torch: Named is a"):
        found = ours(x.as_subclass(Named), **more)
    expected = ours(x, **more)
    leaves = [x, *states_of(reset), *ours.parameters()]
    grads = []
    for y, ends, *cells in (found, expected):
        loss = sum((t * t.detach().cos()).sum() for t in (y, *states_of(ends), *cells))
        grads.append(torch.autograd.grad(loss, leaves))
    torch.testing.assert_close([t.as_subclass(torch.Tensor) for t in grads[0]], [*grads[1]])
