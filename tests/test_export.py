"""What takes an exported program: AOTInductor, from Python and from C++, OpenVINO, ExecuTorch."""

import logging
import os
import shutil
import subprocess
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from exports import SIZES, Model, dynamic_shapes, inputs, rows
from torch import nn
from torch.utils import cpp_extension

import lstm_fused
from lstm_fused import _C
from lstm_fused.operators import forward_op, padded_op

ROWS = rows(1)
# torch has no operator for lengths: there they become the steps themselves, for a fixed T.
WITHOUT_LENGTHS = {name: row for name, row in ROWS.items() if "lengths" not in row["form"]}
WITH_LENGTHS = {name: ROWS[name] for name in ROWS.keys() - WITHOUT_LENGTHS.keys()}
ATEN = {f"aten.{cell}.input" for cell in ("lstm", "gru", "rnn_tanh", "rnn_relu")}


def exported(rows, dynamic=True):
    """The model of these rows, and its program."""
    torch.manual_seed(0)
    model = Model(rows).eval()
    shapes = dynamic_shapes() if dynamic else None
    with torch.no_grad():
        return model, torch.export.export(model, inputs(*SIZES[0]), dynamic_shapes=shapes)


def operators(program):
    return Counter(str(n.target) for n in program.graph.nodes if n.op == "call_function")


def compare(model, rows, run, sizes=SIZES):
    """{row: (what run gives, what the model gives), for each of the sizes}."""
    found = {name: [] for name in rows}
    for T, N in sizes:
        given = inputs(T, N)
        with torch.no_grad():
            pairs = [model.results(rows, list(each(*given))) for each in (run, model)]
        for name in rows:
            found[name].append([each[name] for each in pairs])
    return found


@pytest.fixture(scope="module")
def packaged(tmp_path_factory):
    """The model of all rows, and its AOTInductor package."""
    path = tmp_path_factory.mktemp("aoti") / "model.pt2"
    model, program = exported(ROWS)
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    return model, path


@pytest.fixture(scope="module")
def from_python(packaged):
    model, path = packaged
    return compare(model, ROWS, torch._inductor.aoti_load_package(str(path)))


@pytest.mark.parametrize("name", ROWS)
def test_package(from_python, name):
    for found, expected in from_python[name]:
        torch.testing.assert_close(found, expected)


def test_package_refuses_lengths(packaged):
    x, h, c, lengths = inputs(*SIZES[0])
    run = torch._inductor.aoti_load_package(str(packaged[1]))
    with pytest.raises(RuntimeError):
        run(x, h, c, lengths + 1)


@pytest.fixture(scope="module")
def from_cpp(packaged, tmp_path_factory):
    """The package run by a C++ program that has no Python in it."""
    folder = tmp_path_factory.mktemp("cpp")
    (libraries,) = cpp_extension.library_paths()
    program = folder / "run_package"
    subprocess.run(
        [
            *os.environ.get("CXX", "g++").split(),
            *("-std=c++20", "-g0", str(Path(__file__).parent / "cpp" / "run_package.cpp")),
            *(f"-I{path}" for path in cpp_extension.include_paths()),
            *(f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-Wl,--no-as-needed"),
            *("-ltorch", "-ltorch_cpu", "-lc10", "-ldl", "-o", str(program)),
        ],
        check=True,
    )
    model, package = packaged

    def run(*given):
        files = [folder / "inputs.pt", folder / "outputs.pt"]
        torch.save(list(given), files[0])
        subprocess.run([program, _C.__file__, package, *files], check=True)
        return torch.load(files[1])

    found = compare(model, ROWS, run)
    return found, program


@pytest.mark.parametrize("name", ROWS)
def test_package_in_cpp(from_cpp, name):
    for found, expected in from_cpp[0][name]:
        torch.testing.assert_close(found, expected)


@pytest.mark.skipif(shutil.which("ldd") is None, reason="there is no ldd")
def test_cpp_has_no_python(from_cpp):
    for path in (from_cpp[1], _C.__file__):
        listed = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout
        assert "torch" in listed and "python" not in listed.replace("python3.", "", 0).lower()


@pytest.fixture(scope="module", params=["no lengths", "lengths"])
def decomposed(request):
    """A model without our operators, of those rows."""
    rows = WITHOUT_LENGTHS if request.param == "no lengths" else WITH_LENGTHS
    dynamic = rows is WITHOUT_LENGTHS
    model, program = exported(rows, dynamic)
    return rows, model, program.run_decompositions(lstm_fused.decompositions()), dynamic


def sizes(dynamic):
    return SIZES if dynamic else SIZES[:1]


def test_decompositions(decomposed):
    rows, model, program, dynamic = decomposed
    found = operators(program)
    assert not {op for op in found if "lstm_fused" in op}
    layers = sum(row.get("num_layers", 1) for row in rows.values())
    assert sum(found[op] for op in ATEN) == (layers if dynamic else 0)
    for pairs in compare(model, rows, program.module(), sizes(dynamic)).values():
        for ours, expected in pairs:
            torch.testing.assert_close(ours, expected)


def test_lengths_of_any_number_of_steps_have_no_decomposition():
    program = exported({"row": {"cell": "gru", "form": "lengths"}})[1]
    with pytest.raises(NotImplementedError, match="fixed one"):
        program.run_decompositions(lstm_fused.decompositions())


def test_openvino(decomposed):
    openvino = pytest.importorskip("openvino")
    rows, model, program, dynamic = decomposed
    compiled = openvino.compile_model(
        openvino.convert_model(program), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )

    def run(*given):
        used = given[: len(compiled.inputs)]
        results = compiled([t.numpy() for t in used])
        return [torch.from_numpy(results[k]) for k in range(len(results))]

    for pairs in compare(model, rows, run, sizes(dynamic)).values():
        for ours, expected in pairs:
            torch.testing.assert_close(ours, expected)


def test_executorch(decomposed):
    pytest.importorskip("executorch")
    rows, model, program, dynamic = decomposed
    if dynamic:  # it unrolls the steps
        model, program = exported(rows, dynamic=False)
        program = program.run_decompositions(lstm_fused.decompositions())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            from executorch.exir import to_edge

            edge = to_edge(program)
        finally:
            logging.disable(logging.NOTSET)
    assert not {op for op in operators(edge.exported_program()) if "lstm_fused" in op}
    run = edge.exported_program().module()
    for pairs in compare(model, rows, run, SIZES[:1]).values():
        for ours, expected in pairs:
            torch.testing.assert_close(ours, expected)
    edge.to_executorch()


@pytest.mark.parametrize("strict", [False, True])
def test_lengths_are_one_operator(strict):
    model, given = lstm_fused.LSTM(3, 5, num_layers=2), inputs(*SIZES[0])
    program = torch.export.export(model, (given[0], None, given[3]), strict=strict)
    assert operators(program)[str(padded_op)] == 2
    later = program.run_decompositions()
    assert operators(later)[str(forward_op)] == 2
    for each in (program, later):
        torch.testing.assert_close(
            each.module()(given[0], None, given[3]), model(given[0], lengths=given[3])
        )


def test_symbolic_trace():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = lstm_fused.GRU(3, 5)

        def forward(self, x, lengths):
            return self.gru(x, lengths=lengths)[0]

    model, (x, _, _, lengths) = Tagger(), inputs(*SIZES[0])
    traced = torch.fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["gru"]
    torch.testing.assert_close(traced(x, lengths), model(x, lengths))
