"""What quantized layers are held to: the reference in float64 with the values of the weights.

Sizes are T, N, I, H; R is proj_size or else H, D directions, S rows of all steps.
"""

import re
from functools import partial

import torch

import lstm_fused
from lstm_fused import ops, panels, quantized_ops, reference, reference_steps
from lstm_fused.testing import tolerance
from tests.helpers.compare_modules import states_of
from tests.helpers.oracle import CELLS

FORMATS = (torch.int8, torch.bfloat16)
MOST = 495  # the largest integer that the int8 kernel rounds activations to


def module(cell, I, H, dtype, step=False, **options):  # noqa: E741
    """A module of a cell by the operator's name with weights of this dtype."""
    kind, more = CELLS[cell]
    made = getattr(lstm_fused, kind + "Cell" * step)(I, H, **more, **options)
    return lstm_fused.quantize_(made, dtype)


def rounded(a):
    """Activations (n, K) as the int8 kernel rounds them, each row by a scale of its own.

    The kernel computes the numbers in float32, so that a is rounded the same way in float64.
    """
    single = a.to(torch.float32)
    largest = single.abs().amax(-1, keepdim=True)
    factor = torch.full_like(largest, MOST) / largest  # a number / tensor rounds twice
    integers = (single * factor).nan_to_num(0, 0, 0).round()
    return integers.to(a.dtype) * (largest / MOST).to(a.dtype)


def steps_of(monkeypatch, q, x, state, dtype):
    """The states after one step of a layer by the reference in dtype: x (S, I), each (S, width).

    q: a module of one layer in one direction, or a cell.
    """
    linear = reference_steps._linear
    if q.weights_dtype is torch.int8:
        monkeypatch.setattr(reference_steps, "_linear", lambda a, w, b: linear(rounded(a), w, b))
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    weights = [getattr(q, n + s, None) for n in names for s in ("", "_l0")]
    weights = [w.to(dtype) for w in weights if w is not None]
    state = [s.to(dtype).unsqueeze(0) for s in state]
    y, ends = reference.CELLS[q._cell()](x.to(dtype).unsqueeze(0), None, state, weights)
    monkeypatch.setattr(reference_steps, "_linear", linear)
    return [s.squeeze(0) for s in ends]


def violations(monkeypatch, q, x, before, after):
    """A line for each state of those after a step, found by the kernel, that is further from the
    reference in float64 than twice the reference's own error in float32, and a floor.

    A step at a time: from a state that is rounded otherwise the reference would round an activation
    to another integer now and then.
    """
    exact, single = (
        steps_of(monkeypatch, q, x, before, dtype) for dtype in (torch.float64, torch.float32)
    )
    lines = []
    for name, found, e, s in zip(("h_n", "c_n"), after, exact, single, strict=False):
        error, largest = tolerance.error_of(found, e), e.abs().max().item()
        limit = tolerance.allowed(name, torch.float32, tolerance.error_of(s, e), largest)
        if not error <= limit:
            lines.append(f"{name}: off by {error:.2e} > {limit:.2e}")
    return lines


def one_layer(q, k, d, x):
    """For loops.by_steps: a function of layer k in direction d of a quantized module, one call of
    the operator."""
    place = re.compile(rf"_l{k}{'_reverse' if d else ''}(_panels|_panel_scales)?$")
    weights = [q._buffers[name] for name in q._buffer_names if place.search(name)]
    run = partial(quantized_ops.layer, sizes=(q.hidden_size, q.proj_size))

    def step(x, hx):
        y, ends = run(x, None, states_of(hx), weights, q._cell(), 1)
        return y, ends if len(ends) > 1 else ends[0]

    return step


def has_gates_in_another_order(cell):
    """Whether the kernels read a weight's gates in another order than torch's."""
    info = ops.CELLS[cell]
    return any(g != tuple(sorted(g)) for g in (info["input_gates"], info["hidden_gates"]))


def groups_of(q):
    """(weight (G*U, K) by torch's name, its scales (G*U, groups)) of an int8 module."""
    state = q.state_dict()
    for name, w in state.items():
        if name + "_scale" in state:
            yield panels.dequantized(w, None), state[name + "_scale"]
