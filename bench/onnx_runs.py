"""A graph of one recurrent node with a case's weights, in ONNX Runtime and in OpenVINO.

Libraries beside torch are imported only when a row asks for them.
"""

import tempfile
from pathlib import Path

import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from bench.cases import CELLS, lengths_of
from bench.runs import Case, named

# What an operator graph may use; older than the installed onnx, so that ONNX Runtime knows it.
OPSET, IR_VERSION = 17, 10


def infer_in_onnx_runtime(model: bytes):
    """The graph as a function of its feed, arrays by name, on as many threads as torch's."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    cpu = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(model, options, providers=cpu)
    return lambda feed: session.run(None, feed)


class OnnxRun:
    """A graph of one recurrent node with the module's weights, on as many threads as torch's.

    A subclass's `load` makes the model a function of the feed, arrays by name, that returns y and
    the final states.
    """

    def __init__(self, case: Case):
        self.case = case
        self.infer = self.load(onnx_model(case))
        self.reset()

    def load(self, model: bytes):
        raise NotImplementedError

    def reset(self):
        work, x = self.case.workload, self.case.x
        if work.lengths != "full":
            x = pad_packed_sequence(x)[0]
        elif work.batch_first:
            x = x.transpose(0, 1).contiguous()
        tensors = (x, *(self.case.state or ()))
        self.feed = {n: t.numpy() for n, t in zip(("x", "h0", "c0"), tensors, strict=False)}

    def step(self):
        out = self.infer(self.feed)
        if self.case.state:
            self.feed |= dict(zip(("h0", "c0"), out[1:], strict=False))
        return out

    def results(self):
        """y from ONNX's (T, D, N, R) to torch's (T, N, D*R), or its packed data."""
        self.reset()
        y, *ends = (torch.from_numpy(t.copy()) for t in self.step())
        y = y.transpose(1, 2).flatten(2)
        if self.case.workload.lengths != "full":
            y = pack_padded_sequence(y, torch.tensor(lengths_of(self.case.workload)))
        elif self.case.workload.batch_first:
            y = y.transpose(0, 1)
        return named(y, ends)


class OnnxRuntimeRun(OnnxRun):
    def load(self, model):
        return infer_in_onnx_runtime(model)


class OnnxInt8Run(OnnxRuntimeRun):
    """With int8 weights, as onnxruntime.quantization makes them by default."""

    def load(self, model):
        return super().load(in_int8(model))


def in_int8(model: bytes) -> bytes:
    """The graph with onnxruntime.quantization's int8 weights, which it has for LSTM nodes."""
    import onnx
    from onnxruntime.quantization import quantize_dynamic

    graph = onnx.load_from_string(model)
    # Says that its preprocessing is done; a graph of one node needs none.
    graph.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        quantize_dynamic(graph, path)
        return path.read_bytes()


class OpenVinoRun(OnnxRun):
    """In float32: without the hint, OpenVINO computes in bfloat16 where the processor can."""

    def load(self, model):
        import openvino

        properties = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
        }
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(model), "CPU", properties)
        request = compiled.create_infer_request()
        names = [port.any_name for port in compiled.outputs]

        def infer(feed):
            out = request.infer(feed, share_inputs=True)
            return [out[name] for name in names]

        return infer


# For each cell torch's gates in ONNX's order, and the attributes of ONNX's node.
ONNX_CELLS = {
    "lstm": ([0, 3, 1, 2], {}),
    "gru": ([1, 0, 2], {"linear_before_reset": 1}),
    "rnn_tanh": ([0], {}),
}


def onnx_model(case: Case) -> bytes:
    """One node of all directions: weights (D, gates * H, ...), biases (D, 2 * gates * H)."""
    from onnx import TensorProto, helper, numpy_helper

    work, D = case.workload, case.workload.directions
    order, attributes = ONNX_CELLS[work.cell]
    weights = [
        torch.stack([w.detach().unflatten(0, (-1, work.H))[order].flatten(0, 1) for w in ws])
        for ws in zip(*case.module.all_weights, strict=True)
    ]
    constants = {"w": weights[0].numpy(), "r": weights[1].numpy()}
    if work.bias:
        constants["b"] = torch.cat(weights[2:], dim=1).numpy()
    if work.lengths != "full":
        constants["lengths"] = torch.tensor(lengths_of(work), dtype=torch.int32).numpy()
    cell_state = work.cell == "lstm"
    states = (["h0", "c0"] if cell_state else ["h0"]) if case.state else []
    given = {"x", *constants, *states}

    def values(names, *shape):
        return [helper.make_tensor_value_info(n, TensorProto.FLOAT, list(shape)) for n in names]

    inputs = ("x", "w", "r", "b", "lengths", "h0", "c0")[: 7 if cell_state else 6]
    ends = ["h", "c"] if cell_state else ["h"]
    node = helper.make_node(
        CELLS[work.cell],
        [name if name in given else "" for name in inputs],
        ["y", *ends],
        hidden_size=work.H,
        direction="bidirectional" if D == 2 else "forward",
        **attributes,
    )
    graph = helper.make_graph(
        [node],
        "layer",
        values(["x"], work.T, work.N, work.I) + values(states, D, work.N, work.H),
        values(["y"], work.T, D, work.N, work.H) + values(ends, D, work.N, work.H),
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    return model.SerializeToString()
