"""The tensors of a workload, and what the right answer to it is."""

import contextlib
import copy
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lstm_fused
from bench.workloads import CELLS, DTYPES, Workload, lengths_of
from lstm_fused import reference

DROPOUT_SEED = 1


@dataclass(frozen=True)
class Problem:
    """x is (T, N, I), (N, T, I) with batch_first, or a PackedSequence.

    state is None, or in mode "step" h0 (L*D, N, R) and for an LSTM c0 (L*D, N, H), as a tuple.
    """

    workload: Workload
    module: torch.nn.RNNBase
    x: torch.Tensor | PackedSequence
    state: tuple[torch.Tensor, ...] | None
    device: str


def why_absent(work: Workload, device: str = "cpu") -> str | None:
    """Why a workload is not measured at all, None where it is."""
    name = CELLS[work.cell]
    if work.dropout and device == "cuda":
        return "cuDNN's dropout masks are its own, so that nothing can be compared"
    if hasattr(lstm_fused, name) and work.cell in reference.CELLS:
        return None
    return f"lstm_fused has no {name} yet"


def build(work: Workload, device: str = "cpu", seed: int = 0) -> Problem:
    """Weights as torch draws them and normal inputs, the same for every provider.

    Drawn on the device: the largest rows would take a CPU longer than all their samples.
    """
    torch.manual_seed(seed)
    dtype = DTYPES[work.dtype]
    proj = {"proj_size": work.proj} if work.cell == "lstm" else {}
    module = getattr(torch.nn, CELLS[work.cell])(
        work.I,
        work.H,
        num_layers=work.layers,
        bidirectional=work.directions == 2,
        bias=work.bias,
        batch_first=work.batch_first,
        dropout=work.dropout,
        device=device,
        **proj,
    ).to(dtype)
    shape = (work.N, work.T) if work.batch_first else (work.T, work.N)

    def drawn(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    x = drawn(*shape, work.I)
    state = None
    if work.mode == "step":
        widths = (work.R, work.H) if work.cell == "lstm" else (work.R,)
        rows = work.layers * work.directions
        state = tuple(drawn(rows, work.N, width) for width in widths)
    if work.lengths != "full":
        x = pack_padded_sequence(x, torch.tensor(lengths_of(work)), work.batch_first)
    return Problem(work, module, x, state, device)


def with_data(x, data):
    """x with its values replaced, packed if x is."""
    return PackedSequence(data, *x[1:]) if isinstance(x, PackedSequence) else data


def data_of(x):
    return x.data if isinstance(x, PackedSequence) else x


def as_tuple(state):
    """A module's states as a tuple: those of a GRU or RNN come as one tensor."""
    return tuple(state) if isinstance(state, (tuple, list)) else (state,)


def named(y, states, leaves=None) -> dict[str, torch.Tensor]:
    """Outputs, final states and gradients by the names that the tolerances know."""
    found = {"y": data_of(y), **dict(zip(("h_n", "c_n"), states, strict=False))}
    for name, leaf in (leaves or {}).items():
        found[f"d_{name}"] = leaf.grad
    return {name: tensor.detach() for name, tensor in found.items()}


class ModuleRun:
    """A module on a problem: `step` is what the clock sees, `results` what the gate compares."""

    def __init__(self, module, problem: Problem, around=contextlib.nullcontext):
        self.module = module
        self.problem = problem
        self.around = around  # a context that every step runs in
        self.training = problem.workload.training
        self.data = data_of(problem.x).clone().requires_grad_(self.training)
        self.x = with_data(problem.x, self.data)
        self.bare = problem.workload.cell != "lstm"
        self.reset()
        steps = {"forward": self._forward, "training": self._training, "step": self._carry}
        self._step = steps[problem.workload.mode]
        self.leaves = {"x": self.data, **dict(module.named_parameters())}
        if around is contextlib.nullcontext:
            self.step = self._step

    def reset(self):
        state = self.problem.state
        self.state = state[0] if state and self.bare else state

    def step(self):
        with self.around():
            return self._step()

    def _forward(self):
        return self.module(self.x, self.state)

    def _carry(self):
        y, self.state = self.module(self.x, self.state)
        return y, self.state

    def _training(self):
        for leaf in self.leaves.values():
            leaf.grad = None
        y, state = self.module(self.x, self.state)
        data_of(y).sum().backward()
        return y, state

    def results(self) -> dict[str, torch.Tensor]:
        """One step from the problem's own state, with the dropout masks of one seed."""
        self.reset()
        torch.manual_seed(DROPOUT_SEED)
        with torch.set_grad_enabled(self.training):
            y, state = self.step()
        found = named(y, as_tuple(state), self.leaves if self.training else None)
        return {name: tensor.clone() for name, tensor in found.items()}


class ReferenceModule(torch.nn.Module):
    """The layers of a torch.nn module through the naive reference."""

    def __init__(self, module: torch.nn.RNNBase, cell: str):
        super().__init__()
        self.inner = module
        self.layer = reference.CELLS[cell]

    def named_parameters(self, *args, **kwargs):
        return self.inner.named_parameters(*args, **kwargs)

    def forward(self, x, state):
        inner = self.inner
        directions = 2 if inner.bidirectional else 1
        packed = isinstance(x, PackedSequence)
        turned = inner.batch_first and not packed
        batch_sizes = x.batch_sizes if packed else None
        y, finals = data_of(x), []
        y = y.transpose(0, 1) if turned else y
        for k in range(inner.num_layers):
            if k and inner.dropout:
                y = torch.dropout(y, inner.dropout, True)
            rows = slice(k * directions, (k + 1) * directions)
            weights = [w for row in inner.all_weights[rows] for w in row]
            state0 = () if state is None else tuple(s[rows] for s in as_tuple(state))
            y, final = self.layer(y, batch_sizes, state0, weights, directions)
            finals.append(as_tuple(final))
        states = tuple(torch.cat(parts) for parts in zip(*finals, strict=True))
        return with_data(x, y.transpose(0, 1) if turned else y), states


def oracle(problem: Problem) -> dict[str, torch.Tensor]:
    """What the problem's results are in float64, through the naive reference."""
    exact = Problem(
        problem.workload,
        copy.deepcopy(problem.module).double(),
        with_data(problem.x, data_of(problem.x).double()),
        problem.state and tuple(s.double() for s in problem.state),
        problem.device,
    )
    return ModuleRun(ReferenceModule(exact.module, problem.workload.cell), exact).results()
