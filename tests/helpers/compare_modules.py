"""Builds a torch.nn module and the fused one from the same seed, calls both and compares them.

Sizes are T, N, I, H; L layers, D directions, R proj_size or else H. A cell is named as in
oracle.CELLS; where no cell is named, it is "lstm". hx is what a module takes, (h_0, c_0) or h_0.
"""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import TorchDispatchMode

import lstm_fused
from lstm_fused import ops, runtime
from lstm_fused.recurrent import Recurrent
from lstm_fused.testing import tolerance
from tests.helpers.oracle import CELLS, has_cell_state

I, H, T, N = 4, 6, 5, 3  # noqa: E741
OPTIONS = {
    "plain": {},
    "two layers": {"num_layers": 2},
    "all": {"num_layers": 2, "bidirectional": True, "proj_size": 3, "batch_first": True},
    "no bias": {"bias": False, "bidirectional": True},
}
each_cell = pytest.mark.parametrize("cell", CELLS)


def fitting(cell, options):
    """options, without a projection where the cell has none."""
    return {k: v for k, v in options.items() if k != "proj_size" or has_cell_state(cell)}


each_option = pytest.mark.parametrize(
    "cell, options",
    [
        pytest.param(cell, fitting(cell, options), id=f"{cell} {name}")
        for cell in CELLS
        for name, options in OPTIONS.items()
    ],
)


def pair(*sizes, cell="lstm", **options):
    """torch.nn's module and the fused one, each built from the same seed."""
    name, more = CELLS[cell]
    modules = []
    for library in (nn, lstm_fused):
        torch.manual_seed(1)
        given = {"dtype": torch.float64} | more | options
        modules.append(getattr(library, name)(*(sizes or (I, H)), **given))
    return modules


def ones(*shape):
    """float64 ones on the default device; to be called inside of a test, which sets that device."""
    return torch.ones(*shape, dtype=torch.float64)


def autocast(dtype):
    """Autocast of the default device."""
    return torch.autocast(torch.get_default_device().type, dtype)


def outcome(call, *args):
    """The result of a call, or the type and message of its exception."""
    try:
        return call(*args)
    except Exception as error:
        return type(error), str(error)


def draw(*shape, dtype=torch.float64, grad=True):
    return torch.randn(*shape, dtype=dtype, requires_grad=grad)


def state_for(module, rows, dtype=torch.float64):
    """h_0 (L*D, rows, R), with c_0 (L*D, rows, H) if there is one; without rows if None."""
    layers = module.num_layers * (2 if module.bidirectional else 1)
    batch = () if rows is None else (rows,)
    widths = module.proj_size or module.hidden_size, module.hidden_size
    states = [draw(layers, *batch, width, dtype=dtype) for width in widths]
    return tuple(states) if module.mode == "LSTM" else states[0]


def states_of(hx):
    """hx as a tuple of states, empty for None."""
    return () if hx is None else (hx,) if isinstance(hx, torch.Tensor) else tuple(hx)


def changed(change, hx):
    """hx with change made to each of its states; None for None."""
    states = tuple(change(s) for s in states_of(hx))
    return hx if hx is None else states[0] if isinstance(hx, torch.Tensor) else states


def tensors_of(result):
    y, ends = result
    y = y.data if isinstance(y, PackedSequence) else y
    return {"y": y, **dict(zip(("h_n", "c_n"), states_of(ends), strict=False))}


