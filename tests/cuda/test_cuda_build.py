"""The CUDA library as built: its symbols, its registers, and loading where torch has no CUDA."""

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lstm_fused import cuda, runtime
from tests.helpers import cubins, sass
from tests.helpers.cubins import LIBRARY
from tests.kernels.test_build import NEED_NM, SHIM, TORCH, UNSTABLE, symbols

ROOT = Path(__file__).parents[2]
NEED_NVCC = pytest.mark.skipif(cubins.NVCC is None, reason="nvcc is not installed")
NEED_LIBRARY = pytest.mark.skipif(LIBRARY is None, reason="built without nvcc")
CELLS = ("Lstm", "Gru", "RnnTanh", "RnnRelu")
PASSES = ("forward", "backward")


@pytest.mark.full  # `make test` builds with LSTM_FUSED_CUDA=0
@NEED_NVCC
def test_built_with_nvcc():
    assert LIBRARY is not None and runtime.build_info()["cuda"]


@pytest.mark.full
@NEED_LIBRARY
@NEED_NM
def test_uses_the_stable_interface_only():
    undefined = [name for _, name in symbols(LIBRARY, "--dynamic", "--undefined-only")]
    assert not [name for name in undefined if UNSTABLE.search(name)]
    torchs = [name for name in undefined if TORCH.search(name)]
    assert torchs and all(SHIM.match(name) for name in torchs)
    # The CUDA runtime is linked statically: the library depends on no version of it.
    assert not [name for name in undefined if name.startswith("cuda")]


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_stays_unloaded_without_cuda():
    assert not cuda.available()
    assert not hasattr(torch.ops.lstm_fused, "cuda_force_plan")
    assert cuda.unsupported_reason(torch.device("cuda", 0)) == "torch has no CUDA"


@pytest.fixture(scope="module")
def compiled(request, tmp_path_factory):
    """Futures of cubins.machine_code, by its arguments, for the tests that were selected; as many
    at a time as there are processors."""
    folder = tmp_path_factory.mktemp("cubins")
    params = [item.callspec.params for item in request.session.items if is_of_code(item)]
    selected = {(p["source"], p["arch"]) for p in params}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {pair: pool.submit(cubins.machine_code, *pair, folder) for pair in sorted(selected)}


def is_of_code(item):
    names = (test_no_spills.__name__, test_loop_over_the_steps.__name__)
    return getattr(item, "originalname", None) in names


def compilations(names=None):
    """Each source for each architecture; all but one that compiles fast are `full`."""
    for source, arch in cubins.pairs(names):
        marks = () if (source.stem, arch) == cubins.QUICKEST else pytest.mark.full
        yield pytest.param(source, arch, id=f"{source.stem}-{arch}", marks=marks)


@NEED_NVCC
@pytest.mark.parametrize(("source", "arch"), list(compilations()))
def test_no_spills(source, arch, compiled):
    """No kernel keeps registers in local memory, and each fits its SM as the plan says."""
    code, said, _ = compiled[source, arch].result()
    assert code == 0, said
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", said)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
    assert len(spills) == len(registers) >= 4
    assert set(spills) == {("0", "0")}, said
    assert max(registers) <= 255


@NEED_NVCC
@pytest.mark.skipif(sass.find_cuobjdump() is None, reason="cuobjdump is not installed")
@pytest.mark.parametrize(("source", "arch"), list(compilations(cubins.PERSISTENT)))
def test_loop_over_the_steps(source, arch, compiled):
    """No persistent kernel has more fences, integer divisions, loads that are waited for before the
    barrier, or instructions in its loop than when the table was written:
    `python -m tests.helpers.sass --write`."""
    table = json.loads(sass.LIMITS.read_text())
    if (release := cubins.nvcc_release()) != table["nvcc"]:
        pytest.skip(f"the table is of nvcc {table['nvcc']}, this is {release}")
    assert table["numbers"] == list(sass.LIMITED)
    code, said, file = compiled[source, arch].result()
    assert code == 0, said
    found = sass.largest_numbers(file, arch)
    assert len(found) == len(CELLS) * len(PASSES) * len(sass.persistent_plans(arch))
    exceeding = {
        kernel: (numbers, table["kernels"].get(kernel))
        for kernel, numbers in found.items()
        if not within(numbers, table["kernels"].get(kernel))
    }
    assert not exceeding


def within(numbers, limits):
    return limits is not None and all(n <= limit for n, limit in zip(numbers, limits, strict=True))


def test_kernels_include_no_torch():
    headers = re.compile(r"#\s*include\s*[<\"](torch|ATen|c10|pybind11|Python|\.\./torch)")
    folder = ROOT / "csrc" / "cuda"
    found = {f.name for f in folder.rglob("*.*") if headers.search(f.read_text())}
    assert not found
