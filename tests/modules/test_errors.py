"""Errors are those of torch.nn, and calls without a fused path fall back to torch."""

import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lstm_fused
from tests.helpers.compare_modules import (
    LAYER_ERRORS,
    H,
    I,
    N,
    T,
    assert_layer_raises,
    changed,
    draw,
    each_cell,
    ones,
    outcome,
    pair,
)
from tests.helpers.oracle import CELLS, has_cell_state

pytestmark = pytest.mark.usefixtures("real_device")


def drawn(*shapes):
    """States of these shapes, as a tuple; for calls below."""
    return lambda module: tuple(None if shape is None else draw(*shape) for shape in shapes)


def sized(rows=N, h=H, layers=1):
    """States of these sizes, or without rows if None; for calls below, which ask by module."""

    def state(module):
        h_0 = draw(*(n for n in (layers, rows, h) if n is not None))
        return (h_0, torch.ones_like(h_0)) if module.mode == "LSTM" else h_0

    return state


def called(*shape, state=None, dtype=torch.float64):
    """state is hx, or a function that gives it for a module."""
    return lambda m: m(torch.ones(*shape, dtype=dtype), state(m) if callable(state) else state)


def packed(width=I, state=None, dtype=torch.float64, lengths=(5, 3, 1)):
    def call(module):
        x = torch.ones(T, N, width, dtype=dtype)
        given = pack_padded_sequence(x, lengths, enforce_sorted=False)
        return module(given, state(module) if callable(state) else state)

    return call


def with_sizes(*sizes, dtype=torch.int64, rows=4):
    batch_sizes = torch.tensor(sizes, dtype=dtype, device="cpu")
    return lambda m: m(PackedSequence(ones(rows, I), batch_sizes))


def with_weight(name, change):
    """The call after a weight is replaced by what change makes of it."""

    def call(module):
        setattr(module, name, nn.Parameter(change(getattr(module, name).detach())))
        return module(ones(T, N, I))

    return call


X = (T, N, I)
# A call, and what the message must contain.
ERRORS = {
    "1-D": (called(I), "Expected input to be 2D or 3D, got 1D"),
    "4-D": (called(1, *X), "Expected input to be 2D or 3D, got 4D"),
    "width": (called(T, N, 5), "input.size.* Expected 4, got 5"),
    "width unbatched": (called(T, 5), "input.size.* Expected 4, got 5"),
    "no step": (called(0, N, I), "sequence length"),
    "float32": (called(*X, dtype=torch.float32), "input dtype .*float32.* weight dtype .*float64"),
    "integers": (called(*X, dtype=torch.int64), "input dtype .*int64"),
    "sparse": (lambda m: m(ones(*X).to_sparse()), "parse|mkldnn"),
    "no input": (lambda m: m(), "'input'"),
    "None": (lambda m: m(None), "NoneType"),
    "list": (lambda m: m([1.0]), "list"),
    "h_0 rows": (
        called(*X, state=sized(rows=2)),
        r"Expected hidden(\[0\])? size \(1, 3, 6\), got \[1, 2, 6\]",
    ),
    "h_0 one row": (called(*X, state=sized(rows=1)), r"hidden(\[0\])? size"),
    "h_0 layers": (called(*X, state=sized(layers=2)), r"hidden(\[0\])? size"),
    "h_0 width": (called(*X, state=sized(h=5)), r"hidden(\[0\])? size"),
    "h_0 rows unbatched": (called(T, I, state=sized(None, layers=2)), r"hidden(\[0\])? size"),
    "2-D hx": (called(*X, state=sized(None)), "hx (and cx )?should also be 3-D"),
    "3-D hx": (called(T, I, state=sized(rows=1)), "hx (and cx )?should also be 2-D"),
    "hx dtype": (
        called(*X, state=lambda m: changed(torch.Tensor.float, sized()(m))),
        r"hx(\[0\])? with torch.float32",
    ),
    "hx device": (
        called(*X, state=lambda m: changed(lambda s: s.to("meta"), sized()(m))),
        r"hx(\[0\])? at meta",
    ),
    "packed width": (packed(width=5), "input.size.* Expected 4, got 5"),
    "packed float32": (packed(dtype=torch.float32), "input dtype .*float32"),
    "packed h_0 rows": (packed(state=sized(rows=2)), r"hidden(\[0\])? size"),
    "packed h_0 width": (packed(state=sized(h=5)), r"hidden(\[0\])? size"),
    "batch_sizes floats": (with_sizes(2, 2, dtype=torch.float32), "batch_sizes"),
    "batch_sizes empty": (with_sizes(rows=0), "batch_sizes"),
    "batch_sizes grow": (with_sizes(1, 3), "batch_sizes"),
    "batch_sizes too many": (with_sizes(3, 2), "batch_sizes"),
    "weight dtype": (with_weight("weight_hh_l0", torch.Tensor.float), "weight_hh_l0 must"),
    "weight device": (
        with_weight("weight_hh_l0", lambda w: w.to("meta")),
        "parameter tensor at meta",
    ),
    "sparse weight": (
        with_weight("weight_hh_l0", torch.Tensor.to_sparse),
        "weight_hh_l0 must be strided, got torch.sparse_coo",
    ),
    "bias size": (with_weight("bias_ih_l0", lambda b: b[1:]), "bias_ih_l0 must have shape"),
}
OF_TWO_STATES = {
    "c_0 width": (
        called(*X, state=drawn((1, N, H), (1, N, 5))),
        r"hidden\[1\] size \(1, 3, 6\), got \[1, 3, 5\]",
    ),
    "2-D c_0": (called(*X, state=drawn((1, N, H), (1, H))), "hx and cx should also be 3-D"),
    "hx a tensor": (called(*X, state=lambda m: draw(1, N, H)), "hx must be a tuple"),
    "hx of one": (called(*X, state=drawn((1, N, H))), "hx must be"),
    "hx of three": (called(*X, state=drawn(*[(1, N, H)] * 3)), "lstm expects two hidden states"),
    "hx a number": (called(*X, state=3), "hx must be a tuple"),
    "c_0 None": (called(*X, state=drawn((1, N, H), None)), r"hx\[1\] must be a Tensor"),
    "packed c_0 width": (packed(state=drawn((1, N, H), (1, N, 5))), r"hidden\[1\] size"),
}
OF_ONE_STATE = {
    "hx a tuple": (called(*X, state=drawn((1, N, H))), "hx must be a Tensor, got tuple"),
    "hx a list": (called(T, I, state=lambda m: [draw(1, H)]), "hx must be a Tensor, got list"),
    "hx of two": (called(*X, state=drawn(*[(1, N, H)] * 2)), "hx must be a Tensor, got tuple"),
    "hx a number": (called(*X, state=3), "hx must be a Tensor, got int"),
    "packed hx a tuple": (packed(state=drawn((1, N, H))), "hx must be a Tensor, got tuple"),
}


