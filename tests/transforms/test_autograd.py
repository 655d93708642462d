"""Autograd beyond one backward pass: higher orders, subsets of the gradients, torch.func, saved
tensor hooks, checkpointing, anomaly mode and in-place changes.
"""

import pickle
from contextlib import nullcontext
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.func import functional_call, grad, jacrev, vjp
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import lstm_fused
from lstm_fused import runtime
from lstm_fused.testing.tolerance import allowed, error_of
from tests.helpers import described
from tests.helpers.cuda_cases import tf32
from tests.helpers.oracle import CELLS as OF_TORCH
from tests.helpers.oracle import (
    Problem,
    has_cell_state,
    may_project,
    on_default_device,
    values_of,
)

pytestmark = pytest.mark.usefixtures("device")

CELLS = (*OF_TORCH, *described.EACH_KIND)
SMALL = Problem(3, 2, 3, 4, dtype=torch.float64)
CHECKED = (
    SMALL,
    replace(SMALL, hx=True),
    replace(SMALL, bias=False, batch_first=True),
    replace(SMALL, T=1, N=1, hx=True),
    replace(SMALL, T=2, N=1, H=17),
    replace(SMALL, proj=2, hx=True),
    replace(SMALL, directions=2, hx=True),
    replace(SMALL, directions=2, proj=3, bias=False),
    replace(SMALL, layers=2, directions=2),
    replace(SMALL, layers=2, proj=2, hx=True, batch_first=True),
    replace(SMALL, T=4, N=3, form="sorted"),
    replace(SMALL, T=4, N=3, form="unsorted", hx=True),
    replace(SMALL, T=4, N=3, form="unsorted", directions=2, proj=2, hx=True),
    replace(SMALL, T=4, N=3, form="sorted", layers=2, directions=2, bias=False),
)
ALL = replace(SMALL, T=4, N=3, H=6, proj=3, layers=2, directions=2, hx=True)
each_cell = pytest.mark.parametrize("cell", CELLS)


def of(cell, problem):
    """The problem for another cell, without a projection where the cell has none."""
    return replace(problem, cell=cell, proj=problem.proj if may_project(cell) else 0)


def each_of(*problems):
    """Every problem for every cell."""
    each = dict.fromkeys(of(cell, problem) for cell in CELLS for problem in problems)
    return pytest.mark.parametrize("problem", each, ids=str)


def goals_of(device, problem):
    """Each problem whatever its cell, and each cell, on each device."""
    shape = replace(problem, cell="lstm", proj=min(problem.proj, 1))
    return {shape, (device, problem.cell), (device, problem.packed, problem.directions)}


def forget(dtype="float64"):
    """Run another layer, so that last_run() changes with the next call."""
    other = torch.float32 if dtype == "float64" else torch.float64
    with torch.no_grad():
        lstm_fused.LSTM(1, 1, dtype=other)(torch.zeros(1, 1, 1, dtype=other))
    assert runtime.last_run()["dtype"] != dtype


def assert_ran(pass_name, dtype="float64"):
    run = runtime.last_run()
    assert (run["pass"], run["dtype"]) == (pass_name, dtype), run


def function_of(problem, library=lstm_fused, exact=False):
    """f(x, *states, *weights) -> (y, h_n[, c_n]), and the tensors to call it with.

    exact: the same numbers, in float64.
    """
    p = on_default_device(problem)
    values, module = values_of(p), p.module(library)

    def f(x, *tensors):
        count = len(values.state)
        states, weights = tensors[:count] or None, tensors[count:]
        if count == 1:
            (states,) = states
        given = x.transpose(0, 1) if p.batch_first else x
        if p.packed:
            given = pack_padded_sequence(x, values.lengths, enforce_sorted=p.form == "sorted")
        by_name = dict(zip(values.weights, weights, strict=True))
        y, ends = functional_call(module, by_name, (given, states))
        ends = ends if has_cell_state(p.cell) else (ends,)
        return (y.data if p.packed else y), *ends

    tensors = (values.x, *values.state, *values.weights.values())
    dtype = torch.float64 if exact else p.dtype
    return f, [t.to(dtype, copy=True).requires_grad_() for t in tensors]


def names_of(problem):
    states = ("h0", "c0")[: len(values_of(problem).state)]
    return ["x", *states, *values_of(problem).weights]


def total(outputs):
    """A scalar to which every element of every output contributes with its own weight."""
    return sum(
        (out * torch.arange(1, out.numel() + 1).view(out.shape).sin()).sum() for out in outputs
    )


