"""The CUDA kernels, emulated, with resets, reset states and all cell states: every plan."""

from itertools import product

import pytest
import torch

import lstm_fused
from lstm_fused import cuda, ops
from lstm_fused.operators import forward_op
from tests.helpers import described, emulated, loops
from tests.helpers.compare_modules import I, T, draw, pair, state_for, states_of
from tests.helpers.cuda_cases import KINDS, STEPWISE
from tests.helpers.oracle import EVERY_CELL, has_cell_state, may_project
from tests.helpers.plan_coverage import DTYPES
from tests.helpers.sequences import MASKS, Sequence, results, violations

STATES = ("none", "given", "with reset")
# Ragged tiles of units, more rows than a tile has.
SIZES = {"T": 5, "N": 19, "I": 3, "H": 20}


@pytest.fixture(autouse=True)
def emulation():
    with emulated.kernels():
        yield


def cases():
    """(plan, dtype, Sequence) with every mask, in every order of the rows that the kernels have."""
    for kind, dtype, cell, directions, rows, mask, state in product(
        KINDS, DTYPES, EVERY_CELL, (1, 2), ("dense", "packed"), MASKS, STATES
    ):
        # Of described cells, whose plan is gemm, some: what masks do is the same for all cells.
        if cell in described.CELLS and (kind != "gemm" or mask not in ("random", "adjacent")):
            continue
        if dtype is torch.float64 and kind not in STEPWISE:
            continue
        if is_undecided(cell, dtype):
            continue
        shared = (cell, directions, rows, mask, state)
        yield kind, dtype, Sequence(*shared, **SIZES)
        if has_cell_state(cell):
            yield kind, dtype, Sequence(*shared, cells=True, **SIZES)
        if may_project(cell) and kind in STEPWISE:
            yield kind, dtype, Sequence(*shared, cells=True, proj=7, **SIZES)


def is_undecided(cell, dtype):
    """Whether it is up to rounding which branch the cell takes, and so a gradient."""
    if cell in described.KINKED:
        return dtype is not torch.float64
    return cell == "rnn_relu" and dtype.itemsize == 2


def goals_of(kind, dtype, sequence):
    """Each plan with each dtype, cell and option; each mask of each plan with the other options;
    each cell with resets to each state."""
    s = sequence
    options = [("rows", s.rows), ("directions", s.directions), ("state", s.state)]
    options += [("cells", s.cells, bool(s.proj))]
    found = {(kind, dtype), (kind, s.cell, s.state)}
    found |= {(kind, s.mask, s.rows, s.directions), (kind, s.mask, s.state)}
    found |= {(s.cell, s.state, s.mask)} if s.mask == "random" else set()
    return found | {(kind, *option) for option in options} | {(s.cell, *o) for o in options}


@pytest.mark.covering(goals=goals_of)
@pytest.mark.parametrize(
    ("kind", "dtype", "sequence"),
    [pytest.param(*case, id="-".join(map(str, case))) for case in cases()],
)
def test_agrees(kind, dtype, sequence):
    cuda.set_plan(kind)
    lines = violations(sequence, dtype)
    assert not lines, "\n".join(lines)
    assert cuda.last_run()["kernel"] == kind and cuda.last_run()["pass"] == "backward"


try:
    from hypothesis import assume, given
    from hypothesis import strategies as st
except ImportError:
    pass
else:

    @st.composite
    def any_sequence(draw):
        cell, hidden = draw(st.sampled_from(EVERY_CELL)), draw(st.integers(1, 40))
        own = has_cell_state(cell)
        return Sequence(
            cell=cell,
            directions=draw(st.integers(1, 2)),
            rows=draw(st.sampled_from(("dense", "packed"))),
            mask=draw(st.sampled_from(MASKS)),
            state=draw(st.sampled_from(STATES)),
            cells=own and draw(st.booleans()),
            proj=draw(st.integers(0, hidden - 1)) if may_project(cell) else 0,
            bias=draw(st.booleans()),
            T=draw(st.integers(1, 7)),
            N=draw(st.integers(1, 20)),
            I=draw(st.integers(1, 5)),
            H=hidden,
        )

    @pytest.mark.full
    @given(any_sequence(), st.sampled_from(KINDS), st.sampled_from(DTYPES))
    def test_random_sequences(sequence, kind, dtype):
        if is_undecided(sequence.cell, dtype):
            dtype = torch.float64
        assume(not described.is_invariant(sequence.cell, sequence.I, sequence.proj or sequence.H))
        cuda.set_plan(kind)
        lines = violations(sequence, dtype)
        assert not lines, "\n".join(lines)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_reset_nothing_changes(kind):
    """Bit for bit, with flags that are all 0, and the gradient of an unused reset state is 0."""
    cuda.set_plan(kind)
    marked = Sequence(mask="none", state="with reset", directions=2, **SIZES)
    plain = Sequence(mask="", state="given", directions=2, **SIZES)
    weights = list(marked.module().parameters())
    x, *states = (t.requires_grad_() for t in marked.inputs())
    initial = [s[:, : marked.N].detach().requires_grad_() for s in states]
    outcomes = []
    for sequence, given in ((marked, states), (plain, initial)):
        leaves = [x, *given, *weights]
        out = sequence.run(sequence.layer, weights, x, *given)
        sums = [(t * t.detach().cos()).sum() for t in out]
        outcomes.append((out, torch.autograd.grad(sum(sums), leaves)))
    (ours, grads), (theirs, plain_grads) = outcomes
    assert all(map(torch.equal, ours, theirs))
    for k, (found, wanted) in enumerate(zip(grads, plain_grads, strict=True)):
        if 1 <= k <= 2:
            assert not found[:, marked.N :].any()
            found = found[:, : marked.N]
        assert torch.equal(found, wanted), k


