"""What is compared: a provider builds a run of a case, or says why a workload is unsupported.

Libraries beside torch are imported only when a row asks for them.
"""

import functools
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

import lstm_fused
from bench import cells, environment
from bench.cases import (
    C_STREAM,
    CELL,
    CELLS,
    CHUNK,
    COMPILED,
    DTYPES,
    GRAPH,
    INT8_STREAM,
    LAYERS,
    ONNX,
    ONNX_INT8,
    OPENVINO,
    OURS,
    OURS_BFLOAT16,
    OURS_GRAPH,
    OURS_INT8,
    PLAIN,
    STREAM,
    TORCH,
    TORCH_FLOAT16,
    TORCH_INT8,
    WITHOUT,
    XLSTM,
    Workload,
)
from bench.onnx_runs import OnnxInt8Run, OnnxRuntimeRun, OpenVinoRun
from bench.runs import Case, GraphRun, LoopRun, ModuleRun, WithTorch, build_case, cell_of, named
from bench.streams import CStreamRun, StreamRun
from lstm_fused import cuda, reference

cuda.set_plan("fused")  # rows of ours are of our kernels, whatever is predicted of cuDNN

AGAIN = f"{TORCH} again"
OTHER_WEIGHTS = ("y", "h_n", "c_n", "d_x")  # what is compared where weights have other shapes


class Unsupported(Exception):
    """Why a provider cannot run a case, where only running it tells."""


def torch_nn(case: Case):
    if case.workload.mode == "loop":
        return LoopRun(torch.nn, case)
    if case.options:
        return ModuleRun(WithTorch(case.copied()), case, options=case.options)
    if case.workload.cell in LAYERS:
        return ModuleRun(cells.looped(case.copied()), case)
    return ModuleRun(case.copied(), case)


def ours(case: Case):
    if case.workload.mode == "loop":
        return LoopRun(lstm_fused, case)
    return ModuleRun(case.fused(), case, options=case.options)


def without_option(case: Case):
    """Ours on the same input without the row's option: what the option costs."""
    return ModuleRun(case.fused(), case)


def plain(case: Case):
    """Our LSTM, or GRU for a kind of it, of the same sizes."""
    work = replace(case.workload, cell="gru" if "GRU" in case.workload.cell else "lstm")
    return ours(build_case(work, case.device))


def compiled(case: Case):
    """torch.nn's layer; of xlstm's the loop over our reference's step: its own breaks the graph."""
    theirs = case.workload.cell == XLSTM
    module = cells.looped(case.fused()) if theirs else case.copied()
    return ModuleRun(torch.compile(module), case)


def quantized(dtype, case: Case):
    return ModuleRun(lstm_fused.quantize_(case.fused(), dtype), case)


def dynamic_of_torch(module: torch.nn.RNNBase, dtype) -> torch.nn.Module:
    """torch.nn's layer with weights of torch.qint8 or of torch.float16."""
    model = torch.nn.ModuleDict({"layer": module})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it announces its end
        return torch.ao.quantization.quantize_dynamic(model, {type(module)}, dtype)["layer"]


def torch_dynamic(dtype, case: Case):
    return ModuleRun(dynamic_of_torch(case.copied(), dtype), case)


def without_cudnn(case: Case):
    run = torch_nn(case)
    run.step = torch.backends.cudnn.flags(enabled=False)(run.step)
    return run


def one_chunk(case: Case):
    """bfloat16 weights laid into one buffer beforehand: flatten_parameters does so for the other
    dtypes alone."""
    module = case.copied()
    with torch.no_grad():
        torch._cudnn_rnn_flatten_weight(
            module._flat_weights,
            len(module._flat_weights) // (module.num_layers * case.workload.directions),
            module.input_size,
            torch.backends.cudnn.rnn.get_cudnn_mode(module.mode),
            module.hidden_size,
            module.proj_size,
            module.num_layers,
            module.batch_first,
            module.bidirectional,
        )
    return ModuleRun(module, case)


class PlanRun(ModuleRun):
    """Ours by this CUDA plan only, where it fits the device."""

    def __init__(self, plan: str, case: Case):
        super().__init__(case.fused(), case)
        self.plan, unplanned = plan, self.step
        self.step = lambda: self._planned(unplanned)
        self.step()
        if (ran := cuda.last_run()["kernel"]) != plan:
            raise Unsupported(f"{ran} runs in its place")

    def _planned(self, function):
        cuda.set_plan(self.plan)
        try:
            return function()
        finally:
            cuda.set_plan("fused")

    def kernels(self) -> list[dict]:
        return self._planned(super().kernels)


