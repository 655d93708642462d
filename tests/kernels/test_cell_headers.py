"""Each described cell's header alone, in float64: values, and the derived backward, against torch's
autograd of the cell's step in lstm_fused.reference_steps."""

import ctypes
import math
import subprocess
from pathlib import Path

import pytest
import torch

from lstm_fused import ops, reference_steps
from tests.helpers import described

ROOT = Path(__file__).parents[2]
HEADERS = sorted(
    path
    for path in (ROOT / "csrc" / "cells").glob("*.h")
    if ": DescribedCell {" in path.read_text() and path.name != "described.h"
)
# Of a unit's operand, where a cell has one: the last gate's matrix is a multiple of the identity.
OPERAND_WEIGHT = 0.75
H = 512  # units of a case, each with values of its own
# Those of which a unit needs no other unit.
CELLS = [name for name, row in described.CELLS.items() if "epsilon" not in row.constants]
COUNTS = ("gates", "preacts", "cells", "keeps_hidden", "vectors", "masks")

DRIVER = """
#include <cmath>
#include <cstdint>
#include "compiler.h"
namespace lstm_fused {
namespace {
[[maybe_unused]] double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
[[maybe_unused]] double tanh(double x) { return std::tanh(x); }
[[maybe_unused]] double exp(double x) { return std::exp(x); }
[[maybe_unused]] double log(double x) { return std::log(x); }
[[maybe_unused]] double log_sigmoid(double x) {
  return std::fmin(x, 0) - std::log1p(std::exp(-std::fabs(x)));
}
}
}
#include "cells/derive.h"
%s

using namespace lstm_fused;
constexpr double kOperandWeight = %s;

// forward: preacts, vectors, masks, prev -> next, h, each (count, units); backward: dh and d_state
// besides, replaced by the gradients of prev -> d_preacts, d_vectors, h.
template <class Cell>
void run(int64_t units, const double* preacts, const double* vectors, const double* masks,
         const double* prev, double* next, double* h, const double* dh, double* d_state,
         double* d_preacts, double* d_vectors, double* h_again) {
  constexpr int states = Cell::kCells + Cell::kKeepsHidden, most = 16;
  for (int64_t u = 0; u < units; ++u) {
    double in[6][most], out[3][most], again;
    const auto gather = [&](double* to, const double* from, int count) {
      for (int k = 0; k < count; ++k) to[k] = from[k * units + u];
    };
    const auto scatter = [&](double* to, const double* from, int count) {
      for (int k = 0; k < count; ++k) to[k * units + u] = from[k];
    };
    gather(in[0], preacts, Cell::kPreacts);
    gather(in[1], vectors, Cell::kVectors);
    gather(in[2], masks, Cell::kMasks);
    gather(in[3], prev, states);
    gather(in[4], d_state, states);
    UnitForward<double> forward{in[0], in[1], in[2], in[3], 1, out[0], 1, h + u};
    [[maybe_unused]] double operand = 0, d_operand = 0, d_last;
    if constexpr (HasOperand<Cell>) {
      UnitForward<double> before = forward;
      before.h = &operand;
      unit_operand<Cell, double>(before);
      in[0][Cell::kPreacts - 1] += kOperandWeight * operand;
    }
    unit_forward<Cell, double>(forward);
    UnitBackward<double> backward{in[0], 1,      in[1], in[2],  in[3],  1,      out[0], 1,
                                  dh + u, in[4], 1,     out[1], out[2], &again, nullptr,
                                  &d_operand, &operand};
    if constexpr (HasOperand<Cell>) {
      unit_last_gradient<Cell, double>(backward, &d_last);
      d_operand = kOperandWeight * d_last;
    }
    unit_backward<Cell, double>(backward);
    scatter(next, out[0], states);
    scatter(d_state, in[4], states);
    scatter(d_preacts, out[1], Cell::kPreacts);
    scatter(d_vectors, out[2], Cell::kVectors);
    scatter(h_again, &again, 1);
  }
}

#define CELL(Cell)                                                                            \\
  extern "C" void run_##Cell(int64_t n, const double* a, const double* b, const double* c,    \\
                             const double* d, double* e, double* f, const double* g, double* i, \\
                             double* j, double* k, double* l) {                               \\
    run<Cell>(n, a, b, c, d, e, f, g, i, j, k, l);                                            \\
  }                                                                                           \\
  extern "C" void count_##Cell(int* n) {                                                      \\
    const int all[] = {Cell::kGates,       Cell::kPreacts, Cell::kCells,                      \\
                       Cell::kKeepsHidden, Cell::kVectors, Cell::kMasks};                     \\
    for (int x : all) *n++ = x;                                                               \\
  }
%s
"""


def struct_of(name):
    return "".join(word.capitalize() for word in name.split("_"))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cells")
    includes = "".join(f'#include "cells/{path.name}"\n' for path in HEADERS)
    source, library = folder / "cells.cpp", folder / "cells.so"
    rows = "".join(f"CELL({struct_of(name)})\n" for name in CELLS)
    source.write_text(DRIVER % (includes, OPERAND_WEIGHT, rows))
    options = ["-std=c++20", "-O1", "-fPIC", "-shared", "-Wall", "-Werror", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["c++", *options, source, "-o", library], check=True)
    return ctypes.CDLL(str(library))


def counts_of(library, name):
    found = (ctypes.c_int * len(COUNTS))()
    getattr(library, f"count_{struct_of(name)}")(found)
    return dict(zip(COUNTS, found, strict=True))


