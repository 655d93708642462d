"""Cells of the user: compiled, kept, refused with the line that is wrong, and run as any layer."""

import copy
import pickle
import subprocess
from pathlib import Path

import pytest
import torch

import lstm_fused
from lstm_fused import cell_library, ops
from lstm_fused.testing import cell_check
from tests.kernels import test_described as described

CELLS = Path(__file__).parents[1] / "kernels" / "described" / "cells.h"
LIGHT_GRU = """
#include "described.h"

// Ravanelli et al. 2018, without its batch normalisation. Gates z and the candidate.
struct LightGru : DescribedCell {
  static constexpr int kGates = 2;
  static constexpr int kPreacts = 2;
  static constexpr bool kKeepsHidden = true;

  template <class V>
  static constexpr V forward(const V* preact, const V*, const V*, const V* prev, V*) {
    const V z = sigmoid(preact[0]);
    return z * prev[0] + (1 - z) * relu(preact[1]);
  }
};
"""
MASKED = """
#include "described.h"

struct Masked : DescribedCell {
  static constexpr int kGates = 1, kPreacts = 1, kCells = 2, kVectors = 1, kMasks = 1;

  template <class V>
  static constexpr V forward(const V* preact, const V* vector, const V* mask, const V* prev,
                             V* next) {
    next[0] = mask[0] * prev[0] + tanh(preact[0]);
    next[1] = 0.5 * prev[1] + next[0] * vector[0];
    return tanh(next[1]);
  }
};
"""
NORMALIZED = """
#include "described.h"

struct Normalized : DescribedCell {
  static constexpr int kGates = 2, kPreacts = 2, kCells = 1, kVectors = 2;

  template <class V>
  static constexpr V forward(const V* preact, const V* vector, const V*, const V* prev, V* next) {
    const V sums[2] = {preact[0], preact[1]};
    V gates[2];
    normalize(sums, gates);
    next[0] = prev[0] + tanh(vector[0] * gates[0]) * sigmoid(gates[1]);
    const V c[1] = {next[0]};
    V normal[1];
    normalize(c, normal);
    return tanh(normal[0]);
  }
};
"""

RESET_BEFORE = """
#include "described.h"

// With a cell state, a vector and a gate in two parts, as none of csrc/cells has them beside an
// operand.
struct ResetBefore : DescribedCell {
  static constexpr int kGates = 3, kPreacts = 4, kCells = 1, kVectors = 1;

  template <class V>
  static constexpr V operand(const V* preact, const V* vector, const V*, const V* prev) {
    return sigmoid(preact[1]) * prev[0] + vector[0];
  }

  template <class V>
  static constexpr V forward(const V* preact, const V* vector, const V*, const V* prev, V* next) {
    const V z = sigmoid(preact[2] + vector[0]);
    next[0] = z * prev[0] + (1 - z) * tanh(preact[0] + sigmoid(preact[1]) * preact[3]);
    return tanh(next[0]);
  }
};
"""