class CellRun(ModuleRun):
    """torch.nn.LSTMCell with the module's weights, what a loop over steps would call."""

    def __init__(self, case: Case):
        super().__init__(cell_of(torch.nn, case), case)

    def reset(self):
        self.state = self.case.state and tuple(s[0] for s in self.case.state)

    def _forward(self):
        return self.module(self.x[0], self.state)

    def _carry(self):
        self.state = self.module(self.x[0], self.state)
        return self.state

    def results(self):
        self.reset()
        with torch.no_grad():
            h, c = (s[None] for s in self.step())
        return named(h, (h, c))


def haste(case: Case):
    """lmnt-com/haste's layer, which has one bias where torch has two."""
    import haste_pytorch

    work = case.workload
    layer = haste_pytorch.LSTM(work.I, work.H).to(device="cuda", dtype=DTYPES[work.dtype])
    layer.from_native_weights(*case.module.all_weights[0])
    return ModuleRun(layer.cuda().train(work.training), case, OTHER_WEIGHTS)


class FlashModule(torch.nn.Module):
    """NX-AI/flashrnn's fused kernel; the input projection, which it leaves out, is torch's."""

    def __init__(self, module: torch.nn.LSTM):
        super().__init__()
        from flashrnn import flashrnn

        self.run = flashrnn
        H = module.hidden_size
        w_ih, w_hh, b_ih, b_hh = (w.detach() for w in module.all_weights[0])
        self.w_ih = torch.nn.Parameter(w_ih.clone())
        self.R = torch.nn.Parameter(w_hh.unflatten(0, (4, H))[:, None].contiguous())
        self.b = torch.nn.Parameter((b_ih + b_hh).unflatten(0, (4, 1, H)))

    def forward(self, x, state):
        """x (T, N, I) -> y (T, N, H) and (h_n, c_n) (1, N, H)."""
        gates = torch.nn.functional.linear(x, self.w_ih).transpose(0, 1)
        gates = gates.unflatten(-1, (4, 1, -1))  # (N, T, 4, one head, H)
        states, last = self.run(gates, self.R, self.b, function="lstm", backend="cuda_fused")
        h_n, c_n = (last[k].reshape(1, x.shape[1], -1) for k in (0, 1))
        return states[0].squeeze(2).transpose(0, 1), (h_n, c_n)


@dataclass(frozen=True)
class Provider:
    """build(case) -> run; needs: by reason against it, a function of (workload, device) that tells
    whether it does not apply; modules: what must be installed; judged: False for one that is to
    compute something else than the row; rounded: whether its weights are, so that its error is
    shown where that of the others is bounded."""

    build: Callable[[Case], object]
    needs: dict[str, Callable[[Workload, str], bool]] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    judged: bool = True
    rounded: bool = False
    default: bool = True  # False: only when named by --providers

    def unsupported_reason(self, work: Workload, device: str) -> str | None:
        reasons = [reason for reason, holds in self.needs.items() if not holds(work, device)]
        missing = [m for m in self.modules if importlib.util.find_spec(m) is None]
        return next(iter([*reasons, *(f"{m} is not installed" for m in missing)]), None)


