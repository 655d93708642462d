"""How many Python functions lie between a module's call and C++, forward and backward."""

import sys
from pathlib import Path

import pytest
import torch

import lstm_fused
from lstm_fused import _C, ops
from tests.helpers.compare_modules import states_of

PACKAGE = str(Path(lstm_fused.__file__).parent)
MODULES = [lstm_fused.LSTM, lstm_fused.GRU, lstm_fused.RNN]


@pytest.fixture
def depths(monkeypatch):
    """The Python functions from which each function of C++ was called, outermost first, by name."""
    found = {}

    def observed(name, function):
        def call(*args):
            frame, names = sys._getframe(1), []
            while frame.f_code.co_filename.startswith(PACKAGE):
                names.append(frame.f_code.co_name)
                frame = frame.f_back
                if frame.f_code.co_filename == __file__:
                    break
            found[name] = names[::-1]
            return function(*args)

        return call

    for name in ("infer", "forward", "backward"):
        monkeypatch.setattr(_C, name, observed(name, getattr(_C, name)))
    monkeypatch.setattr(ops, "forward_op", observed("no gradient", ops.forward_op))
    return found


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("layers", [1, 2])
def test_call_depth(module, layers, depths):
    layer = module(3, 4, layers)
    y, hx = layer(torch.randn(5, 2, 3))
    (y.sum() + sum(s.sum() for s in states_of(hx))).backward()
    assert depths["infer"] == ["forward", "infer"]
    recorded = ["forward", "_forward_recorded", "_run", "layer", "forward", "forward"]
    assert depths["forward"] == recorded
    assert depths["backward"] == ["backward", "_gradients_in_eager_mode"]
    with torch.no_grad():
        layer(torch.randn(5, 2, 3))
    assert depths["infer"] == ["forward", "infer"]
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        layer(torch.randn(5, 2, 3))
    assert depths["no gradient"] == ["forward", "_run", "_run_autocast", "_run", "layer"]


@pytest.mark.parametrize("cell", [lstm_fused.LSTMCell, lstm_fused.GRUCell, lstm_fused.RNNCell])
def test_call_depth_of_a_cell(cell, depths):
    states_of(cell(3, 4)(torch.randn(2, 3)))[0].sum().backward()
    assert depths["infer"] == ["forward", "infer_step"]
    assert depths["forward"] == ["forward", "step", "forward", "forward_step"]
    assert depths["backward"] == ["backward"]
