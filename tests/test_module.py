"""The module as an object: built, copied, changed and moved as torch.nn's are."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from beside import (
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
)
from oracle import CELLS
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import lstm_fused

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


@each_cell
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_next_call_sees(change, cell):
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
