"""The build: symbols of the libraries, plans of the CPU, the choice of an ISA, include rules."""

import os
import platform
import re
import shutil
import subprocess
import sys
from itertools import chain, product
from pathlib import Path

import pytest
import torch

import lstm_fused
from lstm_fused import _C, _plan, runtime
from tests.kernels.standalone.build import FEW_CELLS

ROOT = Path(__file__).parents[2]
UNSTABLE = re.compile(r"\b(at|c10|torch|caffe2|pybind11)::")
TORCH = re.compile(r"^(torch|aoti)_|torch|c10|\bat::")
# Of torch's C interface: everything else that is undefined is C, C++, OpenMP or Python.
SHIM = re.compile(r"^(aoti_torch|torch)_[a-z0-9_]+$")
NEED_NM = pytest.mark.skipif(shutil.which("nm") is None, reason="binutils are not installed")

DTYPES = ("float32", "float64", "bfloat16", "float16")
ISAS_OF = {
    "x86_64": ("baseline", "avx2", "avx512", "avx512_vnni", "avx512_bf16"),
    "aarch64": ("neon", "neon_bf16", "sve256", "sve256_bf16"),
}
ISAS = ISAS_OF[platform.machine()]
ALL_ISAS = tuple(chain(*ISAS_OF.values()))  # those of other machines can be planned for
SIZES = (  # T, N, I, H, R, directions
    (1, 1, 1, 1, 1, 1),
    (1, 1, 64, 64, 64, 1),
    (4, 4, 256, 256, 256, 2),
    (4, 5, 30, 17, 17, 1),
    (5, 1, 30, 17, 17, 2),
    (4, 4, 30, 17, 5, 1),
    (100, 1, 256, 256, 256, 1),
    (100, 8, 256, 256, 100, 2),
    (100, 32, 256, 256, 256, 1),
    (1000, 300, 7, 1000, 1000, 2),
    (10**6, 10**5, 10**4, 10**5, 10**5, 2),
    (3, 0, 4, 5, 5, 1),
)


def symbols(path, *options):
    """(kind, demangled name) of each symbol nm lists."""
    found = subprocess.run(
        ["nm", "--demangle", *options, str(path)], capture_output=True, text=True, check=True
    )
    rows = (
        re.match(r"(?:[0-9a-f]+\s+)?(\S) (.+)", line.strip()) for line in found.stdout.splitlines()
    )
    return [(row[1], row[2].split("@")[0]) for row in rows if row]


@NEED_NM
def test_operators_use_the_stable_interface_only():
    undefined = [name for _, name in symbols(_C.__file__, "--dynamic", "--undefined-only")]
    assert not [name for name in undefined if UNSTABLE.search(name)]
    torchs = [name for name in undefined if TORCH.search(name)]
    assert torchs and all(SHIM.match(name) for name in torchs)


@NEED_NM
def test_operators_load_without_python():
    """A C++ program without Python loads the library: what it asks of Python is weak."""
    rows = symbols(_C.__file__, "--dynamic", "--undefined-only")
    pythons = {(kind, name) for kind, name in rows if re.match(r"_?Py", name)}
    assert len(pythons) > 20
    assert {name for kind, name in pythons if kind.lower() not in ("w", "v")} == set()


@NEED_NM
def test_plan_module_links_no_torch():
    undefined = [name for _, name in symbols(_plan.__file__, "--dynamic", "--undefined-only")]
    assert any(name.startswith("Py") for name in undefined)
    assert not [name for name in undefined if TORCH.search(name)]


@NEED_NM
def test_modules_export_their_entry_only():
    """Other exported symbols could clash with those of another extension."""
    for module, entry in ((_C, "PyInit__C"), (_plan, "PyInit__plan")):
        exported = symbols(module.__file__, "--dynamic", "--defined-only")
        ours = [name for _, name in exported if not re.match(r"std::|typeinfo|vtable|VTT", name)]
        assert [name for name in ours if "lstm_fused" in name] == []
        assert entry in ours


