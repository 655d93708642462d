"""Resets, reset states, all cell states and documents: parity, derivatives, every transform."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.func import grad, vmap
from torch.library import opcheck

import lstm_fused
from lstm_fused import ops, padded, reference, runtime
from lstm_fused.operators import backward_op, forward_op, jvp_op, samples_op
from tests.helpers import described, emulated
from tests.helpers.oracle import EVERY_CELL, has_cell_state, may_project
from tests.helpers.plan_coverage import DTYPES
from tests.helpers.sequences import MASKS, ROWS, Sequence, violations
from tests.helpers.transforms import TRANSFORMS, assert_close, run, total

pytest.importorskip("hypothesis")

from hypothesis import assume, given
from hypothesis import strategies as st

FORMS = [
    Sequence(),
    Sequence("lstm", 2, state="with reset", cells=True),
    Sequence("gru", 2, state="with reset"),
    Sequence("rnn_tanh", rows="packed", state="with reset"),
    Sequence("rnn_relu", 2, mask="adjacent"),
    Sequence("lstm", 2, rows="packed", state="with reset", cells=True),
    Sequence("lstm", 2, rows="documents", mask="", cells=True),
    Sequence("gru", 2, rows="documents", state="with reset"),
    Sequence("lstm", 2, proj=2, state="with reset", cells=True, bias=False),
    Sequence("lstm", mask="", cells=True),
    Sequence("lstm", 2, state="with reset", cells=True, save_every=2),
    Sequence("gru", mask="", save_every=3),
    Sequence("rnn_tanh", 2, save_every=2, state="with reset"),
    Sequence("lstm", proj=2, mask="", bias=False, save_every=2),
    Sequence("rnn_relu", rows="packed", mask="", save_every=2),
    Sequence("peephole_lstm", 2, proj=2, state="with reset", cells=True),
    Sequence("regularized_lstm", 2, state="with reset", cells=True, save_every=2),
    Sequence("regularized_lstm", rows="documents", bias=False),
    Sequence("regularized_gru", 2, rows="packed", state="with reset"),
    Sequence("coupled_lstm", rows="documents", state="with reset", cells=True),
    Sequence("ind_rnn", 2, state="none"),
    Sequence("ind_rnn_tanh", rows="packed", save_every=2),
    Sequence("sru", 2, state="with reset", cells=True, save_every=3),
    Sequence("qrnn", rows="packed", state="none", cells=True),
    Sequence("min_gru", 2, rows="documents", mask=""),
    Sequence("min_lstm", 2, mask="adjacent", bias=False),
    Sequence("slstm", 2, state="with reset", cells=True, save_every=2),
    Sequence("slstm", mask="", state="none", H=32),
    Sequence("slstm", rows="packed", cells=True),
    Sequence("layer_norm_lstm", 2, rows="packed", state="with reset", cells=True),
    Sequence("layer_norm_lstm_carried", proj=2, save_every=2),
    Sequence("layer_norm_gru", 2, rows="documents", state="with reset"),
]
KINKED = ("rnn_relu", *described.KINKED)


def goals_of(form):
    return {form.cell, form.rows, form.state, form.cells}


each_form = pytest.mark.parametrize("form", FORMS, ids=str)


@st.composite
def sequences(draw):
    cell = draw(st.sampled_from(EVERY_CELL))
    hidden = draw(st.integers(1, 40))
    mask = draw(st.sampled_from(("", *MASKS)))
    return Sequence(
        cell,
        directions=draw(st.integers(1, 2)),
        rows=draw(st.sampled_from(ROWS)),
        mask=mask,
        state=draw(st.sampled_from(("none", "given", "with reset")[: 3 if mask else 2])),
        cells=draw(st.booleans()) and has_cell_state(cell),
        proj=draw(st.integers(0, hidden - 1)) if may_project(cell) else 0,
        bias=draw(st.booleans()),
        T=draw(st.integers(1, 9)),
        N=draw(st.integers(1, 12)),
        I=draw(st.integers(1, 20)),
        H=hidden,
        save_every=draw(st.sampled_from((1, 1, 2, 3, 7))),
    )


@given(sequence=sequences(), dtype=st.sampled_from(DTYPES), threads=st.integers(1, 3))
def test_parity(sequence, dtype, threads):
    # relu's slope jumps at 0, so that a rounding error may decide a gradient.
    assume(sequence.cell not in KINKED or dtype is torch.float64)
    assume(not described.is_invariant(sequence.cell, sequence.I, sequence.proj or sequence.H))
    torch.set_num_threads(threads)
    lines = violations(sequence, dtype)
    assert not lines, "\n".join([f"{sequence} {dtype}", *lines])
    last = runtime.last_run()
    assert (last["pass"], last["dtype"]) == ("backward", str(dtype).removeprefix("torch."))


def each_transform_of(forms):
    """name, form: without gradients of states where there are none."""
    cases = [(name, f) for f in forms for name in TRANSFORMS]
    cases = [(n, f) for n, f in cases if n != "grad of states" or f.state != "none"]
    return pytest.mark.parametrize(("name", "form"), cases, ids=str)


@pytest.mark.covering(goals=lambda name, form: {form, (name, form.rows), (name, form.save_every)})
@each_transform_of(FORMS)
def test_transform(name, form):
    assert_close(run(name, form, lstm_fused), run(name, form, "reference"))


@pytest.mark.covering(goals=lambda name, form: {name, form})
@each_transform_of([FORMS[1], FORMS[2], FORMS[5], FORMS[10]])
def test_on_cuda_kernels(name, form):
    """As the CUDA kernels save tensors (emulated)."""
    with emulated.kernels():
        found = run(name, form, lstm_fused)
    assert_close(found, run(name, form, "reference"))


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


COMPILED = [
    (name, FORMS[k % len(FORMS)]) for k, name in enumerate(TRANSFORMS) if name != "forward mode"
]


@pytest.mark.covering(goals=lambda name, form: {form.rows, form.cells})
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name, form", COMPILED, ids=str)
def test_compiled_transform(name, form):
    found = run(name, form, lstm_fused, lambda f: torch.compile(f, backend="aot_eager"))
    assert_close(found, run(name, form, "reference"))


def leaves(form):
    """(x, *states), and the weights; all require gradients."""
    tensors = [t.requires_grad_() for t in form.inputs()]
    return tensors, [w.detach().requires_grad_() for w in form.module().parameters()]


SMALL = [replace(form, T=3, N=2, I=1, H=2, proj=min(form.proj, 1)) for form in FORMS]


@pytest.mark.covering(goals=goals_of)
@pytest.mark.parametrize("form", SMALL, ids=str)
def test_gradcheck(form):
    tensors, weights = leaves(form)
    if form.cell in KINKED:  # away from the step of relu's slope
        with torch.no_grad():
            for w in weights:
                w.copy_(w.abs())
            for t in tensors:
                t.copy_(t.abs() + 0.1)

    def f(*given):
        return form.run(form.layer, list(given[len(tensors) :]), *given[: len(tensors)])

    # Second derivatives of described cells are those of their reference, which is slow.
    torch.autograd.gradcheck(f, (*tensors, *weights), check_forward_ad=True)
    torch.autograd.gradgradcheck(f, (*tensors, *weights), fast_mode=form.cell in described.CELLS)


@pytest.mark.covering(goals=lambda form, where: {(form.cell, where), form.cells})
@pytest.mark.parametrize("where", range(2))
@pytest.mark.parametrize("form", [f for f in FORMS if f.mask], ids=str)
def test_vmap_of_resets(form, where):
    """A mask for each example, its dimension at different places, with and without inputs."""
    masks = torch.stack([form.resets_of(draw) for draw in range(4)], where)
    inputs = [torch.stack([t, t.cos(), t.sin(), -t]) for t in form.inputs()]
    weights = [w.detach() for w in form.module().parameters()]

    def gradients(layer, weights, mask, *given):
        def loss(weights, *given):
            return total(form.run(layer, weights, *given, resets=mask))

        return grad(loss, tuple(range(1 + len(given))))(weights, *given)

    for call in (
        lambda layer, *args: form.run(layer, args[0], *args[2:], resets=args[1]),
        gradients,
    ):
        for weights_dim, given_dim in ((None, 0), (None, None), (0, 0)):
            ws = [torch.stack([w, 2 * w, w.sin(), -w]) if weights_dim == 0 else w for w in weights]
            given = [t if given_dim == 0 else t[0] for t in inputs]
            found, expected = (
                vmap(partial(call, layer), (weights_dim, where, *[given_dim] * len(given)))(
                    ws, masks, *given
                )
                for layer in (form.layer, reference.CELLS[form.cell])
            )
            assert_close(found, expected)


@pytest.mark.covering(goals=goals_of)
@pytest.mark.parametrize("form", [*FORMS, Sequence("gru", rows="packed", state="none")], ids=str)
@pytest.mark.usefixtures("fresh_compiler")
def test_compile(form):
    """In one graph, of which the numbers of steps and rows are no part."""
    compiled = torch.compile(
        lambda weights, *ts: form.run(form.layer, weights, *ts), backend="aot_eager", fullgraph=True
    )
    for grown in (0, 2, 3):
        form = replace(form, T=form.T + grown, N=form.N + grown)
        tensors, weights = leaves(form)
        expected = form.run(reference.CELLS[form.cell], weights, *tensors)
        found = compiled(weights, *tensors)
        assert_close(found, expected)
        each = [torch.autograd.grad(total(out), [*tensors, *weights]) for out in (found, expected)]
        assert_close(*each)
        with torch.no_grad():
            assert_close(compiled(weights, *tensors), expected)


@pytest.mark.covering(goals=lambda form: {form.rows})
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.usefixtures("fresh_compiler")
def test_inductor(form):
    tensors, weights = leaves(form)
    call = torch.compile(lambda weights, *ts: form.run(form.layer, weights, *ts), fullgraph=True)
    results = [
        (out, torch.autograd.grad(total(out), [*tensors, *weights]))
        for out in (
            call(weights, *tensors),
            form.run(reference.CELLS[form.cell], weights, *tensors),
        )
    ]
    assert_close(*results)


class Exported(torch.nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form = form
        self.weights = torch.nn.ParameterList(form.module().parameters())

    def forward(self, resets, *tensors):
        return self.form.run(self.form.layer, list(self.weights), *tensors, resets=resets)


@pytest.mark.covering(goals=lambda form: {form.cell, form.rows, form.state, form.save_every})
@pytest.mark.parametrize(
    "form", [*FORMS, Sequence("lstm", rows="documents", mask="", state="none")], ids=str
)
def test_export(form):
    model, given = Exported(form), (form.resets, *form.inputs())
    with torch.no_grad():
        program = torch.export.export(model, given)
        expected = model(*given)
        assert_close(program.module()(*given), expected)
        if form.rows != "dense":
            with pytest.raises(NotImplementedError, match="no decomposition"):
                program.run_decompositions(lstm_fused.decompositions())
        elif not form.proj:
            program = program.run_decompositions(lstm_fused.decompositions())
            assert not any("lstm_fused" in str(node.target) for node in program.graph.nodes)
            assert_close(program.module()(*given), expected)


@pytest.mark.covering(goals=goals_of)
@each_form
def test_opcheck(form):
    """Schemas, fakes and Autograd kernels of the operators."""
    x, *states = form.inputs()
    weights = [w.detach() for w in form.module().parameters()]
    weights = described.whole(form.cell, weights, form.directions, x)
    call = (x, form.batch_sizes, form.resets, states, weights)
    kind, D = ops.CELLS[form.cell]["id"], form.directions
    for save_every in (0, form.save_every):
        opcheck(forward_op, (*call, kind, D, form.cells, save_every))
    y, h_n, c_n, gates, saved = forward_op(*call, kind, D, form.cells, form.save_every)
    lstm = has_cell_state(form.cell)
    d_out = [t.cos() if t.numel() else None for t in (y, h_n, c_n)]
    mask = [True, True, lstm, *described.with_gradients(form.cell, weights, D)]
    options = (kind, D, form.save_every)
    opcheck(backward_op, (*call, y, gates, saved, *d_out, *options, [*mask, False]))
    no_y = None if not form.proj else y
    opcheck(backward_op, (*call, no_y, gates, saved, *d_out, *options, [*mask, True]))
    if form.proj or form.cell in described.CELLS:
        return
    if form.rows != "documents":
        opcheck(samples_op, (*call, y, gates, saved, *d_out, *options, [*mask, False], 1))
    moves = [t.cos() for t in (x, *states, *weights)]
    y, _, _, gates, saved = forward_op(*call, kind, D, form.cells, 1)
    opcheck(jvp_op, (*call, y, gates, saved, moves, kind, D))


@pytest.mark.parametrize("how", ["called", "compiled", "exported"])
@pytest.mark.parametrize(
    "form",
    [
        Sequence("lstm", 2, rows="packed", state="with reset", cells=True),
        Sequence("gru", 2, rows="packed"),
        Sequence("rnn_tanh", rows="packed", state="none", mask="all"),
        Sequence("lstm", rows="packed", mask="", cells=True, proj=2),
        Sequence("regularized_lstm", 2, rows="packed", state="with reset", cells=True),
    ],
    ids=str,
)
@pytest.mark.usefixtures("fresh_compiler")
def test_lengths_in_a_graph(form, how):
    """padded.layer, of which no shape depends on the lengths, is the packed layer.

    There is a row of no step more, which keeps its initial state.
    """
    order = [2, 0, 3, 1]
    lengths = torch.cat((form.lengths, form.lengths.new_zeros(1)))[order]
    mask = torch.arange(form.T).unsqueeze(1) < lengths  # (T, N + 1)
    wide = replace(form, rows="dense", N=form.N + 1)
    x, *states = wide.inputs()
    weights = [w.detach() for w in form.module().parameters()]
    weights = described.whole(form.cell, weights, form.directions, x)
    options = {"directions": form.directions, "cell_states": form.cells}

    class Padded(torch.nn.Module):
        def forward(self, x, lengths, resets, states, weights):
            args = x, lengths, states, weights, form.cell
            return padded.layer(*args, resets=resets, **options)

    given = (x, lengths, wide.resets, states, weights)
    call = Padded()
    if how == "compiled":
        call = torch.compile(call, backend="aot_eager", fullgraph=True)
    elif how == "exported":
        program = torch.export.export(call, given)
        call = program.module()
        if not form.proj:
            unrolled = program.run_decompositions(lstm_fused.decompositions()).module()
            assert_close(unrolled(*given), call(*given))
    y, ends, *cells = call(*given)
    back = sorted(range(len(order)), key=order.__getitem__)[:-1]  # the rows of at least one step

    def packed(t):
        return None if t is None else t[:, back][mask[:, back]]

    halves = [s.split(wide.N, 1) for s in states]
    expected_y, expected_ends, *expected_cells = reference.CELLS[form.cell](
        packed(x),
        form.batch_sizes,
        [torch.cat([half[:, back] for half in parts], 1) for parts in halves],
        [packed(w) if w.dim() == 3 else w for w in weights],  # masks are rows
        resets=packed(wide.resets),
        **options,
    )
    assert_close([packed(t) for t in (y, *cells)], [expected_y, *expected_cells])
    assert_close([end[:, back] for end in ends], list(expected_ends))
    empty = order.index(3)
    for end, parts in zip(ends, halves, strict=False):
        assert torch.equal(end[:, empty], parts[0][:, empty])
    for t in (y, *cells):
        assert not t[~mask].any()
