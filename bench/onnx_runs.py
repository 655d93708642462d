"""A graph of recurrent nodes with a case's weights, in ONNX Runtime and in OpenVINO.

Libraries beside torch are imported only when a row asks for them.
"""

import contextlib
import importlib.metadata
import importlib.util
import sys
import tempfile
from pathlib import Path

import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from bench import environment
from bench.cases import CELLS, Workload, lengths_of
from bench.compiled import BUILD, NotMeasured
from bench.runs import Case, named

# What an operator graph may use; older than the installed onnx, so that ONNX Runtime knows it.
OPSET, IR_VERSION = 18, 10


# On x86-64: ecx is set to 0 and XCR0 is read, whose bits say which registers the system saves; and
# in its place eax is set to ecx + 7, of which those of AVX-512 are none.
READS_XCR0, WITHOUT_AVX512 = b"\x31\xc9\x0f\x01\xd0", b"\x31\xc9\x8d\x41\x07"


def import_onnx_runtime():
    """The module onnxruntime: where libraries are held to AVX2, which it has no setting for, of a
    copy that finds no registers of AVX-512."""
    if not environment.isa():
        return importlib.import_module("onnxruntime")
    (installed,) = importlib.util.find_spec("onnxruntime").submodule_search_locations
    copy = str(without_avx512(Path(installed)))
    if copy not in sys.path:
        sys.path.insert(0, copy)
    module = importlib.import_module("onnxruntime")
    if not module.__file__.startswith(copy):
        raise NotMeasured("ONNX Runtime was imported before it could be held to AVX2")
    return module


def without_avx512(package: Path) -> Path:
    """The folder of the copy, in which all but the changed library are links."""
    version = importlib.metadata.version("onnxruntime")
    folder = BUILD / f"onnxruntime-{version}-without-avx512"
    if folder.exists():
        return folder
    (library,) = (package / "capi").glob("onnxruntime_pybind11_state*.so")
    text = library.read_bytes()
    if READS_XCR0 not in text:
        raise NotMeasured("ONNX Runtime reads in some other way which registers there are")
    BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD, ignore_cleanup_errors=True) as partial:
        capi = Path(partial) / "onnxruntime" / "capi"
        capi.mkdir(parents=True)
        for source, target in ((package, capi.parent), (package / "capi", capi)):
            for each in source.iterdir():
                if each.name not in ("capi", "__pycache__", library.name):
                    (target / each.name).symlink_to(each)
        (capi / library.name).write_bytes(text.replace(READS_XCR0, WITHOUT_AVX512))
        with contextlib.suppress(OSError):  # another process was faster
            Path(partial).rename(folder)
    return folder


def infer_in_onnx_runtime(model: bytes):
    """The graph as a function of its feed, arrays by name, on as many threads as torch's."""
    onnxruntime = import_onnx_runtime()
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

    import_onnx_runtime()
    from onnxruntime.quantization import quantize_dynamic

    graph = onnx.load_from_string(model)
    # Says that its preprocessing is done; such a graph needs none.
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


def onnx_weights(work: Workload, weights: list[list[torch.Tensor]]) -> dict:
    """A layer's constants from its weights by direction: w, r (D, gates * H, ...), b (D, 2 * gates
    * H)."""
    order = ONNX_CELLS[work.cell][0]
    stacked = [
        torch.stack([w.detach().unflatten(0, (-1, work.H))[order].flatten(0, 1) for w in ws])
        for ws in zip(*weights, strict=True)
    ]
    constants = {"w": stacked[0], "r": stacked[1]}
    return constants | ({"b": torch.cat(stacked[2:], dim=1)} if work.bias else {})


def onnx_model(case: Case) -> bytes:
    """From x (T, N, I), h0 and c0 (L*D, N, H) to y (T, D, N, H), h and c: a node a layer, with what
    ONNX needs to feed y to the next."""
    from onnx import TensorProto, helper, numpy_helper

    work, L, D = case.workload, case.workload.layers, case.workload.directions
    ends = ["h", "c"] if work.cell == "lstm" else ["h"]
    states = [f"{end}0" for end in ends] if case.state else []
    constants, nodes = {}, []
    if work.lengths != "full":
        constants["lengths"] = torch.tensor(lengths_of(work), dtype=torch.int32)
    if L > 1:
        constants["flat"] = torch.tensor([0, 0, D * work.H])
        for name in states:
            parts = [f"{name}_{layer}" for layer in range(L)]
            nodes.append(helper.make_node("Split", [name], parts, axis=0, num_outputs=L))
    x = "x"
    for layer in range(L):
        # Of the only layer, or else the last one: the graph's own names.
        suffix, last = f"_{layer}" if L > 1 else "", layer == L - 1
        weights = onnx_weights(work, case.module.all_weights[layer * D : (layer + 1) * D])
        constants |= {f"{name}{suffix}": w for name, w in weights.items()}
        y = "y" if last else f"y{suffix}"
        given = {"x": x, "lengths": "lengths" if "lengths" in constants else ""}
        given |= {name: f"{name}{suffix}" for name in (*weights, *states)}
        inputs = ("x", "w", "r", "b", "lengths", *(f"{end}0" for end in ends))
        node = helper.make_node(
            CELLS[work.cell],
            [given.get(name, "") for name in inputs],
            [y, *(f"{end}{suffix}" for end in ends)],
            hidden_size=work.H,
            direction="bidirectional" if D == 2 else "forward",
            **ONNX_CELLS[work.cell][1],
        )
        nodes.append(node)
        if not last:
            x = f"x{suffix}"
            nodes.append(helper.make_node("Transpose", [y], [f"t{suffix}"], perm=[0, 2, 1, 3]))
            nodes.append(helper.make_node("Reshape", [f"t{suffix}", "flat"], [x]))
    if L > 1:
        for end in ends:
            parts = [f"{end}_{layer}" for layer in range(L)]
            nodes.append(helper.make_node("Concat", parts, [end], axis=0))

    def values(names, *shape):
        return [helper.make_tensor_value_info(n, TensorProto.FLOAT, list(shape)) for n in names]

    graph = helper.make_graph(
        nodes,
        "layers",
        values(["x"], work.T, work.N, work.I) + values(states, L * D, work.N, work.H),
        values(["y"], work.T, D, work.N, work.H) + values(ends, L * D, work.N, work.H),
        [numpy_helper.from_array(each.numpy(), name) for name, each in constants.items()],
    )
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    return model.SerializeToString()
