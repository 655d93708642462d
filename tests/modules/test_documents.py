"""cu_seqlens= is each document by itself; lengths and documents on a device, as CUDA takes them."""

from functools import partial

import pytest
import torch

from lstm_fused import padded, runtime
from tests.helpers import loops
from tests.helpers.compare_modules import (
    H,
    I,
    T,
    draw,
    each_cell,
    each_option,
    pair,
    state_for,
    states_of,
)
from tests.helpers.oracle import has_cell_state

LENGTHS = ((5, 0, 3, 1), (4,), (1, 1, 1), (0, 2, 0, 0, 5))


class Alone:
    """Each document by a call of its own, of a row (T, I)."""

    def __init__(self, module):
        self.module = module

    def __call__(self, x, hx, lengths):
        """x (S, I) -> output (S, D*R) and the final states, as of cu_seqlens."""
        outputs, ends = [], []
        for n, rows in enumerate(x.split(list(lengths))):
            start = tuple(s[:, n] for s in states_of(hx))
            if not len(rows):
                ends.append(start)
                continue
            y, end = self.module(rows, loops.as_hx(self.module, start))
            outputs.append(y)
            ends.append(states_of(end))
        ends = tuple(torch.stack(s, 1) for s in zip(*ends, strict=True))
        return torch.cat(outputs), loops.as_hx(self.module, ends)


@pytest.mark.usefixtures("device")
@pytest.mark.covering
@each_option
@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_documents(lengths, dtype, cell, options):
    theirs, ours = pair(cell=cell, **options)
    x = draw(sum(lengths), I)
    hx = state_for(ours, len(lengths))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(dtype)
    results = []
    for module in (theirs, ours):
        if module is theirs:
            y, ends = Alone(theirs)(x, hx, lengths)
        else:
            y, ends = ours(x, hx, cu_seqlens=cu_seqlens)
            assert y.shape == (sum(lengths), y.shape[1])
        outputs = [y, *states_of(ends)]
        loss = sum((t * torch.arange(t.numel()).view(t.shape).cos()).sum() for t in outputs)
        leaves = [x, *states_of(hx), *module.parameters()]
        results.append([*outputs, *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(*results)
    assert runtime.last_run()["pass"] == "backward"


@each_cell
def test_batch_first_and_no_states(cell):
    theirs, ours = pair(cell=cell, batch_first=True)
    x = draw(6, I)
    with torch.no_grad():
        found = ours(x, cu_seqlens=torch.tensor([0, 2, 6]))
        parts = [theirs(part) for part in x.split([2, 4])]
    torch.testing.assert_close(found[0], torch.cat([y for y, _ in parts]))


def test_row_with_resets_is_the_same():
    """Documents packed into one row, with a reset where each begins."""
    _, ours = pair(num_layers=2, bidirectional=True)
    x = draw(9, I)
    found, _ = ours(x, cu_seqlens=torch.tensor([0, 5, 8, 9]))
    begins = torch.zeros(9, dtype=torch.bool)
    begins[[0, 5, 8]] = True
    torch.testing.assert_close(found, ours(x, resets=begins)[0])


@pytest.mark.covering
@each_option
@pytest.mark.parametrize("kind", ("", "hx", "resets", "resets to a state", "hx and resets"))
@pytest.mark.parametrize("form", ("lengths", "documents"))
def test_without_reading_the_lengths(form, kind, cell, options, monkeypatch):
    """The way of CUDA's tensors, on the CPU: with masks, or through packed data where it must."""
    _, ours = pair(cell=cell, **options)
    lengths = loops.LENGTHS
    x = draw(T, len(lengths), I)
    padding = torch.arange(T).unsqueeze(1) >= torch.tensor(lengths)
    x = x.detach().masked_fill(padding.unsqueeze(2), float("nan")).requires_grad_()
    state = states_of(state_for(ours, len(lengths))) if "hx" in kind else ()
    mask = torch.rand(T, len(lengths)) < 0.4 if "resets" in kind else None
    reset = states_of(state_for(ours, None)) if "to a state" in kind else None
    cells = has_cell_state(cell)
    leaves = {"x": x, **dict(ours.named_parameters())}
    leaves |= {f"s{k}": s for k, s in enumerate((*state, *(reset or ())))}
    given = ours, x, state, mask, reset, lengths
    call, _ = loops.FORMS[form]
    expected = loops.results(call, *given, leaves=leaves, cells=cells)

    if form == "lengths":
        given = *given[:-1], torch.tensor(lengths)
    elif kind == "hx":
        call = partial(call, max_seqlen=T + 2)
    masked, calls = padded.masked, []

    def counted(*args, **more):
        calls.append(args)
        return masked(*args, **more)

    monkeypatch.setattr(padded, "stays_on_device", lambda t: True)
    monkeypatch.setattr(padded, "masked", counted)
    found = loops.results(call, *given, leaves=leaves, cells=cells)
    packs = ours.bidirectional and mask is not None and (state or reset)
    assert len(calls) == (0 if packs else ours.num_layers)
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:.*ran through torch.nn")
def test_lengths_on_the_device_where_torch_runs_the_call(monkeypatch):
    theirs, ours = pair()
    ours.check_hidden_size = theirs.check_hidden_size  # a method that only torch.nn calls
    x, lengths = draw(T, 4, I), torch.tensor(loops.LENGTHS)
    expected = ours(x, lengths=lengths)
    monkeypatch.setattr(padded, "stays_on_device", lambda t: True)
    torch.testing.assert_close(ours(x, lengths=lengths), expected)


def test_compiled_documents_on_the_device_need_max_seqlen(monkeypatch):
    _, ours = pair(bidirectional=True)
    x, cu_seqlens = draw(9, I), torch.tensor([0, 2, 2, 9])
    expected = ours(x, cu_seqlens=cu_seqlens)
    monkeypatch.setattr(padded, "stays_on_device", lambda t: True)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, cu_seqlens=cu_seqlens, max_seqlen=7), expected)
    with pytest.raises(Exception, match="max_seqlen must be given with cu_seqlens where a graph"):
        compiled(x, cu_seqlens=cu_seqlens)


