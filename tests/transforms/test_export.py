"""Exported programs run in AOTInductor (Python and C++), OpenVINO and ExecuTorch."""

import os
import shutil
import subprocess
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils import cpp_extension

import lstm_fused
from lstm_fused import _C
from lstm_fused.operators import forward_op, padded_op
from tests.helpers.exports import SIZES, Model, dynamic_shapes, inputs, rows
from tests.helpers.oracle import CELLS

ROWS = rows(seed=1)
# Of any number of rows, but of as many steps as were exported, which are unrolled.
UNROLLED = rows(
    {
        "cell": tuple(CELLS),
        "form": ("plain", "hx and lengths"),
        "bidirectional": (False, True),
        "projection": (False, True),
    },
    {"cell": tuple(CELLS), "form": ("step",)},
)
UNROLLED_SIZES = ((3, 4), (3, 2))
ATEN = {f"aten.{cell}.input" for cell in CELLS}


def exported(rows, sizes=SIZES):
    """The model of these rows, and its program, dynamic in what the sizes differ in."""
    torch.manual_seed(0)
    model = Model(rows).eval()
    shapes = dynamic_shapes(T=len({T for T, _ in sizes}) > 1) if len(sizes) > 1 else None
    with torch.no_grad():
        return model, torch.export.export(model, inputs(*sizes[0]), dynamic_shapes=shapes)


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


@pytest.mark.full
@pytest.mark.parametrize("name", ROWS)
def test_package(from_python, name):
    for found, expected in from_python[name]:
        torch.testing.assert_close(found, expected)


@pytest.mark.full
def test_package_checks_lengths(packaged):
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
        return torch.load(files[1], weights_only=False)  # a list of another kind

    found = compare(model, ROWS, run)
    return found, program


@pytest.mark.full
@pytest.mark.parametrize("name", ROWS)
def test_package_in_cpp(from_cpp, name):
    for found, expected in from_cpp[0][name]:
        torch.testing.assert_close(found, expected)


@pytest.mark.full
@pytest.mark.skipif(shutil.which("ldd") is None, reason="there is no ldd")
def test_cpp_has_no_python(from_cpp):
    for path in (from_cpp[1], _C.__file__):
        listed = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout
        assert "torch" in listed and "libpython" not in listed and "torch_python" not in listed


@pytest.fixture(scope="module")
def decomposed():
    """A model, and its program in torch's operators."""
    model, program = exported(UNROLLED, UNROLLED_SIZES)
    return model, program.run_decompositions(lstm_fused.decompositions())


def assert_agree(model, run, sizes=UNROLLED_SIZES):
    for name, pairs in compare(model, UNROLLED, run, sizes).items():
        for found, expected in pairs:
            torch.testing.assert_close(
                found, expected, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_decompositions(decomposed):
    model, program = decomposed
    found = operators(program)
    assert not {op for op in found if "lstm_fused" in op}
    expected = Counter(
        f"aten.{row['cell']}.input" for row in UNROLLED.values() if "lengths" not in row["form"]
    )
    assert {op: found[op] for op in ATEN} == expected
    assert_agree(model, program.module())


@pytest.mark.parametrize("form", ["plain", "lengths"])
def test_a_dynamic_number_of_steps_has_no_decomposition(form):
    _, program = exported({"row": {"cell": "gru", "form": form}})
    with pytest.raises(NotImplementedError, match="fixed one"):
        program.run_decompositions(lstm_fused.decompositions())


@pytest.mark.full
def test_openvino(decomposed):
    openvino = pytest.importorskip("openvino")
    model, program = decomposed
    precision = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(openvino.convert_model(program), "CPU", precision)

    def run(*given):
        results = compiled([t.numpy() for t in given])
        return [torch.from_numpy(results[k]) for k in range(len(results))]

    assert_agree(model, run)


@pytest.mark.full
def test_executorch():
    """A program for ExecuTorch contains torch's operators alone."""
    pytest.importorskip("executorch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from executorch.exir import to_edge

        model, program = exported(UNROLLED, ((2, 3),))
        edge = to_edge(program.run_decompositions(lstm_fused.decompositions()))
    assert not {op for op in operators(edge.exported_program()) if "lstm_fused" in op}
    assert_agree(model, edge.exported_program().module(), ((2, 3),))
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