@pytest.fixture
def new_folder(tmp_path, monkeypatch):
    """Nothing is kept from earlier compilations."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", described.CELLS)
def test_trace_in_torch(name):
    """The reference that is made of a compiled cell is the cell."""
    text = cell_library.read(CELLS)
    trace = cell_library.compile_and_load(text, name).trace
    step, counts = described.CELLS[name]
    assert (trace.preacts, trace.vectors, trace.masks, trace.states) == counts

    def without_kept(*inputs):
        h, states = step(*inputs)
        return h, states[: trace.cells]

    cell_check._check_step(trace, without_kept)


def test_a_source_is_compiled_once(new_folder, monkeypatch):
    struct = cell_library.struct_of(LIGHT_GRU, None)
    first = cell_library.compile_and_load(LIGHT_GRU, struct)
    assert set(first.functions) >= set(cell_library._isas())
    monkeypatch.setattr(subprocess, "Popen", None)
    again = cell_library.compile_and_load(LIGHT_GRU, struct)
    assert again.name == first.name and again.trace == first.trace
    with pytest.raises(TypeError):  # another source needs the compiler
        cell_library.compile_and_load(LIGHT_GRU.replace("relu", "tanh"), struct)


def test_a_library_is_in_the_folder_in_full_or_not_at_all(new_folder):
    with pytest.raises(RuntimeError):
        cell_library.compile_and_load(LIGHT_GRU.replace("relu", "none"), "LightGru")
    assert not list(new_folder.rglob("*.so"))


def test_headers_beside_the_cell(new_folder, tmp_path):
    header, helper = tmp_path / "light.h", tmp_path / "helper.h"
    helper.write_text(
        "#pragma once\ntemplate <class V>\nconstexpr V gate(V v) { return sigmoid(v); }\n"
    )
    text = LIGHT_GRU.replace("sigmoid(", "gate(")
    header.write_text(text.replace('"described.h"', '"described.h"\n#include "helper.h"'))
    found = cell_library.compile_and_load(cell_library.read(header), "LightGru")
    assert found.trace.gates == 2
    helper.write_text(helper.read_text().replace("return", "retrun"))
    with pytest.raises(RuntimeError, match=f"{helper}:3:"):
        cell_library.compile_and_load(cell_library.read(header), "LightGru")
    helper.write_text(helper.read_text().replace("retrun", "return"))
    header.write_text(header.read_text().replace("relu", "rely"))
    with pytest.raises(RuntimeError, match=f"{header}:14:"):
        cell_library.compile_and_load(cell_library.read(header), "LightGru")


@pytest.mark.parametrize(
    ("right", "wrong", "says"),
    [
        ("kGates = 2", "kGate = 2", "the cell has no `static constexpr int kGates`"),
        pytest.param(
            "kPreacts = 2",
            "kPreact = 2",
            "the cell has no `static constexpr int kPreacts`",
            marks=pytest.mark.full,
        ),
        pytest.param(
            "V forward",
            "V forwards",
            "the cell has no `template <class V> static constexpr V forw",
            marks=pytest.mark.full,
        ),
        pytest.param(
            "kGates = 2", "kGates = 5", "the cell's kGates must be 1 to 4", marks=pytest.mark.full
        ),
        pytest.param(
            "kPreacts = 2",
            "kPreacts = 1",
            "the cell's kPreacts must be kGates to 2 [*] kGates",
            marks=pytest.mark.full,
        ),
        pytest.param(
            "kGates = 2",
            "kGates = 2, kMasks = 17",
            "the cell's kVectors and kMasks must be 16 at",
            marks=pytest.mark.full,
        ),
        ("static constexpr V", "static V", "(?i)non-.?constexpr.* function"),
        ("relu(", "rely(", r"cell.h:13:.*\n.*rely\(preact\[1\]\)"),
        (
            "(1 - z)",
            "(z < 1 ? 1 - z : z)",
            "cell.h:13:.*'operator<'|cell.h:13:.*operator<|operands",
        ),
    ],
)
def test_what_does_not_compile(right, wrong, says, new_folder):
    with pytest.raises(RuntimeError, match=says) as raised:
        cell_library.compile_and_load(LIGHT_GRU.replace(right, wrong), "LightGru")
    message = str(raised.value)
    assert message.startswith("LightGru does not compile with ") and message.count("\n") <= 30
    assert "derive.h:" not in message and "library.h:" not in message


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "nonesuch-g++ -O1")
    with pytest.raises(RuntimeError, match="there is no nonesuch-g[+][+]: install g[+][+] 11"):
        lstm_fused.compile_cell(LIGHT_GRU)


def test_which_struct():
    both = LIGHT_GRU + MASKED.replace('#include "described.h"', "")
    assert cell_library.struct_of(both, "Masked") == "Masked"
    with pytest.raises(ValueError, match="several cells, LightGru, Masked: name one by struct="):
        lstm_fused.compile_cell(both)
    with pytest.raises(ValueError, match="has no Missing"):
        lstm_fused.compile_cell(both, struct="Missing")
    with pytest.raises(ValueError, match="no struct that derives from DescribedCell"):
        lstm_fused.compile_cell("struct LightGru {};\n")
    with pytest.raises(FileNotFoundError):
        lstm_fused.compile_cell("missing.h")


def light_gru(preact, vector, mask, prev):
    z = torch.sigmoid(preact[0])
    return z * prev[0] + (1 - z) * torch.relu(preact[1]), []


def test_check():
    layer = lstm_fused.compile_cell(LIGHT_GRU)
    assert layer.__name__ == "LightGru"
    lines = layer.check(light_gru)
    assert lines[0] == "the values and gradients of step" and lines[-1].startswith("gradcheck")
    with pytest.raises(AssertionError, match="step's h"):
        layer.check(lambda preact, *rest: (torch.sigmoid(preact[0]), []))


def normalized(preact, vector, mask, prev):
    def normal(*values):
        x = torch.cat(values, dim=1)
        x = x - x.mean(1, keepdim=True)
        deviation = (x.square().mean(1, keepdim=True) + vector[1].detach()[0]).sqrt()
        return (x / deviation).chunk(len(values), dim=1)

    candidate, gate = normal(*preact)
    c = prev[0] + torch.tanh(vector[0] * candidate) * torch.sigmoid(gate)
    return torch.tanh(normal(c)[0]), [c]


def reset_before(preact, vector, mask, prev):
    z = torch.sigmoid(preact[2] + vector[0])
    candidate = torch.tanh(preact[0] + torch.sigmoid(preact[1]) * preact[3])
    c = z * prev[0] + (1 - z) * candidate
    return torch.tanh(c), [c]


def reset_before_operand(preact, vector, mask, prev):
    return torch.sigmoid(preact[1]) * prev[0] + vector[0]


def test_an_operand():
    layer = lstm_fused.compile_cell(RESET_BEFORE)
    assert ops.CELLS[layer.cell]["operand"]
    lines = layer.check(reset_before, reset_before_operand)
    assert lines[:2] == [f"the values and gradients of {name}" for name in ("step", "operand")]
    with pytest.raises(AssertionError, match="operand's h"):
        layer.check(reset_before, lambda preact, vector, mask, prev: prev[0])
    with pytest.raises(ValueError, match="hidden_weight is False but must be True"):
        lstm_fused.compile_cell(RESET_BEFORE, hidden_weight=False)
    with pytest.raises(AssertionError, match="has no operand"):
        lstm_fused.compile_cell(LIGHT_GRU).check(light_gru, reset_before_operand)


# The same as the library's cell, by another way: two gates, of which the second multiplies r * h.
def test_the_operand_of_mgu():
    text = """