def test_checks_on_the_device(monkeypatch):
    monkeypatch.setattr(padded, "stays_on_device", lambda t: True)
    for wrong in ([3, T + 1], [-1, 2]):
        with pytest.raises(RuntimeError, match="lengths must be from 0 to the input's length"):
            pair()[1](draw(T, 2, I), lengths=torch.tensor(wrong))


def test_checks_documents_on_the_device():
    for cu_seqlens, most in (([0, 3, 9], 5), ([0, 5, 4, 9], 9), ([1, 9], 9), ([0, 8], 9)):
        with pytest.raises(RuntimeError, match="cu_seqlens must begin with 0"):
            padded.Documents(torch.tensor(cu_seqlens), most, 9)


@pytest.mark.parametrize("options", ({}, {"bidirectional": True, "num_layers": 2}), ids=str)
def test_compiles(options):
    _, ours = pair(**options)
    x = draw(9, I)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for begins in ([0, 2, 2, 9], [0, 8, 9, 9]):
        cu_seqlens = torch.tensor(begins)
        results = []
        for module in (compiled, ours):
            y, (h_n, c_n) = module(x, cu_seqlens=cu_seqlens)
            loss = y.cos().sum() + h_n.sin().sum() + c_n.sum()
            results.append([y, h_n, c_n, *torch.autograd.grad(loss, [x, *ours.parameters()])])
        torch.testing.assert_close(*results)


def call(shape=(9, I), cu_seqlens=(0, 4, 9), dtype=torch.int64, **more):
    def run(module):
        given = cu_seqlens
        if not isinstance(given, list):
            given = torch.tensor(given, dtype=dtype)
        return module(torch.zeros(*shape, dtype=torch.float64), cu_seqlens=given, **more)

    return run


ERRORS = {
    "3-D": (call((3, 3, I)), ValueError, r"rows \(S, I\), got 3-D"),
    "list": (call(cu_seqlens=[0, 9]), TypeError, "cu_seqlens must be a Tensor, got list"),
    "float": (call(dtype=torch.float32), TypeError, "must be int32 or int64, got torch.float32"),
    "2-D": (call(cu_seqlens=((0, 4, 9),)), ValueError, r"shape \(N \+ 1,\) for N documents"),
    "no document": (call(cu_seqlens=(0,)), ValueError, r"at least one, got \(1,\)"),
    "begin": (call(cu_seqlens=(1, 4, 9)), ValueError, "begin with 0 and end with 9"),
    "end": (call(cu_seqlens=(0, 4, 8)), ValueError, "end with 9, the rows of input, got 0 and 8"),
    "decreasing": (call(cu_seqlens=(0, 5, 4, 9)), ValueError, "decrease, got 5 and then 4"),
    "max_seqlen": (call(max_seqlen=4), ValueError, "must be at least 5, the longest document"),
    "max_seqlen a float": (call(max_seqlen=5.0), TypeError, "max_seqlen must be an int"),
    "max_seqlen alone": (
        lambda m: m(torch.zeros(9, I, dtype=torch.float64), max_seqlen=5),
        ValueError,
        "max_seqlen is given without cu_seqlens",
    ),
    "lengths": (call(lengths=[4, 5]), ValueError, "it must be one of them"),
    "width": (call((9, I + 1)), RuntimeError, "must be equal to input_size"),
    "no row": (call((0, I), (0, 0)), RuntimeError, "without a time step"),
    "hx": (
        call(hx=(torch.zeros(1, 3, H).double(), torch.zeros(1, 3, H).double())),
        RuntimeError,
        r"Expected hidden\[0\] size \(1, 2, 6\)",
    ),
    "resets": (
        call(resets=torch.zeros(8, dtype=torch.bool)),
        ValueError,
        r"resets must have shape \(S,\), \(9,\) here",
    ),
    "jit.trace": (
        lambda m: torch.jit.trace(lambda x: call()(m), torch.zeros(1)),
        RuntimeError,
        "torch.export records them",
    ),
}


@pytest.mark.parametrize("run, kind, words", ERRORS.values(), ids=ERRORS)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*trace")
def test_errors(run, kind, words):
    with pytest.raises(kind, match=words):
        run(pair()[1])


def test_onnx_says_what_to_do():
    pytest.importorskip("onnxscript")
    _, ours = pair(dtype=torch.float32)
    x, more = torch.zeros(9, I), {"cu_seqlens": torch.tensor([0, 4, 9])}
    with pytest.raises(Exception, match="give a padded input and lengths="):
        torch.onnx.export(ours.eval(), (x,), kwargs=more, dynamo=True, verbose=False)
