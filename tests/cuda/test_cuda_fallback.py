"""Devices that the CUDA kernels cannot run on: layers run through torch, and say why once."""

import warnings
from types import SimpleNamespace

import pytest
import torch

import lstm_fused
from lstm_fused import cuda, fallback, inference

DEVICE = torch.device("cuda", 0)
FAILURES = (
    "lstm_fused, device: CUDA driver version is insufficient for CUDA runtime version",
    "lstm_fused, device: no kernel image is available for execution on the device",
    "lstm_fused: torch came without cuBLAS of CUDA 12 or later",
)


class Operators:
    """The operators beside a device: they say what its properties are, or fail."""

    def __init__(self, properties):
        self.properties = properties
        self.calls = 0

    def cuda_device_properties(self, index):
        self.calls += 1
        if isinstance(self.properties, str):
            raise RuntimeError(self.properties + "\nException raised from somewhere")
        return list(self.properties)


@pytest.fixture
def device_of(monkeypatch):
    """A function that makes the device one of these properties, or one that fails so."""

    def install(properties):
        operators = Operators(properties)
        monkeypatch.setattr(cuda, "operators", operators)
        cuda._read_device.cache_clear()
        return operators

    monkeypatch.setattr(cuda, "absence_reason", lambda: None)
    yield install
    cuda._read_device.cache_clear()


@pytest.mark.parametrize("failure", FAILURES)
def test_device_that_fails(device_of, failure):
    """The device is asked once, and each call has the same reason."""
    operators = device_of(failure)
    x = SimpleNamespace(is_cpu=False, device=DEVICE)
    reasons = {fallback.fallback_reason(x, None, ()) for _ in range(3)}
    assert reasons == {f"the input is on cuda:0: the fused kernels cannot run on it: {failure}"}
    assert operators.calls == 1
    with pytest.raises(RuntimeError, match=failure):
        cuda.device_properties(0)


def test_one_warning(device_of, monkeypatch):
    device_of(FAILURES[0])
    monkeypatch.setattr(inference, "infer", lambda module, input, hx: None)  # the CPU's
    module = lstm_fused.LSTM(3, 4)
    module._fallback_reason = lambda x, hx, weights: fallback._device_reason(DEVICE)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(3):
            y, _ = module(torch.zeros(2, 5, 3))
    assert y.shape == (2, 5, 4)
    assert [FAILURES[0] in str(w.message) for w in warned] == [True]


def test_old_device(device_of):
    device_of((7, 5, 40, 64 << 10, 1, 0))
    assert cuda.unsupported_reason(DEVICE) == (
        "the fused kernels need compute capability 8.0 or later, not 7.5"
    )
    device_of((9, 0, 132, 227 << 10, 16, 8))
    assert cuda.unsupported_reason(DEVICE) is None