def gradients(problem, library=lstm_fused, call=None):
    f, tensors = function_of(problem, library)
    out = f(*tensors) if call is None else call(f, *tensors)
    return torch.autograd.grad(total(out), tensors)


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.covering(goals=goals_of)
@each_of(*CHECKED)
def test_gradcheck(problem):
    f, tensors = function_of(problem)
    forget()
    f(*tensors)
    assert_ran("forward")
    assert gradcheck(f, tensors, fast_mode=problem.layers > 1 or problem.H > 4)
    forget()
    torch.autograd.grad(total(f(*tensors)), tensors)
    assert_ran("backward")


@pytest.mark.covering(goals=goals_of)
@each_of(*CHECKED)
def test_gradgradcheck(problem):
    f, tensors = function_of(problem)
    forget()
    assert gradgradcheck(f, tensors, fast_mode=True)
    assert runtime.last_run()["dtype"] == "float64"


@each_cell
def test_gradgradcheck_of_every_element(cell):
    f, tensors = function_of(replace(SMALL, T=2, I=2, H=2, hx=True, cell=cell))
    assert gradgradcheck(f, tensors)


@each_cell
@pytest.mark.parametrize("form", ["dense", "sorted"])
def test_batched_output_gradients(form, cell):
    f, tensors = function_of(replace(SMALL, hx=True, form=form, cell=cell))
    assert gradcheck(f, tensors, fast_mode=True, check_batched_grad=True)
    y = f(*tensors)[0]
    every = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)
    forget()
    batched = torch.autograd.grad(y, tensors, every, retain_graph=True, is_grads_batched=True)
    assert_ran("backward")
    rows = [torch.autograd.grad(y, tensors, one, retain_graph=True) for one in every]
    assert_close(batched, tuple(map(torch.stack, zip(*rows, strict=True))))


@each_cell
def test_batched_output_gradients_have_gradients(cell):
    def second(library):
        f, tensors = function_of(replace(SMALL, hx=True, layers=2, cell=cell), library)
        y = f(*tensors)[0]
        every = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)
        grads = torch.autograd.grad(y, tensors, every, create_graph=True, is_grads_batched=True)
        return torch.autograd.grad(total(grads), tensors)

    assert_close(second(lstm_fused), second(torch.nn))


@each_cell
def test_hessian_vectorized(cell):
    def hessian(library):
        f, tensors = function_of(replace(SMALL, hx=True, cell=cell), library)

        def loss(x, h0):
            return total(f(x, h0, *tensors[2:]))

        return torch.autograd.functional.hessian(loss, tuple(tensors[:2]), vectorize=True)

    assert_close(hessian(lstm_fused), hessian(torch.nn))


def penalty_gradients(problem, library, exact=False):
    """Of a loss that holds the norm of the gradient of the outputs with respect to the input."""
    f, tensors = function_of(problem, library, exact)
    (dx,) = torch.autograd.grad(total(f(*tensors)), tensors[0], create_graph=True)
    grads = torch.autograd.grad(dx.square().sum() + total(f(*tensors)), tensors)
    return {f"d_{name}": g for name, g in zip(names_of(problem), grads, strict=True)}


@each_of(
    Problem(9, 4, 6, 20, hx=True),
    Problem(9, 4, 6, 20, hx=True, layers=2, directions=2, proj=7),
    Problem(9, 4, 6, 20, hx=True, form="unsorted"),
)
def test_gradient_penalty(problem):
    exact = penalty_gradients(problem, torch.nn, exact=True)
    torchs = penalty_gradients(problem, torch.nn)
    forget("float32")
    ours = penalty_gradients(problem, lstm_fused)
    assert_ran("backward", "float32")
    for name, truth in exact.items():
        largest = truth.abs().max().item() if truth.numel() else 0.0
        limit = allowed(name, torch.float32, error_of(torchs[name], truth), largest)
        assert error_of(ours[name], truth) <= limit, name


@each_cell
def test_third_order_agrees(cell):
    def third(library):
        f, tensors = function_of(replace(SMALL, hx=True, cell=cell), library)
        g = torch.autograd.grad(total(f(*tensors)), tensors, create_graph=True)
        g = torch.autograd.grad(sum(t.square().sum() for t in g), tensors, create_graph=True)
        return torch.autograd.grad(sum(t.square().sum() for t in g), tensors)

    assert_close(third(lstm_fused), third(torch.nn))


@each_of(ALL, replace(ALL, form="unsorted"))
def test_bitwise_reproducible(problem):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        first, second = (gradients(replace(problem, dtype=dtype, N=9, H=40)) for _ in range(2))
        assert all(map(torch.equal, first, second))


@each_cell
def test_retained_graph(cell):
    f, tensors = function_of(of(cell, ALL))
    loss = total(f(*tensors))
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    second = torch.autograd.grad(loss, tensors)
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, tensors)


