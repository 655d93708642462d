"""What is compared: a provider builds a run of a case, or says why a workload is unsupported.

Libraries beside torch are imported only when a row asks for them.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

import lstm_fused
from bench import environment
from bench.cases import CELL, CELLS, CHUNK, DTYPES, GRAPH, ONNX, OURS, TORCH, Workload
from bench.runs import Case, GraphRun, LoopRun, ModuleRun, named
from lstm_fused import cuda, reference

OURS_GRAPH, AGAIN = f"{OURS} graph", f"{TORCH} again"
# What an operator graph may use; older than the installed onnx, so that ONNX Runtime knows it.
OPSET, IR_VERSION = 17, 10
OTHER_WEIGHTS = ("y", "h_n", "c_n", "d_x")  # what is compared where weights have other shapes


class Unsupported(Exception):
    """Why a provider cannot run a case, where only running it tells."""


def torch_nn(case: Case):
    if case.workload.mode == "loop":
        return LoopRun(torch.nn, case)
    return ModuleRun(case.copied(), case)


def ours(case: Case):
    if case.workload.mode == "loop":
        return LoopRun(lstm_fused, case)
    return ModuleRun(case.fused(), case)


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
            cuda.set_plan(None)

    def kernels(self) -> list[dict]:
        return self._planned(super().kernels)


class CellRun(ModuleRun):
    """torch.nn.LSTMCell with the module's weights, what a loop over steps would call."""

    def __init__(self, case: Case):
        cell = torch.nn.LSTMCell(case.workload.I, case.workload.H).to(case.module.weight_hh_l0)
        weights = case.module.named_parameters()
        cell.load_state_dict({name.removesuffix("_l0"): w for name, w in weights})
        super().__init__(cell, case)

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


class OnnxRun:
    """A graph of one LSTM node with the module's weights, on as many threads as torch's."""

    def __init__(self, case: Case):
        import onnxruntime

        self.case = case
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            onnx_model(case), options, providers=["CPUExecutionProvider"]
        )
        self.reset()

    def reset(self):
        tensors = (self.case.x, *(self.case.state or ()))
        self.feed = {n: t.numpy() for n, t in zip(("x", "h0", "c0"), tensors, strict=False)}

    def step(self):
        out = self.session.run(None, self.feed)
        if self.case.state:
            self.feed["h0"], self.feed["c0"] = out[1:]
        return out

    def results(self):
        """y from ONNX's (T, D, N, R) to torch's (T, N, D*R)."""
        self.reset()
        y, h_n, c_n = (torch.from_numpy(t.copy()) for t in self.step())
        return named(y.transpose(1, 2).flatten(2), (h_n, c_n))


def onnx_model(case: Case) -> bytes:
    """One LSTM node: torch's gates i f g o in ONNX's order i o f c, all directions stacked."""
    from onnx import TensorProto, helper, numpy_helper

    work, D = case.workload, case.workload.directions
    weights = [
        torch.stack([w.detach().unflatten(0, (4, work.H))[[0, 3, 1, 2]].flatten(0, 1) for w in ws])
        for ws in zip(*case.module.all_weights, strict=True)
    ]
    inputs = {"w": weights[0], "r": weights[1], "b": torch.cat(weights[2:], dim=1)}
    states = ["h0", "c0"] if case.state else []

    def values(names, *shape):
        return [helper.make_tensor_value_info(n, TensorProto.FLOAT, list(shape)) for n in names]

    node = helper.make_node(
        "LSTM",
        ["x", "w", "r", "b", "", *states] if states else ["x", "w", "r", "b"],
        ["y", "h", "c"],
        hidden_size=work.H,
        direction="bidirectional" if D == 2 else "forward",
    )
    graph = helper.make_graph(
        [node],
        "lstm",
        values(["x"], work.T, work.N, work.I) + values(states, D, work.N, work.H),
        values(["y"], work.T, D, work.N, work.H) + values(["h", "c"], D, work.N, work.H),
        [numpy_helper.from_array(t.numpy(), name) for name, t in inputs.items()],
    )
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    return model.SerializeToString()


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
    whether it does not apply; modules: what must be installed."""

    build: Callable[[Case], object]
    needs: dict[str, Callable[[Workload, str], bool]] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    default: bool = True  # False: only when named by --providers

    def unsupported_reason(self, work: Workload, device: str) -> str | None:
        reasons = [reason for reason, holds in self.needs.items() if not holds(work, device)]
        missing = [m for m in self.modules if importlib.util.find_spec(m) is None]
        return next(iter([*reasons, *(f"{m} is not installed" for m in missing)]), None)


ON_CUDA = {"needs a CUDA device": lambda work, device: device == "cuda"}
STATELESS = {"a step's state is carried from call to call": lambda work, _: work.mode != "step"}
NO_DROPOUT = {"dropout masks cannot be compared": lambda work, _: not work.dropout}
PLAIN = {"measured for one plain layer only": lambda work, _: work.plain}
ONE_STEP = {"measured for single steps only": lambda work, _: work.T == 1 and not work.training}
BFLOAT16 = {"torch does so itself in other dtypes": lambda work, _: work.dtype == "bfloat16"}
WIDE = {"runs float32 and float64": lambda work, _: work.dtype in ("float32", "float64")}
NARROW = {"its kernel is for 16-bit dtypes": lambda work, _: work.dtype.endswith("float16")}
ON_ONNX = {
    "measured for float32 inference on the CPU only": lambda work, device: (
        device == "cpu" and not work.training and work.dtype == "float32"
    ),
    "measured for one dense LSTM layer only": lambda work, _: replace(work, directions=1).plain,
    "cannot be held to an instruction set": lambda work, _: not environment.isa(),
}
GRAPHED = ON_CUDA | STATELESS | NO_DROPOUT

PROVIDERS = {
    TORCH: Provider(torch_nn),
    OURS: Provider(ours),
    ONNX: Provider(OnnxRun, ON_ONNX, ("onnx", "onnxruntime")),
    CELL: Provider(CellRun, PLAIN | ONE_STEP),
    AGAIN: Provider(torch_nn, default=False),
    "torch.compile": Provider(
        lambda case: ModuleRun(torch.compile(case.copied()), case), NO_DROPOUT, default=False
    ),
    "cuDNN off": Provider(without_cudnn, ON_CUDA, default=False),
    CHUNK: Provider(one_chunk, ON_CUDA | BFLOAT16),
    GRAPH: Provider(lambda case: GraphRun(case.copied(), case), GRAPHED),
    OURS_GRAPH: Provider(lambda case: GraphRun(case.fused(), case), GRAPHED),
    "haste": Provider(haste, ON_CUDA | PLAIN | WIDE | STATELESS, ("haste_pytorch",)),
    "FlashRNN": Provider(
        lambda case: ModuleRun(FlashModule(case.module), case, OTHER_WEIGHTS),
        ON_CUDA | PLAIN | NARROW | STATELESS,
        ("flashrnn",),
    ),
    **{
        f"{OURS} {plan}": Provider(functools.partial(PlanRun, plan), ON_CUDA, default=False)
        for plan in cuda.KINDS
    },
}


def unsupported_reason(work: Workload, device: str) -> str | None:
    """Why a row is not measured at all, None where it is."""
    name = CELLS[work.cell]
    if work.dropout and device == "cuda":
        return "cuDNN's dropout masks are its own, so that nothing can be compared"
    known = hasattr(lstm_fused, name) and work.cell in reference.CELLS
    return None if known else f"lstm_fused has no {name} yet"
