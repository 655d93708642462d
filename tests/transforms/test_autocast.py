"""Dtypes and values under autocast: those of torch.nn, or its error, on every machine.

torch.nn.LSTM runs in oneDNN for dtypes that depend on the machine, and raises where oneDNN has no
layer in autocast's dtype. test_restricted_isa runs this file for a second machine.
"""

import copy
from contextlib import nullcontext
from itertools import product

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lstm_fused
from lstm_fused import runtime
from lstm_fused.autocast import Call, OneDNN, dtypes, onednn
from tests.helpers.compare_modules import (
    OPTIONS,
    I,
    N,
    T,
    assert_accurate,
    autocast,
    draw,
    each_cell,
    fitting,
    pair,
    state_for,
    states_of,
    tensors_of,
)

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
FLOATS = (F32, BF16, F16)
NARROW = (BF16, F16)
each_narrow = pytest.mark.parametrize("narrow", NARROW, ids=("to bfloat16", "to float16"))

MACHINES = {
    "no oneDNN": OneDNN(False, False, False),
    "switched off": OneDNN(False, True, True),
    "avx2": OneDNN(True, False, False),
    "avx512": OneDNN(True, True, False),
    "avx512_fp16": OneDNN(True, True, True),
}
ANY, OFF, ON = tuple(MACHINES), tuple(MACHINES)[:2], tuple(MACHINES)[2:]

# Of a call, autocast's dtype and machines: the dtypes of c_n, and of the output and h_n.
DECISIONS = (
    (Call("none", F32, F32), BF16, ANY, (BF16, BF16)),
    (Call("none", BF16, F32), F16, ANY, (F16, F16)),
    (Call("hidden", F32, F32), BF16, ANY, (F32, F32)),
    (Call("hidden", F32, BF16), BF16, ANY, (BF16, BF16)),
    (Call("hidden", F16, F16), BF16, ANY, (F32, F32)),
    # oneDNN takes every float32 input, and has autocast's dtype or raises.
    (Call("cell", F32, F32), BF16, ON, (BF16, BF16)),
    (Call("cell", F32, F32), F16, ON, (F16, F16)),
    (Call("cell", F32, F32, grad=True), F16, ON, (F16, F16)),
    (Call("cell", F32, F32), BF16, OFF, (F32, F32)),
    (Call("cell", F32, BF16), BF16, OFF, (BF16, BF16)),
    # A bfloat16 input only where it has bfloat16, a float16 one where nothing is to be trained.
    (Call("cell", BF16, F32), BF16, ("avx512", "avx512_fp16"), (BF16, BF16)),
    (Call("cell", BF16, F32), BF16, ("avx2", *OFF), (F32, F32)),
    (Call("cell", BF16, BF16), F16, ("avx512", "avx512_fp16"), (F16, F16)),
    (Call("cell", BF16, BF16), F16, ("avx2", *OFF), (F32, F32)),
    (Call("cell", F16, F16), BF16, ("avx512_fp16",), (BF16, BF16)),
    (Call("cell", F16, F16), BF16, ("avx512", "avx2", *OFF), (F32, F32)),
    (Call("cell", F16, F16, grad=True), BF16, ANY, (F32, F32)),
    (Call("cell", F16, F16, grad=True), F16, ANY, (F16, F16)),
    # Never packed, projected or empty ones. The projection is a product, so that h is narrow.
    (Call("cell", F32, F32, packed=True), BF16, ANY, (F32, F32)),
    (Call("cell", F32, F32, empty=True), BF16, ANY, (F32, F32)),
    (Call("cell", F32, F32, projection=True), BF16, ANY, (F32, BF16)),
    (Call("cell", F32, BF16, projection=True), F16, ANY, (F32, F16)),
    (Call("cell", F16, F16, packed=True, projection=True), F16, ANY, (F16, F16)),
)


@pytest.mark.parametrize("call, narrow, machines, expected", DECISIONS)
def test_decisions(call, narrow, machines, expected):
    for machine in machines:
        assert dtypes(call, narrow, MACHINES[machine]) == expected, machine


def test_onednn_support_matches_torch():
    has, ask = torch.backends.mkldnn.is_available(), torch.ops.mkldnn
    narrow = (ask._is_mkldnn_bf16_supported(), ask._is_mkldnn_fp16_supported()) if has else (0, 0)
    assert onednn() == (has, *narrow)
    with torch.backends.mkldnn.flags(enabled=False):
        assert onednn() == (False, *narrow)


