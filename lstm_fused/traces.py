"""The trace of a described cell, csrc/cells/trace.h, run with torch: its step as a reference."""

import ctypes
import operator
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lstm_fused import reference, reference_steps


class TraceStep(NamedTuple):
    operation: int
    group: int
    operands: tuple[int, ...]
    constant: float


class Trace(NamedTuple):
    """A cell's numbers, as in csrc/cells/described.h, and its steps: first the inputs (preacts,
    vectors, masks, states before), then what forward computes. h, next: numbers of steps.
    operand: the same of the function of that name, whose result is h, if the cell has one."""

    gates: int
    preacts: int
    cells: int
    keeps_hidden: bool
    vectors: int
    masks: int
    groups: int
    steps: tuple[TraceStep, ...]
    h: int
    next: tuple[int, ...]
    operand: "Trace | None" = None

    @property
    def states(self) -> int:
        return self.cells + self.keeps_hidden

    @property
    def inputs(self) -> int:
        return self.preacts + self.vectors + self.masks + self.states


def read(library: ctypes.CDLL) -> Trace:
    """The trace of a compiled cell; csrc/cells/library.h."""
    facts = (ctypes.c_int64 * 9)()
    library.lstm_fused_cell_facts(facts)
    gates, preacts, cells, keeps_hidden, vectors, masks, groups, has_operand, operands = facts

    def function(number):
        steps, h, following = _function(library, number, 3 + operands, cells + keeps_hidden)
        return Trace(
            gates=gates,
            preacts=preacts,
            cells=cells,
            keeps_hidden=bool(keeps_hidden),
            vectors=vectors,
            masks=masks,
            groups=groups,
            steps=steps,
            h=h,
            next=following,
        )

    return function(0)._replace(operand=function(1) if has_operand else None)


def _function(library, number, width, states):
    """The steps of forward (0) or operand (1), and the numbers of its results."""
    numbers = (ctypes.c_int64 * 2)()
    library.lstm_fused_cell_trace(number, numbers, None, None, None)
    count, h = numbers
    steps, constants = (ctypes.c_int64 * (count * width))(), (ctypes.c_double * count)()
    following = (ctypes.c_int64 * max(states, 1))()
    library.lstm_fused_cell_trace(number, numbers, steps, constants, following)
    found = []
    for k in range(count):
        operation, group, used, *places = steps[k * width : (k + 1) * width]
        found.append(TraceStep(operation, group, tuple(places[:used]), constants[k]))
    return tuple(found), h, tuple(following[:states])


def _clip(x, bound):
    bound = bound.detach()
    return torch.clamp(x, -bound, bound)


# By the number of Operation in csrc/cells/trace.h; 0 is an input.
_CONSTANT, _NORMALIZE = 1, 18
_FUNCTIONS: tuple[Callable[..., Any], ...] = (
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg),
    *(torch.sigmoid, torch.tanh, torch.exp, torch.log, torch.nn.functional.logsigmoid),
    *(torch.relu, torch.abs, torch.maximum, torch.minimum, _clip),
    lambda a, b, x, y: torch.where(a < b, x, y),
)


def is_clip(step: TraceStep) -> bool:
    return step.operation >= 2 and _FUNCTIONS[step.operation - 2] is _clip


def _statistics(trace, group, values):
    """The mean (n, 1) of a group that is normalized, and 1 / the standard deviation."""
    own = [step.operands[0] for step in trace.steps if _is_of(group, step)]
    joined = torch.cat([values[k].expand_as(values[0]) for k in own], dim=-1)
    epsilon = values[trace.preacts + trace.vectors - 1].detach()[..., :1]
    variance, mean = torch.var_mean(joined, dim=-1, correction=0, keepdim=True)
    return mean, torch.rsqrt(variance + epsilon)


def _is_of(group, step):
    return step.operation == _NORMALIZE and step.group == group


def run(trace: Trace, inputs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """(h, the states after) from the inputs of the trace, each (n, H), vectors (H,)."""
    values = list(inputs)
    for step in trace.steps[len(inputs) :]:
        if step.operation == _CONSTANT:
            values.append(torch.full_like(inputs[0], step.constant))
        elif step.operation == _NORMALIZE:
            mean, factor = _statistics(trace, step.group, values)
            values.append((values[step.operands[0]] - mean) * factor)
        else:
            function = _FUNCTIONS[step.operation - 2]
            values.append(function(*(values[k] for k in step.operands)))
    return values[trace.h], [values[k] for k in trace.next]


def reference_cell(trace: Trace) -> reference_steps.Cell:
    """The cell as reference.py runs it."""
    gates, parted = trace.gates, trace.preacts - trace.gates
    has_operand = trace.operand is not None

    def step(x, state, w_ih, w_hh, b_ih, b_hh, w_hr, vectors, masks):
        h, *cells = state
        of_x = reference_steps._of_input(x, w_ih, b_ih).chunk(gates, dim=1)
        of_h = reference_steps._of_hidden(h, w_hh, b_hh, gates, gates - has_operand)
        preacts = [*of_x[gates - parted :]] if parted else []
        preacts += [of_h[j] + of_x[j] if j < gates - parted else of_h[j] for j in range(gates)]
        before = [*cells[0].chunk(trace.cells, dim=1)] if trace.cells else []
        before += [h] if trace.keeps_hidden else []
        inputs = [*preacts, *(() if vectors is None else vectors)]
        inputs += [] if masks is None else masks.unbind(1)
        inputs += before
        if has_operand:
            operand, _ = run(trace.operand, inputs)
            product = reference_steps._last_gate(operand, w_hh, b_hh, gates)
            inputs[trace.preacts - 1] = inputs[trace.preacts - 1] + product
        h, after = run(trace, inputs)
        h = reference_steps._projected(h, w_hr)
        return (h, torch.cat(after[: trace.cells], dim=1)) if trace.cells else (h,)

    return reference_steps.Cell(step, gates, trace.cells, trace.vectors, trace.masks)


def reference_layer(trace: Trace) -> partial[Any]:
    """A layer of the cell, as reference.CELLS has them."""
    return partial(reference._layer, reference_cell(trace))
