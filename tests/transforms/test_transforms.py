"""Every program of helpers/transforms.py agrees with itself over the reference, on the CPU and with
the CUDA kernels emulated; also finite differences, dtypes and vmap.
"""

import pytest
import torch
from torch.func import grad, jvp, vmap
from torch.nn.utils.rnn import PackedSequence

import lstm_fused
from lstm_fused import runtime
from tests.helpers import described, emulated
from tests.helpers.oracle import CELLS
from tests.helpers.transforms import (
    FORMS,
    TRANSFORMS,
    B,
    Form,
    H,
    I,
    N,
    T,
    assert_close,
    each_form,
    of_x,
    run,
    scalar,
)

each_transform = pytest.mark.parametrize("name", TRANSFORMS)


def goals_of(form, name):
    """Every program over the cells of torch.nn."""
    return {form, name, ("described", name)} if form.cell in described.CELLS else {(form, name)}


@pytest.mark.covering(goals=goals_of)
@each_form
@each_transform
def test_transform(name, form):
    assert_close(run(name, form, lstm_fused), run(name, form, "reference"))


@pytest.mark.parametrize(
    "form", [FORMS[0], FORMS[1], Form("lstm", directions=2, packed=True)], ids=str
)
@each_transform
def test_on_cuda_kernels(name, form):
    """The rules of the operators also read tensors as the CUDA kernels save them (emulated)."""
    with emulated.kernels():
        found = run(name, form, lstm_fused)
    assert_close(found, run(name, form, "reference"))


@each_form
def test_finite_differences(form):
    """A gradient and a tangent agree with finite differences."""
    f = form.call(lstm_fused)
    weights = {k: w.detach() for k, w in form.module().named_parameters()}
    x, *states = form.inputs()
    loss, step = scalar(of_x(f, weights, states)), 1e-6 * x.cos()
    expected = (loss(x + step) - loss(x - step)) / 2e-6
    slope = grad(loss)(x)
    torch.testing.assert_close((slope * x.cos()).sum(), expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(jvp(loss, (x,), (x.cos(),))[1], expected, rtol=1e-7, atol=1e-9)
    ran = runtime.last_run()["pass"]
    fused = not form.proj and form.cell not in described.CELLS
    assert ran == ("tangent" if fused else "forward"), "tangents have a kernel, but projections"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_tangents_of_every_dtype(cell, dtype):
    """Within the rounding of values and tangents to the dtype."""
    module = Form(cell).module()
    x = Form(cell).inputs()[0].to(dtype)
    with torch.no_grad():
        for w in module.parameters():
            w.copy_(w.to(dtype))
    exact = jvp(lambda x: module(x)[0], (x.double(),), (x.double().cos(),))[1]
    module.to(dtype)
    found = jvp(lambda x: module(x)[0], (x,), (x.double().cos().to(dtype),))[1]
    assert found.dtype is dtype
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("randomness", ["same", "different", "error"])
def test_dropout_under_vmap(randomness):
    module = lstm_fused.LSTM(I, H, 2, dropout=0.5)
    xs = torch.randn(1, T, N, I).expand(B, T, N, I)

    def call():
        return vmap(lambda x: module(x)[0], randomness=randomness)(xs)

    if randomness == "error":
        with pytest.raises(RuntimeError, match="random operation"):
            call()
    else:
        ys = call()
        assert torch.equal(ys[0], ys[1]) is (randomness == "same")


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell != "lstm"])
def test_matches_torch_under_vmap(cell):
    """Where torch.nn has a batching rule at all: of single steps."""
    form = Form(cell, step=True)
    expected = run("per sample", form, torch.nn)
    assert_close(run("per sample", form, lstm_fused), expected)


def test_batch_sizes_of_examples_are_refused():
    module = lstm_fused.GRU(I, H)
    sizes = torch.tensor([[2, 1], [2, 1]])
    x = torch.randn(2, 3, I)
    with pytest.raises(RuntimeError, match="batch_sizes"):
        vmap(lambda x, sizes: module(PackedSequence(x, sizes))[1])(x, sizes)