#include "described.h"
struct Minimal : DescribedCell {
  static constexpr int kGates = 2, kPreacts = 2;
  static constexpr bool kKeepsHidden = true;
  template <class V>
  static constexpr V operand(const V* preact, const V*, const V*, const V* prev) {
    return sigmoid(preact[0]) * prev[0];
  }
  template <class V>
  static constexpr V forward(const V* preact, const V*, const V*, const V* prev, V*) {
    const V f = sigmoid(preact[0]);
    return prev[0] + f * (tanh(preact[1]) - prev[0]);
  }
};
"""
    layer, ours = lstm_fused.compile_cell(text)(5, 19), lstm_fused.MGU(5, 19)
    ours.load_state_dict(layer.state_dict())
    x = torch.randn(7, 3, 5)
    torch.testing.assert_close(layer(x), ours(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("right", "wrong", "says"),
    [
        (
            "sigmoid(preact[1]) * prev[0] +",
            "preact[3] * prev[0] +",
            "must not use the last pre-act",
        ),
        ("const V*, const V* prev) {", "const V* prev) {", "the cell's operand is not `template"),
    ],
)
def test_operands_that_do_not_compile(right, wrong, says, new_folder):
    source = RESET_BEFORE.replace(right, wrong)
    with pytest.raises(RuntimeError, match=says):
        cell_library.compile_and_load(source, "ResetBefore")


def test_check_of_cells_with_everything():
    lstm_fused.compile_cell(MASKED).check()
    lstm_fused.compile_cell(NORMALIZED).check(normalized)
    lstm_fused.compile_cell(CELLS, struct="Peephole").check()
    lstm_fused.compile_cell(CELLS, struct="Passing", hidden_weight=False).check()
    lstm_fused.compile_cell(LIGHT_GRU.replace("kPreacts = 2", "kPreacts = 4")).check()


def test_check_finds_what_is_wrong(monkeypatch):
    layer = lstm_fused.compile_cell(LIGHT_GRU)
    right = lstm_fused.reference.CELLS[layer.cell]

    def wrong(*args, **options):
        y, *rest = right(*args, **options)
        return y * 1.001, *rest

    monkeypatch.setitem(lstm_fused.reference.CELLS, layer.cell, wrong)
    with pytest.raises(AssertionError, match="y is off by"):
        layer.check()


def test_a_layer_like_any():
    layer = lstm_fused.compile_cell(LIGHT_GRU)(4, 6, num_layers=2, bidirectional=True)
    x = torch.randn(5, 3, 4)
    y, h_n = layer(x, lengths=[5, 2, 4])
    assert y.shape == (5, 3, 12) and h_n.shape == (4, 3, 6)
    alone, h_alone = layer(x[:2, 1:2])
    torch.testing.assert_close(y[:2, 1:2], alone)
    torch.testing.assert_close(h_n[:, 1:2], h_alone)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, [5, 2, 4], enforce_sorted=False)
    torch.testing.assert_close(layer(packed)[1], h_n)
    y.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert lstm_fused.runtime.last_run()["kernel"]


def test_copies_and_pickles():
    layer = lstm_fused.compile_cell(LIGHT_GRU)(4, 6)
    x = torch.randn(5, 3, 4)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is type(layer)
        torch.testing.assert_close(other(x)[0], layer(x)[0])
    again = lstm_fused.compile_cell(LIGHT_GRU)(4, 6)
    assert type(again) is type(layer)
    again.load_state_dict(layer.state_dict())
    torch.testing.assert_close(again(x)[0], layer(x)[0])


def test_states_masks_and_initial_values():
    class Ours(lstm_fused.compile_cell(MASKED)):
        def init_weights(self, weights):
            weights["weight_v"].fill_(2)

        def masks(self, input):
            return input.new_ones(*input.shape[:-1], self.hidden_size)

    layer = Ours(4, 6)
    assert layer.weight_v_l0.eq(2).all()
    y, state = layer(torch.randn(5, 3, 4))
    assert [tuple(s.shape) for s in state] == [(1, 3, 6)] * 3
    torch.testing.assert_close(layer(torch.randn(2, 3, 4), state)[1][0].shape, (1, 3, 6))
    with pytest.raises(TypeError, match="h and 2 cell states, got 2 states"):
        layer(torch.randn(2, 3, 4), state[:2])
    with pytest.raises(NotImplementedError, match="override masks"):
        lstm_fused.compile_cell(MASKED)(4, 6)(torch.randn(5, 3, 4))


def test_transforms():
    layer = lstm_fused.compile_cell(LIGHT_GRU)(3, 4, dtype=torch.float64)
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(4, 2, 3, dtype=torch.float64)

    def run(x, *weights):
        given = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(layer, given, (x,))[0]

    inputs = [x.requires_grad_(), *layer.parameters()]
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)
    x = x.detach()
    y, tangent = torch.func.jvp(lambda x: layer(x)[0], (x,), (torch.ones_like(x),))
    assert tangent.shape == y.shape
    both = torch.func.vmap(lambda x: layer(x)[0])(torch.stack([x, 2 * x]))
    torch.testing.assert_close(both[1], layer(2 * x)[0])


def test_one_cell_in_the_lists():
    layer = lstm_fused.compile_cell(LIGHT_GRU)
    info = ops.CELLS[layer.cell]
    assert info["gates"] == 2 and info["keeps_hidden"] and info["described"]