def each_of(common, of_two, of_one):
    """call and words of each row that is for a cell."""
    rows = []
    for cell in CELLS:
        table = common | (of_two if has_cell_state(cell) else of_one)
        rows += [pytest.param(cell, *row, id=f"{cell} {name}") for name, row in table.items()]
    return pytest.mark.parametrize("cell, call, words", rows)


@each_of(ERRORS, OF_TWO_STATES, OF_ONE_STATE)
def test_same_errors_as_torch(cell, call, words):
    """By an exception of the same type, and in torch's words where they name what is wrong."""
    theirs, ours = pair(cell=cell)
    with pytest.raises(Exception) as expected:  # noqa: B017, PT011
        call(theirs)
    with pytest.raises(expected.type, match=words) as found:
        call(ours)
    assert found.type is expected.type
    if re.search(words, str(expected.value)):
        said = str(found.value).replace("Recurrent.forward", f"{CELLS[cell][0]}.forward")
        assert said.startswith(str(expected.value))


# torch.nn gives an IndexError for the first of an LSTM, and no or a wrong answer for the others.
STRICTER = {
    "packed 2-D hx": (packed(state=sized(None)), r"hidden(\[0\])? size"),
    "more h_0 rows than packed": (
        packed(lengths=(5, 3, 3), state=sized(rows=4)),
        r"hidden(\[0\])? size",
    ),
    "batch_sizes too few": (with_sizes(2, 1), "batch_sizes"),
    "batch_sizes zero": (with_sizes(4, 0), "batch_sizes"),
    "weight_ih columns": (
        with_weight("weight_ih_l0", lambda w: w.new_zeros(len(w), 5)),
        "weight_ih_l0 must have shape",
    ),
    "weight_hh columns": (
        with_weight("weight_hh_l0", lambda w: w[:, 1:]),
        "weight_hh_l0 must have shape",
    ),
    "weight_hh rows": (with_weight("weight_hh_l0", lambda w: w[4:]), "weight_hh_l0 must have"),
    "bias of one": (with_weight("bias_hh_l0", lambda b: b[:1]), "bias_hh_l0 must have shape"),
}
STRICTER_OF_TWO_STATES = {
    "c_0 dtype": (
        called(*X, state=lambda m: (draw(1, N, H), draw(1, N, H).float())),
        r"hx\[1\] with",
    ),
}


@each_of(STRICTER, STRICTER_OF_TWO_STATES, {})
def test_errors_torch_does_not_raise(cell, call, words):
    with pytest.raises(RuntimeError, match=words):
        call(pair(cell=cell)[1])


@pytest.mark.parametrize("change, message", LAYER_ERRORS.values(), ids=LAYER_ERRORS)
def test_operator_errors(change, message):
    """The whole message, which names the arguments."""
    assert_layer_raises(change, message)