@pytest.mark.covering
@each_cell
@pytest.mark.parametrize("used", [(0, 1, 2), (1,)], ids=str)
@pytest.mark.parametrize("form", ["dense", "sorted"])
def test_frozen_subsets(form, used, cell):
    """Each subset of one layer's tensors that may need a gradient: 2^8 if it is projected."""
    f, tensors = function_of(of(cell, replace(ALL, layers=1, directions=1, form=form)))
    used = used[: len(f(*tensors))]
    out = f(*tensors)
    everything = torch.autograd.grad(total([out[k] for k in used]), tensors)
    for needs in product((True, False), repeat=len(tensors)):
        for t, need in zip(tensors, needs, strict=True):
            t.grad = None
            t.requires_grad_(need)
        out = f(*tensors)
        assert all(o.requires_grad == any(needs) for o in out)
        if any(needs):
            total([out[k] for k in used]).backward()
        for t, need, expected in zip(tensors, needs, everything, strict=True):
            assert torch.equal(t.grad, expected) if need else t.grad is None


USED = [(0,), (1,), (2,), (0, 2), (1, 2)]


@pytest.mark.covering
@pytest.mark.parametrize(
    "cell, used",
    [(cell, used) for cell in CELLS for used in USED if has_cell_state(cell) or 2 not in used],
    ids=str,
)
@pytest.mark.parametrize("form", ["dense", "unsorted"])
def test_part_of_the_outputs_used(cell, used, form):
    problem = of(cell, replace(ALL, form=form))

    def some(library):
        f, tensors = function_of(problem, library)
        out = f(*tensors)
        return torch.autograd.grad(total([out[k] for k in used]), tensors, materialize_grads=True)

    assert_close(some(lstm_fused), some(torch.nn))


CHANGED = ["x", "h0", "c0", "y", "h_n", "c_n", "weight_ih_l0", "bias_hh_l0"]


@pytest.mark.covering
@pytest.mark.parametrize("frozen", [(), ("weight_ih_l0",)], ids=("trained", "w_ih frozen"))
@pytest.mark.parametrize(
    "cell, changed",
    [(cell, name) for cell in CELLS for name in CHANGED if has_cell_state(cell) or name[0] != "c"],
)
@pytest.mark.parametrize("proj", [0, 2], ids=("", "projected"))
def test_in_place_change_before_backward(cell, changed, frozen, proj, device):
    """Allowed, with the same gradient, wherever torch.nn allows it in float32 or in float64.

    CUDA's kernels read y again, as cuDNN's do: there it may raise.
    """
    if proj and not may_project(cell):
        return

    def outcome(library, dtype=torch.float64):
        problem = replace(SMALL, dtype=dtype, hx=True, cell=cell, proj=proj)
        f, tensors = function_of(problem, library)
        named = dict(zip(names_of(problem), tensors, strict=True))
        for name in frozen:
            named[name].requires_grad_(False)
        # A buffer that is used again is no leaf that autograd guards.
        given = [t.clone() if name == "x" else t for name, t in named.items()]
        out = f(*given)
        named |= {"given x": given[0], **dict(zip(("y", "h_n", "c_n"), out, strict=False))}
        target = named["given x" if changed == "x" else changed]
        with torch.no_grad() if target.is_leaf else nullcontext():
            target.mul_(2)
        try:
            wanted = [t for t in tensors if t.requires_grad]
            return torch.autograd.grad(total(out), wanted)
        except RuntimeError as error:
            return str(error).split(":")[0]

    with tf32(False):
        found, torchs = (
            outcome(lstm_fused),
            [outcome(torch.nn, d) for d in (torch.float64, torch.float32)],
        )
    values = [each for each in torchs if not isinstance(each, str)]
    if values and not (device != "cpu" and changed == "y" and isinstance(found, str)):
        torch.testing.assert_close(found, values[0], check_dtype=False)
    else:
        assert "modified by an inplace operation" in found