def run(module, input, hx=None, **more):
    """Outputs and gradients, of the parameters, the input and hx, by name; seeded for dropout."""
    torch.manual_seed(2)
    data = input.data if isinstance(input, PackedSequence) else input
    found = tensors_of(module(input, hx, **more))
    if isinstance(module, Recurrent) and data.numel():
        assert runtime.last_run()["pass"] == "forward"
    given = [("x", data), *zip(("h0", "c0"), states_of(hx), strict=False)]
    given += module.named_parameters()
    leaves = {name: t for name, t in given if t.requires_grad}
    if not leaves or not torch.is_grad_enabled():
        return found
    outputs = [t for t in found.values() if t.requires_grad]
    weights = [torch.linspace(-1, 1, t.numel()).to(t.dtype).view_as(t) for t in outputs]
    grads = torch.autograd.grad(outputs, list(leaves.values()), weights, allow_unused=True)
    if isinstance(module, Recurrent) and data.numel():
        assert runtime.last_run()["pass"] == "backward"
    return found | {f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def assert_same(theirs, ours, *args, **more):
    """Assert that both give the same outputs and gradients; returns those of ours."""
    expected, found = run(theirs, *args, **more), run(ours, *args, **more)
    torch.testing.assert_close(found, expected)
    for name in expected.keys() & {"y", "h_n", "c_n"}:
        assert found[name].stride() == expected[name].stride(), name
        assert found[name].requires_grad == expected[name].requires_grad, name
    return found


def assert_accurate(found, expected, exact, dtype):
    """Assert the project's tolerance: at most twice torch's own error, plus a floor."""
    assert found.keys() == expected.keys()
    for name, truth in exact.items():
        assert found[name].dtype == expected[name].dtype, name
        error, torch_error = (
            (each[name].double() - truth).abs().max().item() for each in (found, expected)
        )
        limit = tolerance.allowed(name, dtype, torch_error, truth.abs().max().item())
        assert error <= limit, name


# Wrong arguments of ops.layer, and the whole message of the error.
LAYER_ERRORS = {
    "2-D": ({"x": torch.zeros(3, 2)}, "x has shape (3, 2) but must be (T, N, I)"),
    "integers": (
        {"x": torch.zeros(3, 2, 4).int()},
        "x must be float32, float64, bfloat16 or float16",
    ),
    "no step": ({"x": torch.zeros(0, 2, 4)}, "x must have at least one time step"),
    "no input": (
        {"x": torch.zeros(3, 2, 0), "w_ih": torch.zeros(20, 0)},
        "I, H and R must be at least 1",
    ),
    "w_hh": (
        {"w_hh": torch.zeros(20, 4)},
        "w_hh has shape (20, 4): without a projection it must be (4 * H, H)",
    ),
    "gates": ({"w_hh": torch.zeros(19, 5)}, "w_hh has shape (19, 5) but must be (4 * H, R)"),
    "weight dtype": (
        {"w_hh": torch.zeros(20, 5).double()},
        "every weight must have the dtype of x",
    ),
    "w_ih": ({"w_ih": torch.zeros(20, 3)}, "w_ih has shape (20, 3) but must be (20, 4)"),
    "one state": (
        {"state0": (torch.zeros(1, 2, 5),)},
        "state0 must hold h0 and c0 or nothing",
    ),
    "c0": (
        {"state0": (torch.zeros(1, 2, 5), torch.zeros(1, 2, 4))},
        "c0 has shape (1, 2, 4) but must be (1, 2, 5)",
    ),
    "packed 3-D": (
        {"batch_sizes": torch.tensor([2, 1])},
        "packed x has shape (3, 2, 4) but must be (S, I)",
    ),
} | {
    f"batch_sizes {name}": (
        {"x": torch.zeros(3, 4), "batch_sizes": torch.tensor(sizes, dtype=torch.int64)},
        message,
    )
    for name, sizes, message in (
        ("grow", [1, 2], "batch_sizes must be positive and must not grow"),
        ("zero", [2, 0, 1], "batch_sizes must be positive and must not grow"),
        ("sum", [2, 2], "batch_sizes add up to 4 but x has 3 rows"),
        ("empty", [], "batch_sizes must not be empty"),
    )
}


def assert_layer_raises(change, message):
    given = {
        "x": torch.zeros(3, 2, 4),
        "batch_sizes": None,
        "state0": (),
        "w_ih": torch.zeros(20, 4),
        "w_hh": torch.zeros(20, 5),
    } | change
    with pytest.raises(RuntimeError) as error:
        ops.layer(given["x"], given["batch_sizes"], given["state0"], (given["w_ih"], given["w_hh"]))
    assert str(error.value) == message


# Single-step cells by name.
STEPS = {
    "lstm": lstm_fused.LSTMCell,
    "gru": lstm_fused.GRUCell,
    "tanh": lstm_fused.RNNCell,
    "relu": lambda *sizes, **options: lstm_fused.RNNCell(*sizes, nonlinearity="relu", **options),
}


class Watching(TorchDispatchMode):
    """A mode that observes each call; seen: the names of the operators."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen = getattr(self, "seen", set()) | {str(func)}
        return func(*args, **(kwargs or {}))
