"""Libraries beside torch's own modules: each is imported only when a row asks for it."""

import importlib.util

import torch

from bench import circumstances
from bench.problem import ModuleRun, Problem, named
from bench.workloads import DTYPES, Workload

# What an operator graph may use; older than the installed onnx, so that ONNX Runtime knows it.
OPSET, IR_VERSION = 17, 10


def missing(module: str) -> bool:
    return importlib.util.find_spec(module) is None


def one_plain_layer(work: Workload) -> bool:
    """A dense LSTM layer with biases and no option beyond that."""
    return (
        work.cell == "lstm"
        and work.layers == work.directions == 1
        and work.lengths == "full"
        and work.bias
        and not (work.proj or work.batch_first)
    )


def why_not_onnx(work: Workload, device: str) -> str | None:
    if device != "cpu" or work.training or work.dtype != "float32":
        return "measured for float32 inference on the CPU only"
    if work.cell != "lstm" or work.layers > 1 or work.proj or work.lengths != "full":
        return "measured for one dense LSTM layer without projection only"
    if work.batch_first or not work.bias:
        return "measured time first and with biases only"
    if circumstances.isa():
        return "cannot be held to an instruction set"
    return next((f"{m} is not installed" for m in ("onnx", "onnxruntime") if missing(m)), None)


class OnnxRun:
    """A graph of one LSTM node with the module's weights, on as many threads as torch's."""

    def __init__(self, problem: Problem):
        import onnxruntime

        self.problem = problem
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            onnx_model(problem), options, providers=["CPUExecutionProvider"]
        )
        self.feed = {"x": problem.x.numpy()}
        self.reset()
        self.step = self._carry if problem.state else self._forward

    def reset(self):
        if self.problem.state:
            self.feed |= {
                name: s.numpy() for name, s in zip(("h0", "c0"), self.problem.state, strict=True)
            }

    def _forward(self):
        return self.session.run(None, self.feed)

    def _carry(self):
        out = self.session.run(None, self.feed)
        self.feed["h0"], self.feed["c0"] = out[1:]
        return out

    def results(self):
        """y from ONNX's (T, D, N, R) to torch's (T, N, D*R)."""
        self.reset()
        y, h_n, c_n = (torch.from_numpy(t.copy()) for t in self.step())
        return named(y.transpose(1, 2).flatten(2), (h_n, c_n))


def onnx_model(problem: Problem) -> bytes:
    """One LSTM node: torch's gates i f g o in ONNX's order i o f c, all directions stacked."""
    from onnx import TensorProto, helper

    work, rows = problem.workload, problem.module.all_weights

    def stacked(place):
        parts = []
        for row in rows:
            i, f, g, o = row[place].detach().unflatten(0, (4, work.H)).unbind(0)
            parts.append(torch.cat([i, o, f, g]))
        return torch.stack(parts)

    def constant(name, tensor):
        data = tensor.contiguous().numpy().tobytes()
        return helper.make_tensor(name, TensorProto.FLOAT, list(tensor.shape), data, raw=True)

    def value(name, *shape):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))

    D = work.directions
    constants = [
        constant("w", stacked(0)),
        constant("r", stacked(1)),
        constant("b", torch.cat([stacked(2), stacked(3)], dim=1)),
    ]
    given = [value("x", work.T, work.N, work.I)]
    names = ["x", "w", "r", "b"]
    if problem.state:
        given += [value("h0", D, work.N, work.H), value("c0", D, work.N, work.H)]
        names += ["", "h0", "c0"]
    outputs = [
        value("y", work.T, D, work.N, work.H),
        value("h", D, work.N, work.H),
        value("c", D, work.N, work.H),
    ]
    node = helper.make_node(
        "LSTM",
        names,
        ["y", "h", "c"],
        hidden_size=work.H,
        direction="bidirectional" if D == 2 else "forward",
    )
    graph = helper.make_graph([node], "lstm", given, outputs, constants)
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    return model.SerializeToString()


def why_not_cell(work: Workload, device: str) -> str | None:
    if not one_plain_layer(work) or work.T > 1 or work.training:
        return "measured for one step of one plain layer only"
    return None


class CellRun(ModuleRun):
    """torch.nn.LSTMCell with the module's weights, what a loop over steps would call."""

    def __init__(self, problem: Problem):
        like = problem.module.weight_hh_l0
        cell = torch.nn.LSTMCell(problem.workload.I, problem.workload.H)
        cell = cell.to(like.device, like.dtype)
        weights = problem.module.named_parameters()
        cell.load_state_dict({name.removesuffix("_l0"): w for name, w in weights})
        super().__init__(cell, problem)

    def reset(self):
        state = self.problem.state
        self.state = state and tuple(s[0] for s in state)

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


def why_not_haste(work: Workload, device: str) -> str | None:
    if device != "cuda" or not one_plain_layer(work) or work.dtype not in ("float32", "float64"):
        return "runs one plain layer in float32 or float64 on CUDA"
    if work.mode == "step":
        return "takes no initial state"
    return "haste_pytorch is not installed" if missing("haste_pytorch") else None


class HasteRun(ModuleRun):
    """lmnt-com/haste's layer. It has one bias where torch has two, so gradients go by torch's names
    only for the input; its own parameters are named as it names them."""

    def __init__(self, problem: Problem):
        import haste_pytorch

        work = problem.workload
        layer = haste_pytorch.LSTM(work.I, work.H).to(device="cuda", dtype=DTYPES[work.dtype])
        layer.from_native_weights(*problem.module.all_weights[0])
        super().__init__(layer.cuda(), problem)
        if not self.training:
            layer.eval()

    def results(self):
        found = super().results()
        return {name: found[name] for name in ("y", "h_n", "c_n", "d_x") if name in found}


def why_not_flash(work: Workload, device: str) -> str | None:
    if device != "cuda" or not one_plain_layer(work) or work.mode == "step":
        return "runs one plain layer without an initial state on CUDA"
    if work.dtype not in ("float16", "bfloat16"):
        return "its fused kernel is for 16-bit dtypes"
    return "flashrnn is not installed" if missing("flashrnn") else None


class FlashRun(ModuleRun):
    """NX-AI/flashrnn's fused kernel; the input projection, which it leaves out, is torch's."""

    def __init__(self, problem: Problem):
        super().__init__(FlashModule(problem.module), problem)

    def results(self):
        found = super().results()
        return {name: found[name] for name in ("y", "h_n", "c_n", "d_x") if name in found}


class FlashModule(torch.nn.Module):
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
