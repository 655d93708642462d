"""The kernels of int8 and bfloat16 weights: their arithmetic, and what their bits depend on."""

import random

import pytest
import torch

import lstm_fused
from lstm_fused import runtime
from tests.helpers import loops, pairwise
from tests.helpers.compare_modules import states_of
from tests.helpers.oracle import CELLS, has_cell_state
from tests.helpers.quantized import FORMATS, module, one_layer, violations

SIZES = ((3, 5), (16, 16), (17, 33), (40, 100), (64, 128))  # I, H
ACCURACY = pairwise.pairwise(
    {
        "cell": tuple(CELLS),
        "dtype": FORMATS,
        "sizes": SIZES,
        "bias": (True, False),
        "rows": (1, 2, 7, 40),
        "isa": tuple(runtime.available_isas()),
        "threads": (1, 2),
    }
)
FORM_ROWS = pairwise.pairwise(
    {
        "cell": tuple(CELLS),
        "dtype": FORMATS,
        "form": tuple(loops.FORMS),
        "num_layers": (1, 2),
        "bidirectional": (False, True),
        "batch_first": (False, True),
        "proj_size": (0, 4),
        "bias": (True, False),
        "state": (False, True),
        "reset": (None, "to zeros", "to a state"),
    }
)


def named(row):
    return "-".join(str(value).removeprefix("torch.") for value in row.values())


def stepped(q, x, state):
    """The states after one step of x (S, I), each (S, width), by a layer's operator."""
    y, ends = q(x.unsqueeze(0), loops.as_hx(q, [s.unsqueeze(0) for s in state]))
    assert runtime.last_run()["kernel"] == str(q.weights_dtype).removeprefix("torch.")
    return [s.squeeze(0) for s in states_of(ends)]


