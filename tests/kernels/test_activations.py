"""sigmoid and tanh in ulp, read from the gates that the forward kernel saves for backward."""

import math

import pytest
import torch

from lstm_fused import runtime
from tests.helpers.plan_coverage import FLOAT_ISAS

MAX_ULP = {torch.float32: 2.5, torch.float64: 4.0}


@pytest.fixture(params=FLOAT_ISAS)
def isa(request):
    runtime.set_isa(request.param)
    yield request.param
    runtime.set_isa(None)


def activations(values):
    """(sigmoid, tanh) of a vector as the kernel has them: gates i and g of a cell with w = 1."""
    w_ih = torch.ones(4, 1, dtype=values.dtype)
    w_hh = torch.zeros(4, 1, dtype=values.dtype)
    _, _, _, gates, _ = torch.ops.lstm_fused.recurrent_forward(
        values.view(1, -1, 1), None, None, (), (w_ih, w_hh), 0, 1, False, 1
    )
    return gates[0, 0, :, 0, 0], gates[0, 0, :, 2, 0]


def sample(dtype):
    """Magnitudes from the smallest subnormal to saturation, both signs, densest near 1."""
    generator = torch.Generator().manual_seed(0)
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    exponents = torch.linspace(math.log2(tiny), 10, 100_000, dtype=torch.float64)
    dense = torch.rand(100_000, generator=generator, dtype=torch.float64) * 220 - 110
    near = torch.rand(100_000, generator=generator, dtype=torch.float64) * 4 - 2
    return torch.cat([exponents.exp2(), -exponents.exp2(), dense, near]).to(dtype)


def ulps(result, exact):
    rounded = exact.to(result.dtype)
    spacing = torch.nextafter(rounded.abs(), torch.tensor(math.inf, dtype=result.dtype))
    spacing = (spacing.double() - rounded.abs().double()).clamp(min=5e-324)
    return (result.double() - exact.double()).abs() / spacing


@pytest.mark.parametrize("dtype", MAX_ULP, ids=str)
def test_ulp(isa, dtype):
    values = sample(dtype)
    sigmoid, tanh = activations(values)
    wide = values.double()
    if dtype is torch.float64:
        # float64's oracle is torch itself, good to about 1 ulp where neither underflows.
        keep = wide > -700
        assert ulps(sigmoid[keep], torch.sigmoid(wide[keep])).max() <= MAX_ULP[dtype]
    else:
        assert ulps(sigmoid, torch.sigmoid(wide)).max() <= MAX_ULP[dtype]
    assert ulps(tanh, torch.tanh(wide)).max() <= MAX_ULP[dtype]


@pytest.mark.parametrize("dtype", MAX_ULP, ids=str)
def test_special_values(isa, dtype):
    values = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan], dtype=dtype)
    sigmoid, tanh = activations(values)
    assert sigmoid[:4].tolist() == [0.5, 0.5, 1.0, 0.0]
    assert tanh[:4].tolist() == [0.0, 0.0, 1.0, -1.0]
    assert math.isnan(sigmoid[4]) and math.isnan(tanh[4])