@each_cell
@pytest.mark.parametrize("changed", ["x", "bias_ih_l0"])
def test_in_place_change_before_second_derivative(cell, changed):
    """A second derivative needs tensors that the first does not."""
    f, tensors = function_of(replace(SMALL, cell=cell))
    named = dict(zip(names_of(replace(SMALL, cell=cell)), tensors, strict=True))
    named["weight_ih_l0"].requires_grad_(False)
    named["x"] = tensors[0] = tensors[0].clone()
    out = f(*tensors)
    with torch.no_grad():
        named[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(total(out), named["weight_hh_l0"], create_graph=True)


@each_cell
def test_func_grad_and_vjp(cell):
    problem = replace(SMALL, hx=True, layers=2, cell=cell)
    f, tensors = function_of(problem)
    where = tuple(range(len(tensors)))
    tensors = [t.detach() for t in tensors]
    expected = gradients(problem, torch.nn)
    forget()
    assert_close(grad(lambda *ts: total(f(*ts)), where)(*tensors), expected)
    assert_ran("backward")
    _, pull = vjp(lambda *ts: total(f(*ts)), *tensors)
    assert_close(pull(torch.tensor(1.0, dtype=torch.float64)), expected)


@each_cell
def test_func_grad_of_grad(cell):
    def second(library):
        f, tensors = function_of(replace(SMALL, hx=True, cell=cell), library)
        tensors = [t.detach() for t in tensors]

        def slope(*ts):
            return grad(lambda *us: total(f(*us)))(*ts).square().sum()

        return grad(slope, tuple(range(len(tensors))))(*tensors)

    assert_close(second(lstm_fused), second(torch.nn))


@each_cell
@pytest.mark.parametrize("form", ["dense", "sorted"])
def test_func_jacrev(form, cell):
    problem = replace(SMALL, form=form, hx=True, cell=cell)

    def jacobians(library):
        f, tensors = function_of(problem, library)
        tensors = [t.detach() for t in tensors]
        return jacrev(lambda *ts: f(*ts)[0], tuple(range(len(tensors))))(*tensors)

    f, tensors = function_of(problem, torch.nn)
    y = f(*tensors)[0]
    rows = [torch.autograd.grad(v, tensors, retain_graph=True) for v in y.flatten()]
    expected = tuple(
        torch.stack(part).view(y.shape + part[0].shape) for part in zip(*rows, strict=True)
    )
    forget()
    assert_close(jacobians(lstm_fused), expected)
    assert_ran("backward")


LAYOUTS = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "every second": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "flipped rows": lambda t: t.flip(0).contiguous().flip(0),
    "offset": lambda t: torch.cat((t[:1], t))[1:],
    "expanded": lambda t: t[:1].expand_as(t),
    "one number": lambda t: t.flatten()[:1].sum().expand_as(t),
}


@each_cell
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout, cell):
    """Of the input, states and weights, and of the gradients of the outputs."""
    problem = of(cell, replace(ALL, layers=1, T=5))

    def run(library, laid_out):
        f, tensors = function_of(problem, library)
        given = [laid_out(LAYOUTS[layout](t)) for t in tensors]
        out = f(*given)
        d_out = [
            laid_out(LAYOUTS[layout](g)) for g in values_of(on_default_device(problem)).cotangents
        ]
        return torch.autograd.grad(out, tensors, d_out)

    expected = run(torch.nn, torch.Tensor.contiguous)
    forget()
    assert_close(run(lstm_fused, lambda t: t), expected)
    assert_ran("backward")


@each_cell
def test_eval_mode_has_gradients(cell):
    for dropout in (0.0, 0.5):
        torch.manual_seed(0)
        problem = on_default_device(replace(SMALL, layers=2, cell=cell))
        ours, theirs = (problem.module(library).eval() for library in (lstm_fused, torch.nn))
        ours.dropout = theirs.dropout = dropout
        theirs.load_state_dict(ours.state_dict())
        x = values_of(problem).x
        grads = []
        for module in (ours, theirs):
            y, _ = module(x)
            grads.append(torch.autograd.grad(total([y]), list(module.parameters())))
        assert_close(*grads)


def saved_elsewhere(f, *tensors):
    with saved_tensors_hooks(lambda t: pickle.dumps(t.detach()), pickle.loads):
        return f(*tensors)


def saved_on_cpu(f, *tensors):
    with save_on_cpu():
        return f(*tensors)


def under_anomaly_mode(f, *tensors):
    with torch.autograd.detect_anomaly(check_nan=True):
        return f(*tensors)


def recomputed(f, *tensors):
    return checkpoint(f, *tensors, use_reentrant=False)


@pytest.mark.covering
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("call", [saved_elsewhere, saved_on_cpu, under_anomaly_mode, recomputed])
@each_of(ALL, replace(ALL, form="unsorted"))
def test_saved_tensor_hooks(call, problem):
    expected = gradients(problem)
    forget()
    found = gradients(problem, call=call)
    assert_ran("backward")
    assert all(map(torch.equal, found, expected))


@each_cell
def test_anomaly_mode_names_a_nan(cell):
    f, tensors = function_of(replace(SMALL, T=2, cell=cell))
    with pytest.warns(UserWarning), torch.autograd.set_detect_anomaly(True):
        y = f(*tensors)[0]
        with pytest.raises(RuntimeError, match="returned nan values"):
            (y * 0).sqrt().mul(0).sum().backward()