@each_cell
def test_out_of_memory(cell):
    """An input larger than any address space, expanded from one row."""
    x = ones(1, 1, I).expand(10**8, 10**7, I)
    with pytest.raises(RuntimeError, match="^out of memory for a tensor of shape"):
        pair(cell=cell)[1](x)


BAD_LENGTHS = {
    "too few": (X, [5, 3], ValueError, r"one length a row, shape \(3,\)"),
    "2-D": (X, [[5, 3, 1]], ValueError, "one length a row"),
    "too long": (X, [6, 3, 1], ValueError, "from 0 to 5"),
    "negative": (X, [5, 3, -1], ValueError, "from 0 to 5"),
    "fractions": (X, [5.0, 3.0, 1.0], TypeError, "lengths must be integers"),
    "booleans": (X, [True, True, False], TypeError, "lengths must be integers"),
    "words": (X, "abc", TypeError, "lengths must be a list or a tensor"),
    "2-D input": ((T, I), [5], ValueError, "padded 3-D input, got 2-D"),
}


@pytest.mark.parametrize("shape, lengths, kind, words", BAD_LENGTHS.values(), ids=BAD_LENGTHS)
def test_bad_lengths(shape, lengths, kind, words):
    with pytest.raises(kind, match=words):
        pair()[1](ones(*shape), lengths=lengths)


def test_lengths_of_packed_input_are_refused():
    x = pack_padded_sequence(ones(*X), [5, 3, 1])
    with pytest.raises(ValueError, match="got PackedSequence"):
        pair()[1](x, lengths=[5, 3, 1])


@each_cell
def test_module_works_after_a_refusal(cell):
    theirs, ours = pair(cell=cell)
    with pytest.raises(RuntimeError):
        ours(ones(T, N, 5))
    x = draw(*X)
    torch.testing.assert_close(ours(x), theirs(x))


class Named(torch.Tensor):
    pass


THROUGH_TORCH = {
    "jit.trace": (lambda m, x: torch.jit.trace(m, x)(x)[0], "torch.jit.trace"),
    "subclass": (lambda m, x: m(x.as_subclass(Named))[0], "Named is a Tensor subclass"),
    "meta": (lambda m, x: m.to("meta")(x.to("meta"))[0], "input is on meta"),
    "complex": (lambda m, x: m.to(torch.complex64)(x.to(torch.complex64))[0], "complex64"),
    "nested": (lambda m, x: m(torch.nested.nested_tensor([*x]))[0], "the input is a nested tensor"),
    "sparse state": (
        lambda m, x: m(x, ones(1, N, H).to_sparse())[0],
        "a state's layout is torch.sparse_coo",
    ),
}
NOT_IN_TORCH = {
    ("rnn_relu", "complex"),
    ("lstm", "nested"),
    ("lstm", "sparse state"),
    ("gru", "sparse state"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "cell, call, reason",
    [
        pytest.param(cell, *row, id=f"{cell} {name}")
        for cell in CELLS
        for name, row in THROUGH_TORCH.items()
        if (cell, name) not in NOT_IN_TORCH
    ],
)
def test_fallback_warns_once(cell, call, reason, real_device):
    theirs, ours = pair(cell=cell)
    x = ones(*X)
    expected = outcome(call, theirs, x)
    if isinstance(expected, tuple):  # torch's fused cells: no forward mode, no complex numbers
        assert real_device == "cuda" and outcome(call, ours, x) == expected
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [call(ours, x), call(ours, x)]
    for result in found:
        assert type(result) is type(expected)
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
    said = [str(w.message) for w in caught if "lstm_fused" in str(w.message)]
    assert len(said) == 1
    assert f"ran through torch.nn.{CELLS[cell][0]}" in said[0] and reason in said[0]


@each_cell
@pytest.mark.filterwarnings("ignore")
def test_jit_script(cell):
    theirs, ours = (nn.Sequential(m) for m in pair(cell=cell))
    with pytest.warns(UserWarning, match="torch.jit.script cannot call the fused op"):
        found = torch.jit.script(ours)
    x = ones(*X)
    torch.testing.assert_close(found(x), theirs(x), rtol=0, atol=0)


@each_cell
@pytest.mark.parametrize("method", ("forward", "check_input"))
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
def test_jit_script_of_a_subclass(method, cell):
    """The fallback keeps what torch.nn's own module does not do."""
    base = type(pair(cell=cell)[1])
    mine = type("Mine", (base,), {method: getattr(base, method).__get__})(I, H)
    words = f"cannot compile Mine, derived from .*{base.__name__}, which overrides {method}"
    with pytest.raises(RuntimeError, match=words):
        torch.jit.script(nn.Sequential(mine))


@each_cell
def test_func_grad_is_fused(cell):
    theirs, ours = pair(cell=cell)
    x = ones(*X)
    expected, found = (torch.func.grad(lambda x, m=m: m(x)[0].sum())(x) for m in (theirs, ours))
    torch.testing.assert_close(found, expected)
    assert lstm_fused.runtime.last_run()["pass"] == "backward"
