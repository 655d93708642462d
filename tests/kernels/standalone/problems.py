"""Problems for driver.cpp and what it makes of them, judged as those of the library are."""

import struct
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lstm_fused import ops
from tests.helpers.oracle import CELLS, Problem, has_cell_state, values_of, violations
from tests.helpers.plan_coverage import DTYPES


@dataclass(frozen=True)
class Case:
    problem: Problem
    groups: tuple = ()  # directions, rows, units: of the threads; (): as planned

    def __str__(self):
        return "-".join([str(self.problem), *("x".join(map(str, g)) for g in [self.groups] if g)])


def cases(threads):
    """Every cell and dtype; the tiles, ends of vectors and forms of input; few steps and many."""
    found = []
    for dtype in DTYPES:
        for cell in CELLS:
            proj = 5 if has_cell_state(cell) else 0
            problems = [
                Problem(9, 7, 17, 37, dtype, directions=2, hx=True, cell=cell, proj=proj),
                Problem(7, 13, 5, 18, dtype, directions=2, hx=True, cell=cell, form="sorted"),
                Problem(3, 2, 33, 40, dtype, hx=True, cell=cell),
                Problem(300, 2, 3, 16, dtype, bias=False, cell=cell),
            ]
            found += map(Case, problems)
            if threads > 1:
                found += [
                    Case(problems[0], (1, 2, 2)),
                    Case(problems[1], (2, 1, 2)),
                    Case(problems[2], (1, 1, 3)),
                ]
    return found


def raw(tensor):
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def write(cases, file):
    """All draws of each case, as driver.cpp reads them."""
    for case in cases:
        for draw in range(case.problem.draws):
            write_problem(case, draw, file)


def write_problem(case, draw, file):
    p, values = case.problem, values_of(case.problem, draw)
    directions, rows, units = case.groups or (0, 0, 0)
    header = [
        *(ops.CELLS[p.cell]["id"], DTYPES.index(p.dtype), p.T, p.N, p.I, p.H, p.proj, p.directions),
        *(p.bias, p.hx, p.packed, directions * rows * units, rows, units),
    ]
    file.write(struct.pack(f"={len(header)}q", *map(int, header)))
    x = values.x
    if p.packed:
        x, sizes, _, _ = pack_padded_sequence(x, values.lengths)
        file.write(raw(sizes))
    for tensor in (x, *values.state, *values.weights.values(), *values.cotangents):
        file.write(raw(tensor))


def read(cases, file):
    """The driver's results: for each case the tensors of each draw by name, and the ISAs."""
    problems = [case.problem for case in cases]
    return [[read_problem(p, draw, file) for draw in range(p.draws)] for p in problems]


def read_problem(problem, draw, file):
    p, values = problem, values_of(problem, draw)

    def tensor(like):
        data = bytearray(file.read(like.numel() * like.element_size()))
        return torch.frombuffer(data, dtype=p.dtype).view(like.shape)

    isas = tuple(name.rstrip(b"\0").decode() for name in struct.unpack("16s16s", file.read(32)))
    y, *ends = (tensor(like) for like in values.cotangents)
    tensors = {"y": y, **dict(zip(("h_n", "c_n"), ends, strict=False))}
    if p.packed:
        packed = pack_padded_sequence(values.x, values.lengths)
        d_x = PackedSequence(tensor(packed.data), packed.batch_sizes)
        tensors["d_x"] = pad_packed_sequence(d_x)[0]
    else:
        tensors["d_x"] = tensor(values.x)
    for name, weight in values.weights.items():
        tensors[f"d_{name}"] = tensor(weight)
    for name, state in zip(("d_h0", "d_c0"), values.state, strict=False):
        tensors[name] = tensor(state)
    return tensors, isas


def complaints(cases, results):
    """A line for each tensor that is off."""
    lines = []
    for case, draws in zip(cases, results, strict=True):
        found = violations([tensors for tensors, _ in draws], case.problem)
        lines += [f"{case}: {line}" for line in found]
    return lines
