"""Described cells alone: their values, derived gradients and functions, compiled for each ISA."""

import ctypes
import math
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from tests.helpers.plan_coverage import FLOAT_ISAS
from tests.kernels.test_activations import sample, ulps

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent / "described"
FLAGS = ["-std=c++20", "-O2", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
DTYPES = {torch.float32: "float", torch.float64: "double"}
MAX_ULP = {torch.float32: 2.5, torch.float64: 4.0}
ACTIVATIONS = (torch.exp, torch.log, torch.nn.functional.logsigmoid)


def source_for(isa):
    """The ISA's file with functions.h in place of its kernels."""
    text = (ROOT / "csrc" / "cpu" / f"isa_{isa}.cpp").read_text().replace("../", "")
    return re.sub(
        r'#include "instantiate.h".*^}\n', '#include "functions.h"\n', text, flags=re.S | re.M
    )


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """{ISA: library}"""
    folder = tmp_path_factory.mktemp("described")
    found = {}
    for isa in FLOAT_ISAS:
        source, library = folder / f"{isa}.cpp", folder / f"{isa}.so"
        source.write_text(source_for(isa))
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        options = [*FLAGS, "-Wall", "-Werror", "-Wno-psabi", "-fPIC", "-shared"]
        command = [*compiler, *options, f"-I{ROOT / 'csrc'}", f"-I{FOLDER}", source, "-o", library]
        subprocess.run(command, check=True)
        found[isa] = ctypes.CDLL(str(library))
    return found


@pytest.fixture(params=FLOAT_ISAS)
def library(request, libraries):
    return libraries[request.param]


def activation(library, which, values):
    padded = torch.nn.functional.pad(values, (0, -len(values) % 16), value=1.0)
    result = torch.full_like(padded, math.nan)
    call = getattr(library, f"activation_{DTYPES[values.dtype]}")
    call(which, *map(ctypes.c_void_p, (padded.data_ptr(), result.data_ptr())), len(padded))
    return result[: len(values)]


def values_for(function, dtype):
    values = sample(dtype)
    if function is torch.log:
        tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        largest = math.log2(torch.finfo(dtype).max)
        exponents = torch.linspace(math.log2(tiny), largest, 100_000, dtype=torch.float64)
        return torch.cat([exponents.exp2().to(dtype), values.abs() + tiny])
    bound = 1.0 * math.log(torch.finfo(dtype).max)
    spread = torch.linspace(-1.1 * bound, 1.1 * bound, 100_000, dtype=torch.float64).to(dtype)
    return torch.cat([values, spread])


@pytest.mark.parametrize("function", ACTIVATIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ulp(library, function, dtype):
    values = values_for(function, dtype)
    result = activation(library, ACTIVATIONS.index(function), values)
    # float64's oracle is torch itself, good to about 1 ulp.
    expected = function(values.double())
    infinite = expected.to(dtype).isinf()
    assert torch.equal(result[infinite], expected[infinite].to(dtype))
    assert ulps(result[~infinite], expected[~infinite]).max() <= MAX_ULP[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(library, dtype):
    values = torch.tensor([0.0, -0.0, 1.0, math.inf, -math.inf, -1.0, math.nan], dtype=dtype)
    for which, function in enumerate(ACTIVATIONS):
        result = activation(library, which, values)
        expected = function(values)
        exact = [0, 1, 3, 4, 5, 6] if function is not torch.log else list(range(7))
        if function is not torch.log:
            exact.remove(5)
        torch.testing.assert_close(
            result[exact], expected[exact], rtol=2e-7, atol=0, equal_nan=True
        )
    assert activation(library, 0, values)[:5].tolist() == [
        1,
        1,
        activation(library, 0, values)[2],
        math.inf,
        0,
    ]


def peephole(preact, vector, mask, prev):
    i = torch.sigmoid(preact[0] + vector[0] * prev[0])
    f = torch.sigmoid(preact[1] + vector[1] * prev[0])
    c = f * prev[0] + i * torch.tanh(preact[2])
    return torch.sigmoid(preact[3] + vector[2] * c) * torch.tanh(c), [c]


def exponential(preact, vector, mask, prev):
    forget = torch.nn.functional.logsigmoid(preact[1]) + prev[2]
    m = torch.maximum(preact[0], forget)
    i, f = torch.exp(preact[0] - m), torch.exp(forget - m)
    c, n = f * prev[0] + i * torch.tanh(preact[2]), f * prev[1] + i
    return torch.sigmoid(preact[3]) * c / n, [c, n, m]


def functions(preact, vector, mask, prev):
    total = -preact[0] * 0.1 * 5 + mask[0] * torch.log(preact[1].abs() + 1.5)
    total = (total - 2 / (1 + torch.exp(vector[0]))) * (mask[1] - preact[2]) / 3
    h = total.clamp(-1.25, 1.25) + torch.minimum(total * total, vector[1]) * prev[0]
    h = h + torch.relu(preact[2]) * 1.1
    return h, [h]


def kinks(preact, vector, mask, prev):
    bound = vector[0].detach()
    c = torch.maximum(preact[0], preact[1]) + 3 * torch.minimum(preact[0], preact[1])
    c = c + torch.relu(preact[2])
    c = c + torch.where(preact[2] < preact[3], preact[0] * 2, preact[1] * 3)
    h = preact[3].abs() + prev[0].clamp(-bound, bound) + preact[1].clamp(-1, 1)
    return h, [c]


def passing(preact, vector, mask, prev):
    h = torch.tanh(preact[0] + preact[1]) + prev[3] / 2
    return h, [prev[1], h, torch.full_like(h, -0.75), h]


# Of each cell: its step, and the numbers of preacts, vectors, masks and states.
CELLS = {
    "Peephole": (peephole, (4, 3, 0, 1)),
    "Exponential": (exponential, (4, 0, 0, 3)),
    "Functions": (functions, (3, 2, 2, 1)),
    "Kinks": (kinks, (4, 1, 0, 1)),
    "Passing": (passing, (2, 0, 0, 4)),
}


def drawn(name, dtype, rows, lanes):
    """(rows, values, lanes): the inputs, then the gradients of h and of the next states."""
    torch.manual_seed(0)
    counts = CELLS[name][1]
    values = torch.randn(rows, sum(counts) + 1 + counts[3], lanes, dtype=torch.float64)
    if name == "Kinks":
        values[:, :5] = torch.randint(-2, 3, (rows, 5, lanes)).double() / 2
        values[:, 4] = values[:, 4].abs()
        values[:, 4, 0] = math.inf
        values[:, 5] = torch.randint(-2, 3, (rows, lanes)).double() / 2
    if name == "Exponential":
        values[:, 5].abs_()
    return values.to(dtype)


def expected_of(name, values):
    """The results as run() of functions.h gives them, by torch's autograd."""
    step, counts = CELLS[name]
    inputs = values.transpose(0, 1)[: sum(counts)].clone().requires_grad_()
    groups = torch.split(inputs, counts)
    h, states = step(*groups)
    cotangents = values.transpose(0, 1)[sum(counts) :]
    outputs = [(o, d) for o, d in zip([h, *states], cotangents, strict=True) if o.requires_grad]
    torch.autograd.backward(*zip(*outputs, strict=True))
    d_preact, d_vector, _, d_prev = torch.split(inputs.grad, counts)
    found = [h, *states, h, *d_preact, *d_vector, *d_prev]
    return torch.stack([tensor.detach() for tensor in found], 1)


def run(library, name, values):
    counts = CELLS[name][1]
    results = 2 + 2 * counts[3] + counts[0] + counts[1]
    found = torch.full((values.shape[0], results, values.shape[2]), math.nan, dtype=values.dtype)
    call = getattr(library, f"run_{DTYPES[values.dtype]}")
    pointers = map(ctypes.c_void_p, (values.data_ptr(), found.data_ptr()))
    call(name.encode(), ctypes.c_int64(values.shape[0]), *pointers)
    return found


def lanes_of(library, name, dtype):
    return getattr(library, f"run_{DTYPES[dtype]}")(name.encode(), ctypes.c_int64(0), None, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CELLS)
def test_values_and_gradients(library, name, dtype):
    values = drawn(name, dtype, 200, lanes_of(library, name, dtype))
    expected = expected_of(name, values.double())
    result = run(library, name, values).double()
    scale = 1 + expected.abs()
    if dtype is torch.float64:
        assert ((result - expected).abs() / scale).max() < 1e-13
    else:
        error = ((result - expected).abs() / scale).max()
        peers = ((expected_of(name, values).double() - expected).abs() / scale).max()
        assert error <= 2 * peers + 1e-6


@pytest.mark.parametrize("name", CELLS)
def test_nan_propagation(library, name):
    """NaN in an input goes where it goes in torch, forward and backward."""
    values = drawn(name, torch.float64, 200, lanes_of(library, name, torch.float64))
    inputs = values[:, : sum(CELLS[name][1])]
    inputs[torch.rand(inputs.shape) < 0.1] = math.nan
    torch.testing.assert_close(
        run(library, name, values),
        expected_of(name, values),
        rtol=1e-12,
        atol=1e-12,
        equal_nan=True,
    )
