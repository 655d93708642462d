"""Who is measured: a provider turns a problem into a run with `step()` and `results()`."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

import lstm_fused
from bench import peers, problem
from bench.problem import ModuleRun, Problem, data_of
from bench.sets import CELL, CHUNK, GRAPH, ONNX, TORCH
from bench.workloads import CELLS, Workload
from lstm_fused import runtime

BASELINE, OURS = TORCH, "lstm_fused"
OURS_GRAPH = f"{OURS} graph"
AGAIN = f"{BASELINE} again"
WARM_UP = 3  # steps before a capture: what is loaded or allocated once, is by then


@dataclass(frozen=True)
class Provider:
    """build(problem) -> run; why_not(workload, device) -> why it cannot run it, or None."""

    build: Callable[[Problem], object]
    why_not: Callable[[Workload, str], str | None] = lambda work, device: None
    default: bool = True  # False: only when named by --providers


class FusedRun(ModuleRun):
    def kernels(self) -> list[dict]:
        """What forward, then backward if there is one, ran: for the record."""
        last_run = functools.partial(runtime.last_run, self.problem.device)
        with torch.set_grad_enabled(self.training):
            y, _ = self.module(self.x, self.state)
            ran = [last_run()]
            if self.training:
                data_of(y).sum().backward()
                ran.append(last_run())
        return ran


def copied(task: Problem) -> torch.nn.Module:
    """A copy of the problem's module. Copied parameters lie apart, which cuDNN would gather into
    one chunk anew in each call: the copy is laid out as torch lays out any module on a GPU."""
    module = copy.deepcopy(task.module)
    module.flatten_parameters()
    return module


def fused_module(task: Problem) -> torch.nn.Module:
    module = lstm_fused.replace(copied(task))
    assert isinstance(module, getattr(lstm_fused, CELLS[task.workload.cell]))
    return module


def torch_nn(task: Problem):
    return ModuleRun(copied(task), task)


def fused(task: Problem):
    return FusedRun(fused_module(task), task)


def compiled(task: Problem):
    return ModuleRun(torch.compile(copied(task)), task)


def without_cudnn(task: Problem):
    def around():
        return torch.backends.cudnn.flags(enabled=False)

    return ModuleRun(copied(task), task, around)


def one_chunk(task: Problem):
    """bfloat16 weights laid into one buffer beforehand: flatten_parameters does so for the other
    dtypes alone."""
    from torch.backends.cudnn import rnn

    module = copied(task)
    with torch.no_grad():
        torch._cudnn_rnn_flatten_weight(
            module._flat_weights,
            len(module._flat_weights) // (module.num_layers * task.workload.directions),
            module.input_size,
            rnn.get_cudnn_mode(module.mode),
            module.hidden_size,
            module.proj_size,
            module.num_layers,
            module.batch_first,
            module.bidirectional,
        )
    return ModuleRun(module, task)


class GraphRun(ModuleRun):
    """A run whose step was captured in a CUDA graph once, and is replayed since.

    Training is captured whole: gradients are None before each backward pass, in the graph as
    without it, so that the replay writes them where the capture put them and adds to nothing.
    """

    def __init__(self, module, task):
        super().__init__(module, task)
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
        self.step = self._replay

    def _replay(self):
        self.graph.replay()
        return self.out


class FusedGraphRun(GraphRun):
    def __init__(self, module, task):
        super().__init__(module, task)
        self.ran = runtime.last_run(task.device)

    def kernels(self) -> list[dict]:
        """What was captured last: packed data runs another plan in a graph than without one."""
        return [self.ran]


def torch_graph(task: Problem):
    return GraphRun(copied(task), task)


def fused_graph(task: Problem):
    return FusedGraphRun(fused_module(task), task)


def first(*reasons):
    """The first of several whys that applies."""

    def why_not(work, device):
        return next((why for reason in reasons if (why := reason(work, device))), None)

    return why_not


def no_fused_cell(work, device):
    return problem.why_absent(work, device)


def no_cuda(work, device):
    return None if device == "cuda" else "needs a CUDA device"


def not_chunked(work, device):
    return None if work.dtype == "bfloat16" else "torch does so itself in other dtypes"


def carries_state(work, device):
    return "a step's state is carried from call to call" if work.mode == "step" else None


def with_dropout(work, device):
    return "dropout masks cannot be compared" if work.dropout else None


PROVIDERS = {
    BASELINE: Provider(torch_nn),
    OURS: Provider(fused, no_fused_cell),
    ONNX: Provider(peers.OnnxRun, peers.why_not_onnx),
    CELL: Provider(peers.CellRun, peers.why_not_cell),
    AGAIN: Provider(torch_nn, default=False),
    "torch.compile": Provider(compiled, with_dropout, default=False),
    "cuDNN off": Provider(without_cudnn, no_cuda, default=False),
    CHUNK: Provider(one_chunk, first(no_cuda, not_chunked)),
    GRAPH: Provider(torch_graph, first(no_cuda, carries_state, with_dropout)),
    OURS_GRAPH: Provider(fused_graph, first(no_cuda, carries_state, no_fused_cell, with_dropout)),
    "haste": Provider(peers.HasteRun, peers.why_not_haste),
    "FlashRNN": Provider(peers.FlashRun, peers.why_not_flash),
}
