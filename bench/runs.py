"""A case, a workload's tensors, and its runs: what is timed, and what is compared before."""

import copy
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    unpack_sequence,
)
from torch.utils._pytree import tree_map

import lstm_fused
from bench import cells
from bench.cases import CELLS, DTYPES, Workload, lengths_of
from lstm_fused import runtime
from lstm_fused.testing.oracle import Oracle, in_float64

DROPOUT_SEED = 1
WARM_UP = 3  # steps before a capture: what is loaded or allocated once, is by then


@dataclass(frozen=True)
class Case:
    """A workload's tensors, the same for every provider.

    x is (T, N, I), (N, T, I) with batch_first, a PackedSequence, or (S, I) of documents. options:
    the row's, as our modules' calls take them. state is None, or in mode
    "step" h0 (L*D, N, R) and for an LSTM c0 (L*D, N, H), as a tuple.
    """

    workload: Workload
    module: torch.nn.RNNBase
    x: torch.Tensor | PackedSequence
    state: tuple[torch.Tensor, ...] | None
    device: str
    options: dict = field(default_factory=dict)

    def copied(self) -> torch.nn.Module:
        """A copy of the module. Copied parameters lie apart, which cuDNN would gather into one
        chunk anew in each call: the copy is laid out as torch lays out any module on a GPU."""
        module = copy.deepcopy(self.module)
        module.flatten_parameters()
        return module

    def fused(self) -> torch.nn.Module:
        return lstm_fused.cells.replace_slstm(lstm_fused.replace(self.copied()))


def _torch_layer(work: Workload, device: str) -> torch.nn.RNNBase:
    return getattr(torch.nn, CELLS[work.cell])(
        work.I,
        work.H,
        num_layers=work.layers,
        bidirectional=work.directions == 2,
        bias=work.bias,
        batch_first=work.batch_first,
        dropout=work.dropout,
        device=device,
        **({"proj_size": work.proj} if work.cell == "lstm" else {}),
    ).to(DTYPES[work.dtype])


def build_case(work: Workload, device: str = "cpu", seed: int = 0) -> Case:
    """Weights as torch draws them and normal inputs.

    Drawn on the device: the largest rows would take a CPU longer than all their samples.
    """
    torch.manual_seed(seed)
    module = cells.build(work, device) if work.cell not in CELLS else _torch_layer(work, device)

    def draw(*shape):
        return torch.randn(*shape, device=device).to(DTYPES[work.dtype])

    x = draw(*((work.N, work.T) if work.batch_first else (work.T, work.N)), work.I)
    state = None
    if work.mode == "step":
        widths = (work.R, work.H) if work.cell == "lstm" else (work.R,)
        state = tuple(draw(work.layers * work.directions, work.N, width) for width in widths)
    if work.lengths != "full":
        x = pack_padded_sequence(x, torch.tensor(lengths_of(work)), work.batch_first)
    options = {}
    if work.option == "resets":
        options["resets"] = torch.rand(x.shape[:2], device=device) < 0.05
    elif work.option == "cell states":
        options["return_cell_states"] = True
    elif work.option == "checkpoints":
        options["checkpoint_every"] = "auto"
    elif work.option == "documents":
        lengths = torch.tensor(lengths_of(work))
        x = torch.cat([x[:length, n] for n, length in enumerate(lengths)])
        options["cu_seqlens"] = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
    return Case(work, module, x, state, device, options)


def data_of(x):
    return x.data if isinstance(x, PackedSequence) else x


def named(y, states, leaves=None) -> dict[str, torch.Tensor]:
    """Outputs, final states and gradients by the names that the tolerances know."""
    states = states if isinstance(states, (tuple, list)) else (states,)
    found = {"y": data_of(y), **dict(zip(("h_n", "c_n"), states, strict=False))}
    found |= {f"d_{name}": leaf.grad for name, leaf in (leaves or {}).items()}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


class ModuleRun:
    """A module on a case: `step` is what the clock sees, `results` what the gate compares.

    tensors: the names of the results that are compared, None for all. options: of the call.
    """

    def __init__(
        self,
        module,
        case: Case,
        tensors: tuple[str, ...] | None = None,
        options: dict | None = None,
    ):
        self.module, self.case, self.tensors = module, case, tensors
        self.options = options or {}
        self.training = case.workload.training
        data = data_of(case.x).clone().requires_grad_(self.training)
        self.x = PackedSequence(data, *case.x[1:]) if data_of(case.x) is not case.x else data
        self.leaves = {"x": data} | {
            name if name.startswith(("weight", "bias")) else f"weight_{name}": leaf
            for name, leaf in module.named_parameters()
        }
        self.reset()
        modes = {"forward": self._forward, "step": self._carry}
        self.step = modes.get(case.workload.mode, self._training)

    def reset(self):
        state = self.case.state
        self.state = state[0] if state and len(state) == 1 else state

    def _forward(self):
        y, state, *cells = self.module(self.x, self.state, **self.options)
        return (torch.cat((y, *cells), -1) if cells else y), state

    def _carry(self):
        y, self.state = self.module(self.x, self.state)
        return y, self.state

    def _training(self):
        for leaf in self.leaves.values():
            leaf.grad = None
        y, state = self._forward()
        data_of(y).sum().backward()
        return y, state

    def results(self) -> dict[str, torch.Tensor]:
        """One step from the case's own state, with the dropout masks of one seed."""
        self.reset()
        torch.manual_seed(DROPOUT_SEED)
        with torch.set_grad_enabled(self.training):
            y, state = self.step()
        found = named(y, state, self.leaves if self.training else None)
        return {name: found[name] for name in self.tensors or found if name in found}

    def kernels(self) -> list[dict]:
        """What forward, then backward if there is one, ran, if they are ours: for the record."""
        if not type(self.module).__module__.startswith("lstm_fused"):
            return []
        with torch.set_grad_enabled(self.training):
            y, _ = self._forward()
            ran = [runtime.last_run(self.case.device)]
            if self.training:
                data_of(y).sum().backward()
                ran.append(runtime.last_run(self.case.device))
        return ran


