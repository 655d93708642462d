"""The kernels of int8 and bfloat16 weights: their arithmetic, and what their bits depend on."""

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


@pytest.mark.parametrize("row", FORM_ROWS, ids=named)
def test_every_form_is_steps_of_single_rows(row):
    """To the bit: nothing of a row depends on the rows, steps, layers and directions beside it."""
    if row["form"] == "unbatched" or (row["proj_size"] and not has_cell_state(row["cell"])):
        pytest.skip("torch.nn has no such layer")
    names = ("num_layers", "bidirectional", "batch_first", "bias")
    options = {name: row[name] for name in names}
    if row["proj_size"]:
        options["proj_size"] = row["proj_size"]
    q = module(row["cell"], 5, 20, row["dtype"], **options)
    call, lengths = loops.FORMS[row["form"]]
    T, N = 5, 4
    rows = q.num_layers * (2 if q.bidirectional else 1)
    widths = [q.proj_size or 20, 20][: q._states]
    x = torch.randn(T, N, 5)
    given = {}
    if row["state"]:
        given["state"] = [torch.randn(rows, N, w) for w in widths]
    if row["reset"]:
        given["resets"] = torch.rand(T, N) < 0.4
        if row["reset"] == "to a state":
            given["reset_state"] = [torch.randn(rows, N, w) for w in widths]
    cells = has_cell_state(row["cell"])
    more = {"return_cell_states": True} if cells else {}
    found = call(q, x, lengths=lengths, **given, **more)
    expected = loops.by_steps(q, x, lengths=lengths, layer_of=one_layer, **given)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


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