@pytest.mark.parametrize("kind", ("step", "grid"))
@pytest.mark.parametrize("form", loops.FORMS)
@pytest.mark.parametrize("with_state", (False, True))
def test_modules(with_state, form, kind):
    """Against torch.nn's called for one step of one row, in every form of input."""
    cuda.set_plan(kind)
    options = {"num_layers": 2, "bidirectional": True, "dtype": torch.float32}
    theirs, ours = pair(**options)
    call, lengths = loops.FORMS[form]
    x, mask = draw(T, 4, I, dtype=torch.float32), torch.rand(T, 4) < 0.4
    state = states_of(state_for(ours, 4, torch.float32)) if with_state else ()
    reset = states_of(state_for(ours, 4, torch.float32)) if with_state else None
    given = x, state, mask, reset, lengths
    leaves = [
        {"x": x, **dict(enumerate((*state, *(reset or ()), *module.parameters())))}
        for module in (theirs, ours)
    ]
    expected = loops.results(loops.by_steps, theirs, *given, leaves=leaves[0], cells=True)
    found = loops.results(call, ours, *given, leaves=leaves[1], cells=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert cuda.last_run()["kernel"] == kind


@pytest.mark.parametrize("resets", (False, True))
def test_documents_compile(resets):
    module = lstm_fused.LSTM(3, 5, bidirectional=True)
    states = torch.randn(2, 2, 3, 5)
    given = {"cu_seqlens": torch.tensor([0, 2, 2, 8]), "max_seqlen": 6}
    given |= {"resets": torch.arange(8) % 3 == 1} if resets else {}
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.randn(8, 3)
    torch.testing.assert_close(compiled(x, (*states,), **given), module(x, (*states,), **given))


def test_documents_are_refused():
    bounds = torch.tensor([[0, 2, 6]])
    weights = torch.randn(20, 3), torch.randn(20, 5)
    with pytest.raises(RuntimeError, match=r"shape \(1, 3\), cu_seqlens of documents, but on a"):
        ops.layer(torch.randn(6, 3), bounds, (), weights)


@pytest.mark.covering
@pytest.mark.parametrize(
    "kind, cell",
    [
        *product(("step", "grid", "gemm"), ("lstm", "gru", "rnn_tanh")),
        *product(("gemm",), described.CELLS),
    ],
)
@pytest.mark.parametrize("every", (2, 4, 5))
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_checkpoints(cell, dtype, state, every, kind):
    """Bit for bit what is computed where every step is kept, in 5 steps and both directions."""
    cuda.set_plan(kind)
    same = {"cell": cell, "directions": 2, "state": state} | SIZES
    same["cells"] = has_cell_state(cell)
    plain, found = (
        results(sequence, sequence.layer, dtype, dtype, 0)
        for sequence in (Sequence(**same), Sequence(**same, save_every=every))
    )
    assert [name for name in plain if not torch.equal(found[name], plain[name])] == []
    assert cuda.last_run()["kernel"] == kind


@pytest.mark.parametrize("every, kernel", ((2, "grid"), (5, "cluster")))
@pytest.mark.parametrize("cell", ("lstm", "gru", "rnn_tanh"))
def test_checkpoints_of_a_cluster(cell, every, kernel):
    """Backward runs another plan where there is a launch for each part."""
    cuda.set_plan("cluster")
    sequence = Sequence(cell, directions=2, state="with reset", save_every=every, **SIZES)
    lines = violations(sequence, torch.float32)
    assert not lines, "\n".join(lines)
    assert cuda.last_run()["kernel"] == kernel


@pytest.mark.parametrize("kind", STEPWISE)
def test_checkpoints_with_a_projection(kind):
    cuda.set_plan(kind)
    for every in (1, 2):
        sequence = Sequence(directions=2, proj=7, state="with reset", save_every=every, **SIZES)
        lines = violations(sequence, torch.float16)
        assert not lines, "\n".join(lines)


def test_what_is_kept():
    """States of every third step alone, with the shapes that a fake tensor has too."""
    x, weights = torch.randn(7, 2, 3), [torch.randn(20, 3), torch.randn(20, 5)]
    *_, gates, states = forward_op(x, None, None, (), weights, 0, 1, False, 3)
    assert gates.shape == (0,) and states.shape == (2, 1, 2, 10)
    torch.library.opcheck(forward_op, (x, None, None, [], weights, 0, 1, False, 3))
