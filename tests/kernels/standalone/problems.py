"""Problems for driver.cpp and what it makes of them, judged as those of the library are."""

import struct
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lstm_fused import ops
from tests.helpers import quantized
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
        *(p.bias, p.hx, p.packed, directions * rows * units, rows, units, 0),
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


@dataclass(frozen=True)
class QuantizedCase:
    """A module with int8 or bfloat16 weights, whose results here are what is expected."""

    cell: str
    dtype: torch.dtype
    sizes: tuple[int, ...]  # T, N, I, H
    options: tuple = ()  # of the module

    def module(self):
        torch.manual_seed(0)
        *_, I, H = self.sizes  # noqa: E741
        return quantized.module(self.cell, I, H, self.dtype, **dict(self.options))

    def values(self):
        """x (T, N, I), and the states (D, N, width) of a module."""
        T, N, I, H = self.sizes  # noqa: E741
        torch.manual_seed(1)
        D = 1 + dict(self.options).get("bidirectional", False)
        widths = (dict(self.options).get("proj_size") or H, H)[: 1 + has_cell_state(self.cell)]
        return torch.randn(T, N, I), [torch.randn(D, N, width) for width in widths]

    def expected(self):
        """y and the final states."""
        x, state = self.values()
        y, ends = self.module()(x, tuple(state) if len(state) > 1 else state[0])
        return [y, *(ends if len(state) > 1 else (ends,))]


def quantized_cases():
    both = {"bidirectional": True}
    found = []
    for dtype in quantized.FORMATS:
        for cell in CELLS:
            found += [
                QuantizedCase(cell, dtype, (5, 7, 37, 50), tuple(both.items())),
                QuantizedCase(cell, dtype, (1, 1, 3, 16)),
            ]
        found.append(QuantizedCase("lstm", dtype, (4, 3, 33, 40), (("proj_size", 17),)))
    return found


def write_quantized(cases, file):
    for case in cases:
        module, (x, state) = case.module(), case.values()
        options = dict(case.options)
        header = [
            *(ops.CELLS[case.cell]["id"], DTYPES.index(torch.float32), *case.sizes),
            *(options.get("proj_size", 0), 1 + options.get("bidirectional", False)),
            *(True, True, False, 0, 0, 0, 1 + quantized.FORMATS.index(case.dtype)),
        ]
        file.write(struct.pack(f"={len(header)}q", *map(int, header)))
        for tensor in (x, *state, *module._weights()):
            file.write(raw(tensor))


def check_quantized(run, problems, results):
    """run(problems, results), of files, runs driver.cpp: its results are those of this machine."""
    cases = quantized_cases()
    with open(problems, "wb") as file:
        write_quantized(cases, file)
    done = run(problems, results)
    assert done.returncode == 0, done.stderr
    with open(results, "rb") as file:
        for case in cases:
            file.read(32)  # the ISAs
            for like in case.expected():
                data = bytearray(file.read(like.numel() * like.element_size()))
                found = torch.frombuffer(data, dtype=like.dtype).view(like.shape)
                # Without fused multiply-adds an activation is now and then another integer.
                error = (found - like).abs()
                assert error.max() <= 1e-2 and error.mean() <= 1e-5, case
        assert not file.read()
