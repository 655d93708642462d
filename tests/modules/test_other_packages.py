"""Layers of torchrecurrent, sru and haste beside ours with their weights: outputs and gradients."""

import json
import types
from pathlib import Path

import pytest
import torch

from lstm_fused import cells, loading
from lstm_fused.testing import oracle, parity

DATA = Path(__file__).parents[1] / "data"
HASTE, SRU = (json.loads((DATA / f"{name}_layers.json").read_text()) for name in ("haste", "sru"))


def results_of(module, x, dtype=None):
    """y, the last h and c and the gradient of x by their names in parity tests; the parameters."""
    x = x.to(dtype or x.dtype).requires_grad_()
    y, state = module(x)
    (y * torch.linspace(-1, 1, y.shape[-1], dtype=y.dtype)).sum().backward()
    states = state if isinstance(state, tuple) else (state,)
    found = {"y": y, **dict(zip(("h_n", "c_n"), states, strict=False)), "d_x": x.grad}
    return found, dict(module.named_parameters())


def assert_equal(theirs, ours, x, names):
    """Ours may be off from theirs in float64 by twice what theirs is.

    names: from a parameter of ours to that of theirs with the same gradient, up to its shape.
    """
    exact, exact_weights = results_of(oracle.in_float64(theirs), x, torch.float64)
    baseline, weights = results_of(theirs, x.clone())
    found, own = results_of(ours, x.clone())
    for name, other in names.items():
        shape, key = own[name].shape, f"d_{'bias' if 'bias' in name else 'weight'}_{name}"
        found[key] = own[name].grad
        baseline[key] = weights[other].grad.reshape(shape)
        exact[key] = exact_weights[other].grad.reshape(shape)
    verdict = parity.worst(parity.compare(found, baseline, exact))
    assert verdict.ok, verdict


@pytest.mark.parametrize("layers", (1, 2))
@pytest.mark.parametrize("kind", ("PeepholeLSTM", "MGU", "IndRNN"))
def test_torchrecurrent(kind, layers):
    package = pytest.importorskip("torchrecurrent")
    theirs = getattr(package, kind)(5, 16, num_layers=layers)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    ours = loading.from_torchrecurrent(theirs)
    renamed = {"weight_u": "vector_u"}
    names = {}
    for name in dict(ours.named_parameters()):
        kind_of_weight, _, k = name.rpartition("_l")
        names[name] = f"cells.{k}.{renamed.get(kind_of_weight, kind_of_weight)}"
    assert_equal(theirs, ours, torch.randn(7, 3, 5), names)


def assert_equal_to_arrays(ours, case):
    """Ours beside what theirs computed in float64; the arrays have the names of results_of."""
    exact = {key: torch.tensor(a, dtype=torch.float64) for key, a in case["arrays"].items()}
    found, _ = results_of(ours, exact.pop("x"))
    assert exact.keys() == found.keys()
    for key, expected in exact.items():
        torch.testing.assert_close(found[key], expected, rtol=1e-12, atol=1e-12)


def weights_of(case):
    return {key: torch.tensor(w, dtype=torch.float64) for key, w in case["weights"].items()}


@pytest.mark.parametrize("name", HASTE)
def test_haste(name):
    """data/haste_layers.py made the arrays by haste's own Python."""
    case = HASTE[name]
    sizes = {"input_size": 3, "hidden_size": 4, "batch_first": False}
    theirs = type(name.partition(" ")[0], (types.SimpleNamespace,), {})
    ours = loading.from_haste(theirs(**weights_of(case), **sizes, **case["options"]))
    assert_equal_to_arrays(ours.eval(), case)


@pytest.mark.parametrize("name", SRU)
def test_sru(name):
    """Their weight has the blocks of a unit side by side."""
    weights = weights_of(SRU[name])
    inputs, H = len(weights["weight"]), len(weights["weight_c"]) // 2
    ours = cells.SRU(inputs, H, dtype=torch.float64)
    with torch.no_grad():
        blocks = weights["weight"].view(inputs, H, -1)
        ours.weight_ih_l0.copy_(blocks.permute(2, 1, 0).flatten(0, 1))
        ours.weight_c_l0.copy_(weights["weight_c"].view(2, H))
        ours.bias_ih_l0.copy_(weights["bias"])
    assert_equal_to_arrays(ours, SRU[name])
