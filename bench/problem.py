"""The tensors of a workload, and what the right answer to it is."""

import copy
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from bench.workloads import DTYPES, Workload
from lstm_fused import reference


@dataclass(frozen=True)
class Problem:
    """x is (T, N, I) or its PackedSequence; state is None or (h0 (L*D, N, R), c0 (L*D, N, H))."""

    workload: Workload
    module: torch.nn.LSTM
    x: torch.Tensor | PackedSequence
    state: tuple[torch.Tensor, torch.Tensor] | None


def build(work: Workload, seed: int = 0) -> Problem:
    """Weights as nn.LSTM draws them and normal inputs, the same for every provider."""
    torch.manual_seed(seed)
    dtype = DTYPES[work.dtype]
    module = torch.nn.LSTM(
        work.I,
        work.H,
        num_layers=work.layers,
        bidirectional=work.bidirectional,
        proj_size=work.proj,
    ).to(dtype)
    x = torch.randn(work.T, work.N, work.I).to(dtype)
    state = None
    if work.state:
        rows = work.layers * (2 if work.bidirectional else 1)
        h0 = torch.randn(rows, work.N, work.proj or work.H).to(dtype)
        c0 = torch.randn(rows, work.N, work.H).to(dtype)
        state = (h0, c0)
    if work.lengths == "half":
        lengths = torch.linspace(work.T, work.T // 2, work.N).round().long()
        x = pack_padded_sequence(x, lengths)
    return Problem(work, module, x, state)


def with_data(x, data):
    """x with its values replaced, packed if x is."""
    return PackedSequence(data, *x[1:]) if isinstance(x, PackedSequence) else data


def data_of(x):
    return x.data if isinstance(x, PackedSequence) else x


class ModuleRun:
    """A module on a problem: `step` is what the clock sees, `results` what the gate compares."""

    def __init__(self, module, problem: Problem):
        self.module = module
        self.training = problem.workload.training
        self.data = data_of(problem.x).clone().requires_grad_(self.training)
        self.x = with_data(problem.x, self.data)
        self.state = problem.state
        self.step = self._training_step if self.training else self._forward
        self.leaves = {"x": self.data, **dict(module.named_parameters())}

    def _forward(self):
        return self.module(self.x, self.state)

    def _training_step(self):
        for leaf in self.leaves.values():
            leaf.grad = None
        y, state = self.module(self.x, self.state)
        data_of(y).sum().backward()
        return y, state

    def results(self) -> dict[str, torch.Tensor]:
        with torch.set_grad_enabled(self.training):
            y, (h_n, c_n) = self.step()
        found = {"y": data_of(y), "h_n": h_n, "c_n": c_n}
        if self.training:
            found |= {f"d_{name}": leaf.grad for name, leaf in self.leaves.items()}
        return {name: tensor.detach() for name, tensor in found.items()}


class ReferenceLSTM(torch.nn.Module):
    """The layers of an nn.LSTM through the naive reference, time first."""

    def __init__(self, module: torch.nn.LSTM):
        super().__init__()
        self.lstm = module

    def named_parameters(self, *args, **kwargs):
        return self.lstm.named_parameters(*args, **kwargs)

    def forward(self, x, state):
        directions = 2 if self.lstm.bidirectional else 1
        batch_sizes = x.batch_sizes if isinstance(x, PackedSequence) else None
        y, finals = data_of(x), []
        for layer in range(self.lstm.num_layers):
            rows = slice(layer * directions, (layer + 1) * directions)
            weights = [w for row in self.lstm.all_weights[rows] for w in row]
            state0 = tuple(s[rows] for s in state) if state else ()
            y, final = reference.CELLS["lstm"](y, batch_sizes, state0, weights, directions)
            finals.append(final)
        h_n, c_n = (torch.cat(parts) for parts in zip(*finals, strict=True))
        return with_data(x, y), (h_n, c_n)


def oracle(problem: Problem) -> dict[str, torch.Tensor]:
    """What the problem's results are in float64, through the naive reference."""
    exact = Problem(
        problem.workload,
        copy.deepcopy(problem.module).double(),
        with_data(problem.x, data_of(problem.x).double()),
        problem.state and tuple(s.double() for s in problem.state),
    )
    return ModuleRun(ReferenceLSTM(exact.module), exact).results()