ON_CUDA = {"needs a CUDA device": lambda work, device: device == "cuda"}
STATELESS = {"a step's state is carried from call to call": lambda work, _: work.mode != "step"}
NO_DROPOUT = {"dropout masks cannot be compared": lambda work, _: not work.dropout}
ONE_LAYER = {"measured for one plain layer only": lambda work, _: work.plain}
ONE_STEP = {"measured for single steps only": lambda work, _: work.T == 1 and not work.training}
BFLOAT16 = {"torch does so itself in other dtypes": lambda work, _: work.dtype == "bfloat16"}
WIDE = {"runs float32 and float64": lambda work, _: work.dtype in ("float32", "float64")}
NARROW = {"its kernel is for 16-bit dtypes": lambda work, _: work.dtype.endswith("float16")}
INFERENCE = {
    "measured for float32 inference on the CPU only": lambda work, device: (
        device == "cpu" and not work.training and work.dtype == "float32"
    ),
}
ON_ONNX = (
    INFERENCE
    | NO_DROPOUT
    | {
        "ONNX has no projection": lambda work, _: not work.proj,
        "ONNX has no such option": lambda work, _: not work.option,
    }
)
UNHELD = {"cannot be held to an instruction set": lambda work, _: not environment.isa()}
LSTM_NODES = {"has int8 weights for LSTM nodes only": lambda work, _: work.cell == "lstm"}
TORCH_DYNAMIC = INFERENCE | {
    "torch has it for LSTM and GRU only": lambda work, _: work.cell in ("lstm", "gru"),
    "torch has it without projections only": lambda work, _: not work.proj,
    "torch has no such option": lambda work, _: not work.option,
}
STREAMED = INFERENCE | {"a stream is one step": lambda work, _: work.mode == "step"}
COMPARABLE = {
    "measured for an option on the same input": lambda work, _: (
        work.option in ("resets", "cell states", "checkpoints")
    )
}
COMPILABLE = {"a loop takes minutes to compile": lambda work, _: work.cell not in LAYERS}
OF_LAYERS = {"measured beside other cells only": lambda work, _: work.cell in LAYERS}
GRAPHED = ON_CUDA | STATELESS | NO_DROPOUT

PROVIDERS = {
    TORCH: Provider(torch_nn),
    OURS: Provider(ours),
    WITHOUT: Provider(without_option, COMPARABLE, judged=False),
    ONNX: Provider(OnnxRuntimeRun, ON_ONNX, ("onnx", "onnxruntime")),
    OPENVINO: Provider(OpenVinoRun, ON_ONNX | UNHELD, ("onnx", "openvino")),
    ONNX_INT8: Provider(
        OnnxInt8Run,
        ON_ONNX | LSTM_NODES,
        ("onnx", "onnxruntime"),
        rounded=True,
        default=False,
    ),
    **{
        name: Provider(functools.partial(build, dtype), needs, rounded=True, default=False)
        for name, build, dtype, needs in (
            (OURS_INT8, quantized, torch.int8, INFERENCE),
            (OURS_BFLOAT16, quantized, torch.bfloat16, INFERENCE),
            (TORCH_INT8, torch_dynamic, torch.qint8, TORCH_DYNAMIC),
            (TORCH_FLOAT16, torch_dynamic, torch.float16, TORCH_DYNAMIC),
            (INT8_STREAM, StreamRun, torch.int8, STREAMED),
        )
    },
    STREAM: Provider(functools.partial(StreamRun, None), STREAMED, default=False),
    C_STREAM: Provider(functools.partial(CStreamRun, None), STREAMED, default=False),
    CELL: Provider(CellRun, ONE_LAYER | ONE_STEP),
    AGAIN: Provider(torch_nn, default=False),
    COMPILED: Provider(compiled, NO_DROPOUT | COMPILABLE, default=False),
    PLAIN: Provider(plain, OF_LAYERS, judged=False, default=False),
    "cuDNN off": Provider(without_cudnn, ON_CUDA, default=False),
    CHUNK: Provider(one_chunk, ON_CUDA | BFLOAT16),
    GRAPH: Provider(lambda case: GraphRun(case.copied(), case), GRAPHED),
    OURS_GRAPH: Provider(lambda case: GraphRun(case.fused(), case), GRAPHED),
    "haste": Provider(haste, ON_CUDA | ONE_LAYER | WIDE | STATELESS, ("haste_pytorch",)),
    "FlashRNN": Provider(
        lambda case: ModuleRun(FlashModule(case.module), case, OTHER_WEIGHTS),
        ON_CUDA | ONE_LAYER | NARROW | STATELESS,
        ("flashrnn",),
    ),
    **{
        f"{OURS} {plan}": Provider(functools.partial(PlanRun, plan), ON_CUDA, default=False)
        for plan in cuda.KINDS
    },
}


def unsupported_reason(work: Workload, device: str) -> str | None:
    """Why a row is not measured at all, None where it is."""
    if work.cell not in CELLS:
        return cells.absent_reason(work)
    name = CELLS[work.cell]
    if work.dropout and device == "cuda":
        return "cuDNN's dropout masks are its own, so that nothing can be compared"
    known = hasattr(lstm_fused, name) and work.cell in reference.CELLS
    return None if known else f"lstm_fused has no {name} yet"
