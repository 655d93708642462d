"""torch.nn.LSTM and lstm_fused.LSTM made alike, called alike and compared.

Sizes are T, N, I, H; L layers, D directions, R proj_size or else H.
"""

import pytest
import tolerance
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import lstm_fused
from lstm_fused import ops

I, H, T, N = 4, 6, 5, 3  # noqa: E741
OPTIONS = {
    "plain": {},
    "two layers": {"num_layers": 2},
    "all": {"num_layers": 2, "bidirectional": True, "proj_size": 3, "batch_first": True},
    "no bias": {"bias": False, "bidirectional": True},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def pair(*sizes, **options):
    """A torch.nn.LSTM and a fused one, each built from the same seed."""
    modules = []
    for kind in (nn.LSTM, lstm_fused.LSTM):
        torch.manual_seed(1)
        modules.append(kind(*(sizes or (I, H)), **{"dtype": torch.float64} | options))
    return modules


def draw(*shape, dtype=torch.float64, grad=True):
    return torch.randn(*shape, dtype=dtype, requires_grad=grad)


def state_for(module, rows, dtype=torch.float64):
    """(h_0 (L*D, rows, R), c_0 (L*D, rows, H)); without rows if None."""
    layers = module.num_layers * (2 if module.bidirectional else 1)
    batch = () if rows is None else (rows,)
    widths = module.proj_size or module.hidden_size, module.hidden_size
    return tuple(draw(layers, *batch, width, dtype=dtype) for width in widths)


def tensors_of(result):
    y, (h_n, c_n) = result
    return {"y": y.data if isinstance(y, PackedSequence) else y, "h_n": h_n, "c_n": c_n}


def run(module, input, hx=None, **more):
    """Outputs and gradients, of the parameters, the input and hx, by name; seeded for dropout."""
    torch.manual_seed(2)
    data = input.data if isinstance(input, PackedSequence) else input
    found = tensors_of(module(input, hx, **more))
    if isinstance(module, lstm_fused.LSTM) and data.numel():
        assert ops.last_run()["pass"] == "forward"
    given = [
        ("x", data),
        *zip(("h0", "c0"), hx or (None, None), strict=True),
        *module.named_parameters(),
    ]
    leaves = {name: t for name, t in given if t is not None and t.requires_grad}
    if not leaves or not torch.is_grad_enabled():
        return found
    outputs = [t for t in found.values() if t.requires_grad]
    weights = [torch.linspace(-1, 1, t.numel()).to(t.dtype).view_as(t) for t in outputs]
    grads = torch.autograd.grad(outputs, list(leaves.values()), weights, allow_unused=True)
    if isinstance(module, lstm_fused.LSTM) and data.numel():
        assert ops.last_run()["pass"] == "backward"
    return found | {f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def assert_same(theirs, ours, *args, **more):
    """Both give the same outputs and gradients; returns ours."""
    expected, found = run(theirs, *args, **more), run(ours, *args, **more)
    torch.testing.assert_close(found, expected)
    for name in ("y", "h_n", "c_n"):
        assert found[name].stride() == expected[name].stride(), name
        assert found[name].requires_grad == expected[name].requires_grad, name
    return found


def assert_accurate(found, expected, exact, dtype):
    """The project's rule: at most twice torch's own error, and a floor."""
    assert found.keys() == expected.keys()
    for name, truth in exact.items():
        assert found[name].dtype == expected[name].dtype, name
        error, torch_error = (
            (each[name].double() - truth).abs().max().item() for each in (found, expected)
        )
        limit = tolerance.allowed(name, dtype, torch_error, truth.abs().max().item())
        assert error <= limit, name
