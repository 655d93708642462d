"""How many Python functions lie between a module's call and the operator, forward and backward."""

import sys

import pytest
import torch

import lstm_fused
from lstm_fused import _C, autograd, inference, ops
from tests.helpers.compare_modules import states_of

MODULES = [lstm_fused.LSTM, lstm_fused.GRU, lstm_fused.RNN]


@pytest.fixture
def depths(monkeypatch):
    """The Python functions from which each operator was called, outermost first, by operator."""
    found = {}

    def observed(name, operator):
        def call(*args):
            frame, names = sys._getframe(1), []
            while "lstm_fused" in frame.f_code.co_filename:
                names.append(frame.f_code.co_name)
                frame = frame.f_back
                if frame.f_code.co_filename == __file__:
                    break
            found[name] = names[::-1]
            return operator(*args)

        return call

    monkeypatch.setattr(autograd, "forward_op", observed("forward", autograd.forward_op))
    monkeypatch.setattr(autograd, "backward_op", observed("backward", autograd.backward_op))
    monkeypatch.setattr(ops, "forward_op", observed("no gradient", ops.forward_op))
    monkeypatch.setattr(inference, "_C", type("", (), {"infer": observed("infer", _C.infer)}))
    return found


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("layers", [1, 2])
def test_call_depth(module, layers, depths):
    layer = module(3, 4, layers)
    y, hx = layer(torch.randn(5, 2, 3))
    (y.sum() + sum(s.sum() for s in states_of(hx))).backward()
    assert depths["forward"] == ["forward", "_run", "layer", "forward"]
    assert depths["backward"] == ["backward"]
    with torch.no_grad():
        layer(torch.randn(5, 2, 3))
    assert depths["infer"] == ["forward", "infer"]
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        layer(torch.randn(5, 2, 3))
    assert depths["no gradient"] == ["forward", "_run", "_run_autocast", "_run", "layer"]
