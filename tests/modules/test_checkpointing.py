"""checkpoint_every changes the memory of backward and nothing else; its choice by "auto"."""

import copy
from math import ceil

import pytest
import torch

import lstm_fused
from lstm_fused import _plan, checkpointing, ops, runtime
from tests.helpers import loops
from tests.helpers.compare_modules import (
    H,
    I,
    T,
    draw,
    each_cell,
    each_option,
    pair,
    state_for,
    states_of,
)
from tests.helpers.oracle import has_cell_state

N = 4
EVERY = (1, 2, 3, T - 1, T, T + 1, "auto")


@pytest.mark.usefixtures("device")
@pytest.mark.covering
@each_option
@pytest.mark.parametrize("with_options", (False, True), ids=("", "resets and cell states"))
@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("form", loops.FORMS)
def test_same_results(form, every, with_options, cell, options):
    _, ours = pair(cell=cell, **options)
    call, lengths = loops.FORMS[form]
    x, state = draw(T, N, I), states_of(state_for(ours, N))
    mask, reset = None, None
    if with_options:
        mask, reset = torch.rand(T, N) < 0.4, states_of(state_for(ours, N))
    given = ours, x, state, mask, reset, lengths
    leaves = {"x": x, **dict(ours.named_parameters())}
    leaves |= {f"s{k}": s for k, s in enumerate((*state, *(reset or ())))}
    more = {"leaves": leaves, "cells": with_options and has_cell_state(cell)}
    expected = loops.results(call, *given, **more)
    found = loops.results(call, *given, checkpoint_every=every, **more)
    for name, t in expected.items():
        if not name.startswith("d_"):
            assert torch.equal(found[name], t), name
    torch.testing.assert_close(found, expected)
    assert runtime.last_run()["pass"] == "backward"


@pytest.fixture
def given(monkeypatch):
    """save_every of each layer that is called."""
    found, layer = [], ops.layer

    def observed(*args, **more):
        found.append(more.get("save_every", 1))
        return layer(*args, **more)

    monkeypatch.setattr(ops, "layer", observed)
    return found


def test_attribute_and_argument(given):
    """A call's argument comes before the module's attribute."""
    module = lstm_fused.GRU(I, H, 2)
    x = torch.randn(9, 2, I)
    for attribute, argument, expected in (
        (None, None, 1),
        (None, 3, 3),
        (2, None, 2),
        (2, 3, 3),
        (2, 1, 1),
        (9, None, 1),
        ("auto", None, checkpointing.least_memory("gru", 9, 2, H, H)),
    ):
        module.checkpoint_every = attribute
        given.clear()
        module(x, checkpoint_every=argument)
        assert given == [expected] * 2
        twin = copy.deepcopy(module)
        assert twin.checkpoint_every == attribute
        assert (f"checkpoint_every={attribute!r}" in repr(twin)) == (attribute is not None)
    assert lstm_fused.GRU.checkpoint_every is None


def test_attribute_in_every_form(given):
    _, ours = pair()
    ours.checkpoint_every = 2
    x = draw(T, N, I)
    ours(x)
    ours(x[:, 0])
    ours(x, resets=torch.zeros(T, N, dtype=torch.bool))
    ours(x, return_cell_states=True)
    with torch.autocast("cpu", torch.bfloat16):
        ours.float()(x.float())
    assert given == [2] * 5