@NEED_NM
@pytest.mark.parametrize(
    "isa", [*(pytest.param(i, marks=pytest.mark.full) for i in ISAS[:-1]), ISAS[-1]]
)
def test_isa_code_has_internal_linkage(isa, tmp_path):
    """The linker keeps one copy of an inline function: one compiled for AVX-512 would be run where
    there is none. So an ISA's object, even one that inlines nothing it need not (-O0), defines its
    own two entries and nothing else that others see."""
    source, target = ROOT / "csrc" / "cpu" / f"isa_{isa}.cpp", tmp_path / "isa.o"
    compiler = [os.environ.get("CXX", "g++"), "-std=c++20", "-O0", "-fPIC", "-Wno-psabi", FEW_CELLS]
    compiler += ["-msve-vector-bits=256"] if isa.startswith("sve") else []
    subprocess.run([*compiler, "-c", str(source), "-o", str(target)], check=True)
    defined = [(k, n) for k, n in symbols(target, "--defined-only") if k.isupper() or k in "uvw"]
    # A pointer to the runtime's handler of exceptions, the same in every object: data, no code.
    defined = [(k, n) for k, n in defined if n != "DW.ref.__gxx_personality_v0"]
    assert [kind for kind, _ in defined] == ["T", "T"], defined
    for entry in (f"::kernels_{isa}(", f"::described_kernels_{isa}("):
        assert any(entry in name for _, name in defined)


def test_build_info():
    info = runtime.build_info()
    assert info["version"] == lstm_fused.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", info["version"])
    assert re.match(r"\d+\.\d+", info["compiler"]) and re.match(r"2\.\d+", info["torch"])
    assert info["cuda"] == bool(list((ROOT / "lstm_fused").glob("_C_cuda*.so")))
    assert set(runtime.available_isas()) <= set(info["isas"]) <= set(ISAS)


def general(isa):
    """The ISA whose code runs what `isa` has no products of its own for."""
    return isa.removesuffix("_bf16").removesuffix("_vnni")


def plans():
    for dtype, isa, sizes, threads in product(DTYPES, ALL_ISAS, SIZES, (1, 2, 5, 64)):
        T, N, I, H, R, D = sizes  # noqa: E741
        projection = R != H
        for training, backward in ((False, False), (True, False), (True, True)):
            case = (dtype, isa, threads, T, N, I, H, R, D, projection, training, backward)
            yield case, _plan.plan(*case)


def fields(plan):
    return {key: getattr(plan, key) for key in dir(plan) if not key.startswith("_")}


def test_plan_invariants():
    for case, plan in plans():
        dtype, isa, threads, T, N, _, H, _, D, projection, _, _ = case
        groups = plan.direction_groups * plan.row_groups * plan.unit_groups
        assert groups == plan.threads <= threads, (case, plan)
        assert min(plan.direction_groups, plan.row_groups, plan.unit_groups) >= 1, (case, plan)
        assert plan.direction_groups <= D and plan.row_groups <= max(N, 1), (case, plan)
        assert plan.unit_groups <= -(-H // 16), (case, plan)
        assert 0 <= plan.hoist_steps <= T, (case, plan)
        assert plan.dtype == dtype
        if plan.kernel == "direct":
            assert T <= 4 and N <= 8 and T * N <= 16 and not projection, (case, plan)
        else:
            assert plan.kernel == "persistent"
        pairs = dtype == "bfloat16" and plan.kernel == "persistent" and isa.endswith("_bf16")
        assert plan.isa == (isa if pairs else general(isa)), (case, plan)


def test_plan_is_pure():
    first = [fields(plan) for _, plan in plans()]
    torch.set_num_threads(1)
    runtime.set_isa(ISAS[0])
    assert first == [fields(plan) for _, plan in plans()]


KNOWN = (
    # T, N, I, H and what is planned for two threads. Short sequences read the weights in place.
    ((1, 1, 64, 64), ALL_ISAS, {"kernel": "direct"}),
    ((1, 1, 1, 1), ALL_ISAS, {"kernel": "direct", "threads": 1}),
    # One row is shared by units, as are many where the weights exceed a cache; else by rows.
    ((100, 1, 256, 256), ALL_ISAS, {"kernel": "persistent", "unit_groups": 2, "row_groups": 1}),
    ((100, 32, 512, 512), ALL_ISAS, {"kernel": "persistent", "unit_groups": 2, "row_groups": 1}),
    ((100, 512, 64, 64), ALL_ISAS, {"kernel": "persistent", "unit_groups": 1, "row_groups": 2}),
    ((100, 512, 64, 16), ALL_ISAS, {"kernel": "persistent", "unit_groups": 1, "row_groups": 2}),
)


@pytest.mark.parametrize(
    "sizes, isa, expected", [(sizes, isa, plan) for sizes, isas, plan in KNOWN for isa in isas]
)
def test_plans_of_known_problems(sizes, isa, expected):
    T, N, I, H = sizes  # noqa: E741
    plan = _plan.plan("float32", isa, 2, T, N, I, H, H, 1)
    assert {key: getattr(plan, key) for key in expected} == expected, str(plan)


def test_plan_of_a_call():
    plan = runtime.plan("lstm", torch.float64, 9, 4, 5, 40, 40, 2)
    lstm_fused.LSTM(5, 40, bidirectional=True, dtype=torch.float64)(torch.rand(9, 4, 5).double())
    run = runtime.last_run()
    assert run.pop("pass") == "forward"
    assert run == fields(plan)
    assert f"{plan.kernel} kernel, {plan.isa}, float64" in str(plan) and str(plan) in repr(plan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cell": "gru5"}, "cell is 'gru5'"),
        ({"dtype": torch.int8}, "dtype is 'int8' but must be one of float32"),
    ],
)
def test_plan_errors(change, message):
    sizes = {"T": 1, "N": 1, "I": 1, "H": 1, "R": 1, "directions": 1}
    with pytest.raises(ValueError, match=message):
        runtime.plan(**{"cell": "lstm", "dtype": "float32"} | sizes | change)