@pytest.mark.parametrize("row", ACCURACY, ids=named)
def test_accuracy(monkeypatch, row):
    (I, H), S = row["sizes"], row["rows"]  # noqa: E741
    runtime.set_isa(row["isa"])
    torch.set_num_threads(row["threads"])
    q = module(row["cell"], I, H, row["dtype"], bias=row["bias"])
    lines = []
    for _ in range(1 + 64 // (S * H)):
        x, states = torch.randn(S, I), [torch.randn(S, H) for _ in range(q._states)]
        states[0] = torch.tanh(states[0])
        lines += violations(monkeypatch, q, x, states, stepped(q, x, states))
    assert not lines, "\n".join(lines)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_accuracy_of_a_projection(dtype):
    """Against one matrix after the layer without it: the kernel rounds what it multiplies once."""
    q = module("lstm", 24, 40, dtype, proj_size=17)
    plain = lstm_fused.dequantize_(module("lstm", 24, 40, dtype, proj_size=17))
    with torch.no_grad():
        for name, w in plain.named_parameters():
            w.copy_(getattr(q, name))
        x = torch.randn(1, 30, 24)
        found, exact = q(x)[0], plain.double()(x.double())[0]
    error = (found - exact).norm() / exact.norm()
    assert error < (2e-7 if dtype is torch.bfloat16 else 2e-3)


def compare_with_steps_of_single_rows(q, form, state, reset, cells, T=5, N=4, scale=1):
    """To the bit: nothing of a row depends on the rows, steps, layers and directions beside it.

    state: whether one is given; reset: None, "to zeros" or "to a state"; T and N count where the
    form has no lengths of its own; scale: of the input.
    """
    call, lengths = loops.FORMS[form]
    if lengths is not None:
        T, N = 5, 4
    rows = q.num_layers * (2 if q.bidirectional else 1)
    widths = [q.proj_size or q.hidden_size, q.hidden_size][: q._states]
    x = torch.randn(T, N, q.input_size) * scale
    given = {}
    if state:
        given["state"] = [torch.randn(rows, N, w) for w in widths]
    if reset:
        given["resets"] = torch.rand(T, N) < 0.4
    if reset == "to a state":
        given["reset_state"] = [torch.randn(rows, N, w) for w in widths]
    more = {"return_cell_states": True} if cells else {}
    found = call(q, x, lengths=lengths, **given, **more)
    y, ends, of_cells = loops.by_steps(q, x, lengths=lengths, layer_of=one_layer, **given)
    expected = y, ends, of_cells if cells else None
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("row", FORM_ROWS, ids=named)
def test_every_form_is_steps_of_single_rows(row):
    names = ("num_layers", "bidirectional", "batch_first", "bias")
    options = {name: row[name] for name in names}
    cells = has_cell_state(row["cell"])
    if row["proj_size"] and cells:
        options["proj_size"] = row["proj_size"]
    q = module(row["cell"], 5, 20, row["dtype"], **options)
    compare_with_steps_of_single_rows(q, row["form"], row["state"], row["reset"], cells)


@pytest.mark.parametrize("seed", [0, *(pytest.param(k, marks=pytest.mark.full) for k in (1, 2, 3))])
def test_random_problems(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(60):
        cell, dtype = rng.choice(list(CELLS)), rng.choice(FORMATS)
        I = rng.choice([1, 2, 3, 7, 15, 16, 17, 31, 33, 64, 100])  # noqa: E741
        H = rng.choice([1, 2, 5, 15, 16, 17, 33, 48, 65, 130, 257])
        options = {"num_layers": rng.choice([1, 2]), "bidirectional": rng.random() < 0.4}
        options["bias"] = rng.random() < 0.7
        cells = has_cell_state(cell)
        if cells and H > 1 and rng.random() < 0.4:
            options["proj_size"] = rng.randint(1, H - 1)
        runtime.set_isa(rng.choice(runtime.available_isas()))
        torch.set_num_threads(rng.choice([1, 2, 3]))
        compare_with_steps_of_single_rows(
            module(cell, I, H, dtype, **options),
            rng.choice(list(loops.FORMS)),
            rng.random() < 0.5,
            rng.choice([None, "to zeros", "to a state"]),
            cells and rng.random() < 0.6,
            rng.choice([1, 2, 5, 13]),
            rng.choice([1, 2, 3, 4, 6, 7, 13]),
            rng.choice([1, 100, 1e-3]),
        )


@pytest.mark.parametrize("cell", CELLS)
def test_bits_of_int8_do_not_depend_on_the_instruction_set(cell):
    """Nor on the number of threads. What is not of integers needs fused multiply-adds for that."""
    q = module(cell, 37, 50, torch.int8, bidirectional=True)
    x = torch.randn(9, 3, 37)
    found = {}
    for isa in runtime.available_isas():
        runtime.set_isa(isa)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found[isa, threads] = q(x)[0]
            assert torch.equal(found[isa, threads], found[isa, 1])
    fused = [y for (isa, _), y in found.items() if isa != "baseline"]
    assert all(torch.equal(y, fused[0]) for y in fused)
    if ("baseline", 1) in found and fused:
        torch.testing.assert_close(found["baseline", 1], fused[0], rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    ("dtype", "bad"),
    [(torch.int8, float("nan")), (torch.int8, float("inf")), (torch.bfloat16, float("nan"))],
    ids=str,
)
def test_what_is_not_finite_stays_in_its_row(dtype, bad):
    """And is not hidden by the scale of the row."""
    q = module("lstm", 20, 20, dtype)
    x = torch.randn(6, 4, 20)
    expected = q(x)[0]
    x[2, 1, 3] = bad
    found = q(x)[0]
    others = [0, 2, 3]
    assert torch.equal(found[:, others], expected[:, others])
    assert torch.equal(found[:2], expected[:2])
    assert found[2:, 1].isnan().all()


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_rows_of_zeros(dtype):
    q = module("gru", 20, 20, dtype, bias=False)
    assert torch.equal(q(torch.zeros(3, 2, 20))[0], torch.zeros(3, 2, 20))