@pytest.mark.parametrize("form", ("compile", "export", "func"))
def test_under_transforms(form):
    _, ours = pair(num_layers=2, bidirectional=True)
    x = draw(T, N, I, grad=False)
    expected = torch.func.grad(lambda x: ours(x)[0].cos().sum())(x)
    ours.checkpoint_every = 2

    def loss(x):
        return ours(x)[0].cos().sum()

    if form == "compile":
        torch._dynamo.reset()
        loss = torch.compile(loss, backend="aot_eager", fullgraph=True)
    elif form == "export":
        module = torch.export.export(ours, (x,)).module()

        def loss(x):
            return module(x)[0].cos().sum()

    if form == "func":
        found = torch.func.grad(loss)(x)
    else:
        leaf = x.clone().requires_grad_()
        (found,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(found, expected)


def test_second_derivatives():
    _, ours = pair()
    x = draw(T, 2, I)

    def call(x):
        return ours(x, checkpoint_every=2)[0]

    assert torch.autograd.gradcheck(call, x)
    assert torch.autograd.gradgradcheck(call, x)


SIZES = [
    (cell, T, N, H)
    for cell in ("lstm", "gru", "rnn_tanh")
    for T in (2, 100, 4096, 100_000)
    for N in (1, 3, 32, 256)
    for H in (1, 17, 256)
]


def memory(cell, T, N, H, k):
    """Numbers that backward needs at once: the kept states, and those of k steps."""
    info = _plan.cells()[cell]
    state = 2 * H if info["carry"] == "cell" else H
    return N * ((ceil(T / k) - 1) * state + k * (2 * info["preacts"] * H + state))


@pytest.mark.parametrize("cell, T, N, H", SIZES)
def test_auto_needs_little_memory(cell, T, N, H):
    """At most half more than the best of all, for whole sums where that is possible."""
    k = checkpointing.least_memory(cell, T, N, H, H)
    best = min(memory(cell, T, N, H, other) for other in range(1, min(T, 2000) + 1))
    assert memory(cell, T, N, H, k) <= 1.5 * best
    if T == 100_000 and 256 % N == 0:
        assert k * N % 256 == 0


def test_interval():
    def interval(every, T=100):
        return checkpointing.interval(every, "lstm", T, 2, 8, 8)

    assert [interval(k) for k in (None, 1, 7, 99, 100, 1000)] == [1, 1, 7, 99, 1, 1]
    assert 1 < interval("auto") < 100 and interval("auto", T=1) == 1


@each_cell
@pytest.mark.parametrize("directions", (1, 2))
def test_bytes_kept(directions, cell):
    """What explain says is kept, against the size of what the operator returns for backward."""
    T, N, H = 37, 3, 17
    module = pair(I, H, cell=cell, bidirectional=directions == 2)[1]
    weights = [w.detach() for w in module.parameters()]
    number = ops.CELLS[cell]["id"]
    for k in (1, 4):
        call = torch.randn(T, N, I).double(), None, None, [], weights, number, directions, False, k
        *_, gates, states = torch.ops.lstm_fused.recurrent_forward(*call)
        size = sum(t.numel() * t.element_size() for t in (gates, states) if t is not None)
        sizes = T, N, H, H, directions
        assert checkpointing.kept_bytes(cell, *sizes, k, 8, _plan.block) == size


BAD = [
    (0, ValueError, "at least 1"),
    (-3, ValueError, "at least 1"),
    (2.0, TypeError, 'an int or "auto", got 2.0'),
    (True, TypeError, "got True"),
    ("all", TypeError, "got 'all'"),
    ([2], TypeError, r"got \[2\]"),
]


@pytest.mark.parametrize("every, kind, words", BAD)
@pytest.mark.parametrize("as_attribute", (False, True))
def test_errors(as_attribute, every, kind, words):
    _, ours = pair()
    x = draw(T, N, I)
    with pytest.raises(kind, match=words):
        if as_attribute:
            ours.checkpoint_every = every
            ours(x)
        else:
            ours(x, checkpoint_every=every)


def test_without_gradients():
    _, ours = pair()
    x = draw(T, N, I, grad=False)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x, checkpoint_every=2), ours(x))
    ours.requires_grad_(False)
    assert not ours(x, checkpoint_every=2)[0].requires_grad


@pytest.mark.filterwarnings("ignore:.*ran through")
def test_fallback_keeps_every_k_steps_as_well():
    """By the reference; torch.nn's forward is enough where nothing is recorded."""
    _, ours = pair(bidirectional=True)
    x = draw(T, N, I)
    named = x.as_subclass(type("Named", (torch.Tensor,), {}))
    found = ours(named, checkpoint_every=2)[0].cos().sum()
    expected = ours(x)[0].cos().sum()
    leaves = [x, *ours.parameters()]
    grads = [torch.autograd.grad(loss, leaves) for loss in (found, expected)]
    torch.testing.assert_close([g.as_subclass(torch.Tensor) for g in grads[0]], list(grads[1]))
    with torch.no_grad():
        assert ours(named, checkpoint_every=2)[0].shape == (T, N, 2 * H)


@each_cell
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
@pytest.mark.parametrize(
    "T, N, every", ((700, 1, 256), (41, 32, 8), (41, 32, 16), (23, 64, "auto"))
)
def test_same_bits_of_gradients(T, N, every, dtype, cell):
    """Where the rows of an interval are a multiple of those of a sum.

    In 16 bits two directions round x's gradient where they meet, which is elsewhere.
    """
    both = dtype is not torch.bfloat16
    _, ours = pair(I, 17, cell=cell, bidirectional=both, dtype=dtype)
    x = draw(T, N, I, dtype=dtype)
    leaves = {"x": x, **dict(ours.named_parameters())}
    expected = loops.results(loops.dense, ours, x, leaves=leaves)
    found = loops.results(loops.dense, ours, x, leaves=leaves, checkpoint_every=every)
    for name, t in expected.items():
        assert torch.equal(found[name], t), name


def test_less_is_saved():
    """What autograd keeps between forward and backward, by its own count."""
    module = lstm_fused.LSTM(I, 32)
    x = torch.randn(1000, 1, I)

    def kept(every):
        sizes = {}

        def pack(t):
            sizes[t.data_ptr()] = t.numel() * t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            module(x, checkpoint_every=every)[0].sum().backward()
        given = [x, *module.parameters()]
        return sum(sizes.values()) - sum(t.numel() * t.element_size() for t in given)

    sizes = "lstm", 1000, 1, 32, 32
    k = checkpointing.least_memory(*sizes)
    for every, save_every in ((None, 1), (4, 4), ("auto", k)):
        assert kept(every) == checkpointing.kept_bytes(*sizes, 1, save_every, 4)
    assert kept("auto") < kept(None) / 30
