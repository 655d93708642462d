"""Poison is on in every test: what a kernel should write and does not comes out as NaN."""

import os
import warnings

os.environ["LSTM_FUSED_POISON"] = "1"  # read once, when the first layer runs

import pytest
import torch

import lstm_fused.fallback
from lstm_fused import cuda, runtime
from tests.helpers import emulated, pairwise
from tests.helpers.cuda_cases import tf32
from tests.helpers.plan_coverage import DEVICES

try:
    from hypothesis import settings
except ImportError:  # `make gpu-check` does without
    settings = None

# `--hypothesis-profile=search` looks further than the examples that everybody runs.
if settings:
    settings.register_profile(
        "repeatable", derandomize=True, deadline=None, database=None, max_examples=150
    )
    settings.register_profile("search", deadline=None, max_examples=2000)
    settings.load_profile("repeatable")


def pytest_configure(config):
    config.addinivalue_line(
        "filterwarnings", "ignore:LSTM with projections is not supported with oneDNN"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cuda.say_never_run()  # said before the tests that count warnings
    # A test that means to run a kernel must not pass because torch stood in.
    config.addinivalue_line("filterwarnings", "error:lstm_fused.* ran through torch")


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items):
    pairwise.mark_full(items)


@pytest.fixture
def fake_cuda(monkeypatch):
    from tests.helpers import fake_cuda

    fake_cuda.install(monkeypatch)


@pytest.fixture(autouse=True)
def fixed_defaults():
    """Each test starts from one seed, one thread, the ISA that the machine would choose, no TF32.

    Small layers are run faster by one thread; tests of sharing work out ask for more. torch lets
    recurrent layers have TF32 unless told otherwise, which no tolerance of float32 allows for.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    runtime.set_isa(None)
    lstm_fused.fallback._warned.clear()
    with tf32(False):
        yield


ON_CUDA = [pytest.param(d, marks=pytest.mark.cuda) for d in DEVICES if d != "cpu"]


@pytest.fixture(params=["cpu", *ON_CUDA, "emulated"])
def device(request, monkeypatch):
    """Where the test runs: what it makes lies on that device, or on the CPU for CUDA's kernels
    emulated there. Files whose every test runs everywhere use it by their pytestmark.
    """
    if request.param != "emulated":
        yield from on_device(request.param, monkeypatch)
        return
    with emulated.kernels():
        yield request.param


@pytest.fixture(params=["cpu", *ON_CUDA])
def real_device(request, monkeypatch):
    """As `device`, without the emulation: for what lies around the kernels."""
    yield from on_device(request.param, monkeypatch)


def on_device(device, monkeypatch):
    """The rest of a fixture that gives a device and has the test's tensors made there.

    On CUDA torch.nn does without cuDNN, which draws dropout masks of its own, warns of weights that
    were exchanged, and has no backward pass in evaluation mode, nor a second one in any.
    """
    if device == "cpu":
        yield device
        return
    last_run = runtime.last_run
    monkeypatch.setattr(runtime, "last_run", lambda device=device: last_run(device))
    with torch.device(device), tf32(False, cudnn=False):
        yield device