def drawn(name, counts, extreme):
    """x and b_hh (G, H), vectors (V, H), masks (M, H) and the states (K + 1, H), h first."""
    torch.manual_seed(0)
    scale = 300.0 if extreme else 1.5
    gates, cells = counts["gates"], counts["cells"]
    x, b_hh, state = (
        torch.randn(k, H, dtype=torch.float64) * scale for k in (gates, gates, cells + 1)
    )
    vectors = torch.randn(counts["vectors"], H, dtype=torch.float64)
    masks = torch.rand(counts["masks"], H, dtype=torch.float64).round(decimals=1)
    if name.startswith("regularized"):  # bounds, some of them infinite
        bounds = vectors[-2:] if cells else vectors[-1:]
        bounds.abs_()[:, ::3] = math.inf
    if name == "slstm":
        state[2] = state[2].abs() + 1
        state[1:, ::4] = 0  # a first step
    if extreme:
        x[:, :8], b_hh[:, :8], state[:1, :8] = 0, 0, 0  # kinks
    return x, b_hh, vectors, masks, state


def expected_of(name, counts, x, b_hh, vectors, masks, state, d_h, d_cells):
    """h, the cell states, and the gradients of the arguments, by autograd of the step."""
    gates, cells = counts["gates"], counts["cells"]
    leaves = [t.clone().requires_grad_() for t in (x, b_hh, vectors, state)]
    x, b_hh, vectors, state = leaves
    # One row, whose pre-activations are x and b_hh themselves.
    step = reference_steps.CELLS[name].step
    size = gates * H
    w_hh = torch.empty(size, 0, dtype=torch.float64)
    if ops.CELLS[name]["operand"]:
        w_hh = torch.zeros(size, H, dtype=torch.float64)
        w_hh[-H:] = OPERAND_WEIGHT * torch.eye(H)
    h, *rest = step(
        x.reshape(1, size),
        (state[:1], *(state[1:].reshape(1, -1),) * (cells > 0)),
        torch.eye(size, dtype=torch.float64),
        w_hh,
        torch.zeros(size, dtype=torch.float64),
        b_hh.reshape(size),
        None,
        vectors if counts["vectors"] else None,
        masks.unsqueeze(0) if counts["masks"] else None,
    )
    outputs, cotangents = [h, *rest], [d_h.unsqueeze(0), d_cells.reshape(1, -1)]
    torch.autograd.backward(outputs, cotangents[: len(outputs)])
    found = [h[0], *(rest[0].reshape(cells, H) if rest else ())]
    return found, [t.grad if t.grad is not None else torch.zeros_like(t) for t in leaves]


def preacts_of(counts, x, b_hh):
    """As described.h has them: the last q gates are in two parts."""
    q = counts["preacts"] - counts["gates"]
    split = counts["gates"] - q
    return torch.cat([x[split:], x[:split] + b_hh[:split], b_hh[split:]])


@pytest.mark.parametrize("extreme", [False, True], ids=["usual", "extreme"])
@pytest.mark.parametrize("name", CELLS)
def test_values_and_gradients(library, name, extreme):
    counts = counts_of(library, name)
    known = reference_steps.CELLS[name]
    assert all(getattr(known, key) == counts[key] for key in ("gates", "cells", "vectors", "masks"))
    x, b_hh, vectors, masks, state = drawn(name, counts, extreme)
    cells, keeps = counts["cells"], counts["keeps_hidden"]
    d_out = torch.randn(1 + cells, H, dtype=torch.float64)
    (h, *after), (d_x, d_b, d_vectors, d_state) = expected_of(
        name, counts, x, b_hh, vectors, masks, state, d_out[0], d_out[1:]
    )

    prev = torch.cat([state[1:], state[:1]])[: cells + keeps].contiguous()
    d_next = torch.zeros(cells + keeps, H, dtype=torch.float64)
    d_next[:cells] = d_out[1:]
    half = d_out[:1] / 2 if keeps else 0 * d_out[:1]  # of h, that of the carried one apart
    d_next[cells:] = half[:keeps]
    result = {
        "next": torch.full_like(prev, math.nan),
        "h": torch.full((1, H), math.nan, dtype=torch.float64),
        "dh": (d_out[:1] - half).contiguous(),
        "d_state": d_next,
        "d_preacts": torch.full((counts["preacts"], H), math.nan, dtype=torch.float64),
        "d_vectors": torch.full_like(vectors, math.nan),
        "again": torch.full((1, H), math.nan, dtype=torch.float64),
    }
    given = [preacts_of(counts, x, b_hh), vectors, masks, prev, *result.values()]
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in given]
    getattr(library, f"run_{struct_of(name)}")(ctypes.c_int64(H), *pointers)

    def equal(found, expected):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)

    equal(result["h"][0], h)
    equal(result["again"][0], h)
    equal(result["next"], torch.stack([*after, h] if keeps else after) if len(prev) else prev)
    equal(result["d_preacts"], preacts_of(counts, d_x, d_b) - shared(counts, d_b))
    equal(result["d_vectors"], d_vectors)
    equal(result["d_state"], torch.cat([d_state[1:], d_state[:1]])[: cells + keeps])


def shared(counts, d_b):
    """What preacts_of counts twice: both parts of a gate that is summed have its gradient."""
    q = counts["preacts"] - counts["gates"]
    split = counts["gates"] - q
    return torch.cat([torch.zeros_like(d_b[:q]), d_b[:split], torch.zeros_like(d_b[:q])])