def cell_of(library, case: Case):
    """`library`'s single-step cell with the module's weights."""
    work = case.workload
    cell = getattr(library, f"{CELLS[work.cell]}Cell")(work.I, work.H, work.bias)
    cell = cell.to(case.module.weight_hh_l0)
    weights = case.module.named_parameters()
    cell.load_state_dict({name.removesuffix("_l0"): w for name, w in weights})
    return cell


class WithTorch(torch.nn.Module):
    """torch.nn's module with the options of ours, as Python code around it."""

    def __init__(self, module: torch.nn.RNNBase):
        super().__init__()
        self.module = module

    def named_parameters(self, *args, **kwargs):
        return self.module.named_parameters(*args, **kwargs)

    def forward(self, x, state, resets=None, return_cell_states=False, cu_seqlens=None, **_):
        if cu_seqlens is not None:
            documents = x.split(cu_seqlens.diff().tolist())
            y, state = self.module(pack_sequence(documents))
            return torch.cat(unpack_sequence(y)), state
        if resets is not None and self.module.bidirectional:
            return self._by_segments(x, resets)
        if resets is None and not return_cell_states:
            return self.module(x, state)
        keep = None if resets is None else (~resets).to(x.dtype).unsqueeze(-1)
        outputs, cells = [], []
        for t in range(x.shape[0]):
            if keep is not None and state is not None:
                state = tree_map(lambda s, k=keep[t]: s * k, state)
            y, state = self.module(x[t : t + 1], state)
            outputs.append(y)
            cells.append(state[-1])
        y = torch.cat(outputs)
        return (y, state, torch.cat(cells)) if return_cell_states else (y, state)

    def _by_segments(self, x, resets):
        """Each row's segments as sequences of one packed batch; the final states are theirs."""
        first = resets.clone()
        first[0] = True
        starts = [first[:, n].nonzero().squeeze(1).tolist() + [len(x)] for n in range(x.shape[1])]
        pieces = [(n, a, b) for n, s in enumerate(starts) for a, b in pairwise(s)]
        packed = pack_sequence([x[a:b, n] for n, a, b in pieces], enforce_sorted=False)
        y, state = self.module(packed)
        parts = iter(unpack_sequence(y))
        rows = [torch.cat([next(parts) for _ in s[1:]]) for s in starts]
        counts = torch.tensor([len(s) - 1 for s in starts])
        last, begin = counts.cumsum(0) - 1, counts.cumsum(0) - counts
        # The first direction ends with a row's last segment, the second with its first one.
        ends = tree_map(lambda s: torch.stack((s[0][last], s[1][begin])), state)
        return torch.stack(rows, 1), ends


class LoopRun(ModuleRun):
    """A loop over the steps that calls `library`'s single-step cell with the module's weights."""

    def __init__(self, library, case: Case):
        super().__init__(cell_of(library, case), case)
        weights = {f"{name}_l0": w for name, w in self.module.named_parameters()}
        self.leaves = {"x": self.x, **weights}

    def _training(self):
        for leaf in self.leaves.values():
            leaf.grad = None
        state, outputs = None, []
        for x in self.x:
            state = self.module(x, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        y = torch.stack(outputs)
        y.sum().backward()
        ends = state if isinstance(state, tuple) else (state,)
        return y, tuple(s[None] for s in ends)

    def kernels(self) -> list[dict]:
        if not type(self.module).__module__.startswith("lstm_fused"):
            return []
        self.step()
        return [runtime.last_run(self.case.device)]


def exact_results(case: Case) -> dict[str, torch.Tensor]:
    """The case's results in float64, through the naive reference."""
    exact = replace(case, x=in_float64(case.x), state=in_float64(case.state))
    if case.workload.cell not in CELLS:
        return ModuleRun(cells.looped(in_float64(case.module)), exact).results()
    options = {k: v for k, v in case.options.items() if k != "checkpoint_every"}
    return ModuleRun(Oracle(case.module), exact, options=options).results()


class GraphRun(ModuleRun):
    """A run whose step was captured in a CUDA graph once, and is replayed since.

    Training is captured whole: gradients are None before each backward pass, in the graph as
    without it, so that the replay writes them where the capture put them and adds to nothing.
    """

    def __init__(self, module, case):
        super().__init__(module, case)
        eager = self.step
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torch.set_grad_enabled(self.training):
            for _ in range(WARM_UP):
                eager()
        torch.cuda.current_stream().wait_stream(side)
        for leaf in self.leaves.values():
            leaf.grad = None  # the warm-up's lie outside the graph's own memory
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph), torch.set_grad_enabled(self.training):
            self.out = eager()
        self.ran = runtime.last_run(case.device)
        self.step = self._replay

    def _replay(self):
        self.graph.replay()
        return self.out

    def kernels(self) -> list[dict]:
        """What was captured last: packed data runs another plan in a graph than without one."""
        return [self.ran] if type(self.module).__module__.startswith("lstm_fused") else []
