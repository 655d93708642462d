"""Fixtures and settings of all tests. Poison is on: memory that a kernel fails to write is NaN."""

import os
import warnings
from pathlib import Path

os.environ["LSTM_FUSED_POISON"] = "1"  # all are read once, when the first layer runs
os.environ["LSTM_FUSED_FIXED_PLANS"] = "1"  # whatever the machine is and does meanwhile
os.environ.setdefault("LSTM_FUSED_EMULATION_SEED", "1")  # of emulated CUDA threads
# Cells that tests and pages compile are kept here.
os.environ["TORCH_EXTENSIONS_DIR"] = str(Path(__file__).parents[1] / "build" / "extensions")

import pytest
import torch

import lstm_fused.fallback
from lstm_fused import cuda, runtime
from tests.cuda import gpu_check
from tests.helpers import emulated, pairwise
from tests.helpers.cuda_cases import tf32
from tests.helpers.plan_coverage import DEVICES

try:
    from hypothesis import settings
except ImportError:  # not needed by `make gpu-check`
    settings = None

# The default examples are the same on every run; `--hypothesis-profile=search` draws new ones.
if settings:
    settings.register_profile(
        "repeatable", derandomize=True, deadline=None, database=None, max_examples=150
    )
    settings.register_profile("search", deadline=None, max_examples=2000)
    settings.load_profile("repeatable")


# Files that take longest, which begin first, so that no process is alone with one at the end.
LONGEST = (
    *("test_arm64", "test_sanitizers", "test_portability", "test_cuda_build", "test_distribution"),
    *("test_sequences", "test_cells", "test_layer_parity", "test_kernel_paths", "test_autograd"),
    *("test_compile", "test_bench_model", "test_transforms", "test_threads", "test_bench_run"),
)


def pytest_configure(config):
    config.addinivalue_line(
        "filterwarnings", "ignore:LSTM with projections is not supported with oneDNN"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cuda.say_never_run()  # once, before the tests that count warnings
    # A test of a kernel must not pass because the layer fell back to torch.
    config.addinivalue_line("filterwarnings", "error:lstm_fused.* ran through torch")


def pytest_addoption(parser):
    parser.addoption("--every-case", action="store_true", help="none of `full` is left out")


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(config, items):
    pairwise.mark_full(items, config.getoption("--every-case"))
    place = {name: k for k, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """After a kernel's fault no later test in this process could pass."""
    report = yield
    on_cuda = item.get_closest_marker("cuda") and torch.cuda.is_available()
    if report.failed and on_cuda and (said := gpu_check.sticky_fault()):
        pytest.exit(f"a kernel faulted in {item.nodeid}: {said}", gpu_check.FAULT)
    return report


@pytest.fixture
def fake_cuda(monkeypatch):
    from tests.helpers import fake_cuda

    fake_cuda.install(monkeypatch)


@pytest.fixture(autouse=True)
def fixed_defaults():
    """Each test starts with the same seed, one thread, the default ISA and no TF32.

    Small layers are faster on one thread; tests of threads set more. torch allows TF32 in recurrent
    layers by default, whose errors exceed the tolerances of float32.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    runtime.set_isa(None)
    lstm_fused.fallback._warned.clear()
    cuda.set_plan("fused")  # whatever is predicted
    with tf32(False):
        yield


ON_CUDA = [pytest.param(d, marks=pytest.mark.cuda) for d in DEVICES if d != "cpu"]


@pytest.fixture(params=["cpu", *ON_CUDA, "emulated"])
def device(request, monkeypatch):
    """The default device of the test: the CPU, a CUDA device, or the CPU with CUDA's kernels
    emulated. Files whose tests all run on every device use it by their pytestmark.
    """
    if request.param != "emulated":
        yield from on_device(request.param, monkeypatch)
        return
    with emulated.kernels():
        yield request.param


@pytest.fixture(params=["cpu", *ON_CUDA])
def real_device(request, monkeypatch):
    """As `device`, without the emulation: for tests of the code around the kernels."""
    yield from on_device(request.param, monkeypatch)


def on_device(device, monkeypatch):
    """The body of a fixture that makes `device` the default device.

    On CUDA torch.nn runs without cuDNN, which draws its own dropout masks, warns of replaced
    weights, and has neither a backward pass in evaluation mode nor second derivatives.
    """
    if device == "cpu":
        yield device
        return
    last_run = runtime.last_run
    monkeypatch.setattr(runtime, "last_run", lambda device=device: last_run(device))
    with torch.device(device), tf32(False, cudnn=False):
        yield device