RUN = """
import torch, lstm_fused
from lstm_fused import runtime
with torch.no_grad():
    lstm_fused.LSTM(3, 4)(torch.zeros(9, 2, 3))
print(runtime.last_run()["isa"])
"""


def run_with_isa(isa):
    return subprocess.run(
        [sys.executable, "-c", RUN],
        capture_output=True,
        text=True,
        env=dict(os.environ, LSTM_FUSED_ISA=isa),
        timeout=120,
    )


@pytest.mark.parametrize("isa", [ISAS[0], ""])
def test_isa_from_the_environment(isa):
    found = run_with_isa(isa)
    assert found.returncode == 0, found.stderr
    best = _plan.plan("float32", runtime.available_isas()[-1], 1, 9, 2, 3, 4, 4, 1).isa
    assert found.stdout.strip() == (isa or best)


def test_unknown_isa_in_the_environment():
    found = run_with_isa("avx1024")
    assert found.returncode != 0
    assert f"LSTM_FUSED_ISA is 'avx1024' but must be one of {ISAS[0]}, {ISAS[1]}" in found.stderr


def test_set_isa():
    module, x = lstm_fused.LSTM(3, 4), torch.zeros(9, 2, 3)
    for isa in runtime.available_isas():
        runtime.set_isa(isa)
        module(x)
        assert runtime.last_run()["isa"] == general(isa)
    with pytest.raises(RuntimeError, match=f"isa is 'sse' but must be one of {ISAS[0]}"):
        runtime.set_isa("sse")
    for isa in set(ALL_ISAS) - set(runtime.available_isas()):
        refused = "cannot run" if isa in ISAS else "must be one of"
        with pytest.raises(RuntimeError, match=refused):
            runtime.set_isa(isa)


def test_kernels_include_no_torch():
    headers = re.compile(r"#\s*include\s*[<\"](torch|ATen|c10|caffe2|pybind11|Python)")
    csrc = ROOT / "csrc"
    files = [csrc / "params.h", *(csrc / "cpu").iterdir(), *(csrc / "cells").iterdir()]
    assert len(files) > 10
    assert [f.name for f in files if headers.search(f.read_text())] == []


def test_plan_module_includes_no_torch():
    text = (ROOT / "csrc" / "plan_module" / "module.cpp").read_text()
    assert not re.search(r"#\s*include\s*[<\"](torch|ATen|c10)", text)


ALONE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("numpy", "onnx", "onnxscript", "onnx_ir", "opacus", "pytest"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import torch, lstm_fused
lstm_fused.LSTM(3, 4)(torch.zeros(9, 2, 3))[0].sum().backward()
"""


def test_torch_is_the_only_dependency():
    found = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
