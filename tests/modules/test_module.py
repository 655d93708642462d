"""Modules are constructed, copied, changed, moved and subclassed as torch.nn's are."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence

import lstm_fused
from lstm_fused.fallback import CALLED_BY_TORCH
from tests.helpers.compare_modules import (
    H,
    I,
    N,
    T,
    assert_accurate,
    assert_same,
    changed,
    draw,
    each_cell,
    each_option,
    ones,
    pair,
    run,
    state_for,
    tensors_of,
)
from tests.helpers.oracle import CELLS

pytestmark = pytest.mark.usefixtures("device")

ARGUMENTS = [
    ((3, 4), {}),
    ((3, 4, 2, False, True, 0.25, True, 2), {}),
    ((3, 4), {"num_layers": 2, "dropout": 1}),
    ((3, 4), {"dropout": 0.5}),
    ((3,), {}),
    ((3, 4), {"nonlinearity": "relu"}),
    ((3, 4), {"nonlinearity": "sigmoid"}),
    ((3, 4, 2, "relu", False, True, 0.25, True), {}),
    ((3, 4), {"mode": "GRU"}),
    ((3.0, 4), {}),
    ((3, "4"), {}),
    ((0, 4), {}),
    ((3, -1), {}),
    ((3, 4), {"num_layers": 0}),
    ((3, 4), {"dropout": 1.5}),
    ((3, 4), {"dropout": True}),
    ((3, 4), {"proj_size": -1}),
    ((3, 4), {"proj_size": 4}),
]


each_name = pytest.mark.parametrize("name", dict.fromkeys(name for name, _ in CELLS.values()))


@each_name
@pytest.mark.parametrize("args, options", ARGUMENTS)
def test_constructor(name, args, options):
    """The same module, or the same exception; the same warnings."""
    made = []
    for library in (nn, lstm_fused):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                result = repr(getattr(library, name)(*args, **options))
            except Exception as error:
                result = type(error), str(error)
        made.append((result, [(w.category, str(w.message), w.filename) for w in caught]))
    assert made[0] == made[1]


@each_name
def test_dropout_of_one_layer_warns(name):
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
        getattr(lstm_fused, name)(I, H, dropout=0.5)


@each_option
def test_same_parameters_and_state_dict(cell, options):
    theirs, ours = pair(cell=cell, **options)
    expected, found = theirs.state_dict(), ours.state_dict()
    assert list(found) == list(expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    more = CELLS[cell][1] | options
    for source, kind in ((theirs, type(ours)), (ours, type(theirs))):
        other = kind(I, H, dtype=torch.float64, **more)
        assert str(other.load_state_dict(source.state_dict(), strict=True)) == (
            "<All keys matched successfully>"
        )
    for mine, yours in zip(ours.all_weights, theirs.all_weights, strict=True):
        assert all(map(torch.equal, mine, yours))
    assert ours.all_weights[0][0] is ours.weight_ih_l0
    assert isinstance(ours, type(theirs))
    assert ours.flatten_parameters() is None
    for module in (theirs, ours):
        torch.manual_seed(3)
        module.reset_parameters()
    assert_same(theirs, ours, draw(T, N, I))


def through_torch_save(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "torch.save": through_torch_save,
}


@each_option
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies(cell, options, copied):
    theirs, ours = pair(cell=cell, **options)
    ours(draw(T, N, I))
    twin = copied(ours)
    assert type(twin) is type(ours)
    assert repr(twin) == repr(ours)
    assert_same(theirs, twin, draw(T, N, I))


class Doubled(nn.Module):
    def forward(self, w):
        return 2 * w


def step(module, optimizer):
    optimizer(module.parameters(), lr=0.1).zero_grad()
    module(ones(T, N, I))[0].square().sum().backward()
    optimizer(module.parameters(), lr=0.1).step()


def assign(module, name, value):
    setattr(module, name, value)


def under_no_grad(change):
    def changed(module):
        with torch.no_grad():
            change(module)

    return changed


def scaled(module):
    return {name: 2 * w for name, w in module.state_dict().items()}


def parametrize_then_write(module):
    parametrize.register_parametrization(module, "weight_hh_l0", Doubled())
    module(ones(T, N, I))
    module.parametrizations.weight_hh_l0.original.data.mul_(2)


def prune_and_settle(module):
    prune.random_unstructured(module, "weight_ih_l0", amount=0.5)
    module(ones(T, N, I))
    prune.remove(module, "weight_ih_l0")


def freeze_and_scale(module):
    module.weight_hh_l0.requires_grad_(False).mul_(2)
    module.bias_ih_l1.requires_grad_(False)


CHANGES = {
    ".data write": lambda m: m.weight_hh_l0.data.mul_(2),
    ".data assigned": lambda m: assign(m.bias_hh_l1, "data", m.bias_hh_l1.data + 1),
    ".data transposed": lambda m: assign(m.weight_hh_l0, "data", m.weight_ih_l1.data.mT.clone().mT),
    "copy_": under_no_grad(lambda m: m.weight_ih_l1.copy_(m.weight_hh_l1)),
    "new Parameter": lambda m: assign(m, "weight_hh_l0", nn.Parameter(2 * m.weight_hh_l0.detach())),
    "shared": lambda m: assign(m, "weight_hh_l1", m.weight_hh_l0),
    "shared in a layer": lambda m: assign(m, "bias_hh_l0", m.bias_ih_l0),
    "load_state_dict": lambda m: m.load_state_dict(scaled(m)),
    "load_state_dict assign": lambda m: m.load_state_dict(scaled(m), assign=True),
    "SGD": lambda m: step(m, torch.optim.SGD),
    "Adam": lambda m: step(m, torch.optim.Adam),
    "parametrization": parametrize_then_write,
    "weight_norm": lambda m: (
        parametrizations.weight_norm(m, "weight_hh_l0")
        .parametrizations["weight_hh_l0"]
        .original0.data.mul_(2)
    ),
    "orthogonal": lambda m: parametrizations.orthogonal(m, "weight_hh_l1"),
    "pruned": lambda m: prune.l1_unstructured(m, "weight_hh_l0", amount=0.5),
    "pruned for good": prune_and_settle,
    "frozen in part": freeze_and_scale,
    "double and back": lambda m: m.half().double(),
    "reset": lambda m: m.reset_parameters(),
}


@pytest.mark.covering
@each_cell
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_take_effect(change, cell):
    theirs, ours = pair(num_layers=2, cell=cell)
    x, state = draw(T, N, I), state_for(ours, N)
    before = assert_same(theirs, ours, x, state)
    for module in (theirs, ours):
        torch.manual_seed(4)
        change(module)
    after = assert_same(theirs, ours, x, state)
    assert not torch.equal(after["y"], before["y"])
    assert list(ours.state_dict()) == list(theirs.state_dict())


@each_cell
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_old_weight_norm(cell):
    theirs, ours = (nn.utils.weight_norm(m, "weight_hh_l0") for m in pair(cell=cell))
    assert_same(theirs, ours, draw(T, N, I))
    ours.weight_hh_l0_g.data.mul_(2)
    theirs.weight_hh_l0_g.data.mul_(2)
    assert_same(theirs, ours, draw(T, N, I))


@each_cell
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.float16, torch.float32))
def test_dtype_moves(dtype, cell):
    theirs, ours = (m.to(dtype) for m in pair(num_layers=2, dtype=torch.float32, cell=cell))
    x, state = draw(T, N, I, dtype=dtype), state_for(ours, N, dtype)
    if dtype is torch.float64:
        assert_same(theirs, ours, x, state)
        return
    exact = run(
        copy.deepcopy(theirs).double(),
        x.detach().double().requires_grad_(),
        changed(lambda s: s.detach().double().requires_grad_(), state),
    )
    assert_accurate(run(ours, x, state), run(theirs, x, state), exact, dtype)


@each_cell
def test_functional_call(cell):
    theirs, ours = pair(num_layers=2, cell=cell)
    weights = {name: (2 * w).detach() for name, w in ours.named_parameters()}
    x = draw(T, N, I)
    expected, found = (torch.func.functional_call(m, weights, (x,)) for m in (theirs, ours))
    torch.testing.assert_close(found, expected)
    assert not torch.equal(found[0], ours(x)[0])


def with_method(base, method, calls, on):
    """A module of a class derived from base, a method of which (or of it) notes its arguments."""

    def note(args):
        shapes = [tuple(a.shape) if isinstance(a, torch.Tensor) else a for a in args]
        calls.append(str(shapes) if method == "check_input" else "called")

    def noted(self, *args):
        note(args)
        return getattr(super(kind, self), method)(*args)

    kind = type("Mine", (base,), {method: noted} if on == "class" else {})
    module = kind(I, H, dtype=torch.float64)
    if on == "instance":
        setattr(module, method, lambda *args: note(args) or getattr(kind, method)(module, *args))
    calls.clear()
    return module


def packed():
    return pack_padded_sequence(draw(T, N, I), [2, 5, 1], enforce_sorted=False)


# Whether batch_first, the input, and the rows of its state.
INPUTS = {
    "dense": (False, lambda: draw(T, N, I), N),
    "batch_first": (True, lambda: draw(N, T, I), N),
    "unbatched": (False, lambda: draw(T, I), None),
    "unbatched batch_first": (True, lambda: draw(T, I), None),
    "packed": (False, packed, N),
}


@pytest.mark.covering
@pytest.mark.parametrize("on", ("class", "instance"))
@pytest.mark.parametrize(
    "name, method",
    [(n, m) for n in ("LSTM", "GRU", "RNN") for m in CALLED_BY_TORCH if hasattr(getattr(nn, n), m)],
)
@pytest.mark.parametrize("batch_first, form, rows", INPUTS.values(), ids=INPUTS)
def test_overridden_methods(batch_first, form, rows, name, method, on):
    """Overridden methods are called as by torch.nn, through torch.nn's forward where need be."""
    noted, results = ([], []), []
    input = form()
    for calls, library in zip(noted, (nn, lstm_fused), strict=True):
        torch.manual_seed(1)
        module = with_method(getattr(library, name), method, calls, on)
        module.batch_first = batch_first
        state = changed(torch.ones_like, state_for(module, rows))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results.append([tensors_of(module(input, given)) for given in (None, state)])
    assert noted[1] == noted[0]
    torch.testing.assert_close(results[1], results[0])
    said = [str(w.message) for w in caught]
    if method == "check_input":
        assert not said and lstm_fused.runtime.last_run()["pass"] == "forward"
    else:
        assert len(said) == 1 and f"Mine overrides {method}, which the fused" in said[0]


@each_cell
def test_instance_method_override(cell):
    theirs, ours = pair(cell=cell)
    x, calls = ones(T, N, I), []
    with torch.no_grad():
        expected = theirs(x)
        for _ in range(2):
            ours.check_input = lambda *args: calls.append(args)
            torch.testing.assert_close(ours(x), expected)
            del ours.check_input
            torch.testing.assert_close(ours(x), expected)
    assert len(calls) == 2


@each_cell
def test_check_input_sees_padded_input(cell):
    _, ours = pair(cell=cell)
    calls = []
    ours.check_input = lambda x, batch_sizes: calls.append((tuple(x.shape), batch_sizes))
    ours(ones(T, N, I), lengths=[5, 2, 1])
    assert calls[0] == ((T, N, I), None)