def test_onednn_query_is_not_recorded():
    """The query of oneDNN's dtypes works first under Dynamo, and is not recorded by an export."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = pair(dtype=F32)[1]

        def forward(self, x):
            with torch.autocast("cpu", BF16):
                return self.lstm(x)[0]

    model, x = Model().requires_grad_(False), draw(T, N, I, dtype=F32, grad=False)
    lstm_fused.autocast._ask_torch.cache_clear()
    compiled = torch.compile(model, backend="eager", fullgraph=True)(x)
    assert compiled.dtype is model(x).dtype
    lstm_fused.autocast._ask_torch.cache_clear()
    exported = torch.export.export(model, (x,)).graph_module
    assert not [m for m in exported.modules() if "mkldnn" in str(getattr(m, "graph", ""))]


FORMS = {
    "dense": lambda: draw(T, N, I),
    "no rows": lambda: draw(T, 0, I),
    "unsorted": lambda: pack_padded_sequence(draw(T, N, I), [2, 5, 1], enforce_sorted=False),
}
ERRORS = (
    "could not create a primitive",  # oneDNN has no layer in autocast's dtype
    "Unexpected floating ScalarType in at::autocast",  # a packed batch's h, bfloat16 and float16
)


def result(module, input, state, narrow):
    """What a module returns under autocast, or its RuntimeError."""
    with autocast(narrow):
        try:
            return tensors_of(module(input, state))
        except RuntimeError as error:
            return error


@pytest.mark.covering
@each_cell
@each_narrow
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("grad", (True, False), ids=("grad", "no_grad"))
@pytest.mark.parametrize("enabled", (True, False), ids=("", "oneDNN off"))
def test_dtypes(enabled, grad, form, options, narrow, cell):
    """Of every mixture of the dtypes of input and states; explain says what is computed in."""
    with torch.backends.mkldnn.flags(enabled=enabled):
        pairs = [pair(cell=cell, **fitting(cell, options | {"dtype": w})) for w in FLOATS]
        for k, (of_x, of_state) in enumerate(product(FLOATS, (None, *FLOATS))):
            theirs, ours = pairs[k % 3]
            input = form().to(of_x)
            packed = isinstance(input, PackedSequence)
            rows = int(input.batch_sizes[0]) if packed else input.shape[1]
            if ours.batch_first and not packed:
                input = input.transpose(0, 1)
            state = None if of_state is None else state_for(ours, rows, of_state)
            with torch.set_grad_enabled(grad):
                expected, found = (result(m, input, state, narrow) for m in (theirs, ours))
                with autocast(narrow):
                    (call,) = lstm_fused.explain(ours, input, state).calls
            case = of_x, ours.weight_hh_l0.dtype, of_state, expected
            if isinstance(expected, RuntimeError):
                assert str(expected).startswith(ERRORS), case
                assert found["y"].dtype is found["h_n"].dtype is narrow, case
            else:
                of_ours, of_torchs = ({k: t.dtype for k, t in r.items()} for r in (found, expected))
                assert of_ours == of_torchs, case
            computed = found["c_n" if cell == "lstm" else "y"].dtype
            assert {layer.plan.dtype for layer in call.layers} == {str(computed)[6:]}, case


MIXED = [kinds for kinds in product((F32, F64), repeat=3) if F64 in kinds]


@each_cell
@pytest.mark.parametrize("of_x, of_weights, of_state", MIXED, ids=str)
def test_float64_is_left_alone(of_x, of_weights, of_state, cell):
    """Runs, or raises torch.nn's error."""
    theirs, ours = pair(cell=cell, dtype=of_weights)
    input, state = draw(T, N, I, dtype=of_x), state_for(ours, N, of_state)
    expected, found = (result(m, input, state, BF16) for m in (theirs, ours))
    if isinstance(expected, RuntimeError):
        assert isinstance(found, RuntimeError) and "all or none" in str(found)
    else:
        torch.testing.assert_close(found, expected)
        assert found["y"].dtype is F64


def cast(input, state, dtype):
    """Leaves in dtype of the data of input and of the states, then the two made of them."""
    data = input.data if isinstance(input, PackedSequence) else input
    x, *states = (t.detach().to(dtype).requires_grad_() for t in (data, *states_of(state)))
    input = input._replace(data=x) if isinstance(input, PackedSequence) else x
    return [x, *states], input, tuple(states) if len(states) > 1 else states[0]


def trained(module, input, state, dtype, narrow=None):
    """Outputs and gradients by name, the forward pass under autocast to narrow if that is given."""
    given, input, state = cast(input, state, dtype)
    with autocast(narrow) if narrow else nullcontext():
        found = tensors_of(module(input, state))
    # Cotangents that every dtype holds as they are.
    cotangents = [(torch.arange(t.numel()) % 5 - 2).view_as(t).to(t) for t in found.values()]
    leaves = dict(zip(("d_x", "d_h0", "d_c0"), given, strict=False))
    leaves |= {f"d_{name}": w for name, w in module.named_parameters()}
    grads = torch.autograd.grad(list(found.values()), list(leaves.values()), cotangents)
    return found | dict(zip(leaves, grads, strict=True))


@pytest.mark.covering
@each_cell
@each_narrow
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", (F32, BF16, F16, F64), ids=str)
@pytest.mark.parametrize("proj", (0, 3), ids=("", "proj"))
@pytest.mark.parametrize("form", ("dense", "unsorted"))
def test_values(form, proj, dtype, narrow, cell):
    """Outputs and gradients, at most twice as far off as torch.nn's own.

    Where torch.nn raises, its module made narrow stands in for it. Which branch relu takes at a sum
    near 0 depends on rounding, and with it whole gradients: test_layer_parity compares those.
    """
    options = fitting(cell, {"num_layers": 2, "proj_size": proj, "dtype": dtype})
    theirs, ours = pair(cell=cell, **options)
    _, *given = cast(FORMS[form](), state_for(ours, N), dtype)
    exact = trained(copy.deepcopy(theirs).double(), *given, F64)
    found = trained(ours, *given, dtype, narrow)
    assert runtime.last_run()["pass"] == "backward"
    try:
        expected = trained(theirs, *given, dtype, narrow)
    except RuntimeError as error:
        assert str(error).startswith(ERRORS[0])
        stand_in = trained(copy.deepcopy(theirs).to(narrow), *given, narrow)
        expected = {name: t.to(found[name].dtype) for name, t in stand_in.items()}
    assert {t.dtype for name, t in found.items() if name.startswith("d_")} == {dtype}
    if cell == "rnn_relu":
        exact = {name: t for name, t in exact.items() if not name.startswith("d_")}
    assert_accurate(found, expected, exact, F64 if dtype is F64 else narrow)
