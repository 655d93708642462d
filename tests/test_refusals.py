"""What torch.nn.LSTM refuses is refused alike, and what has no fused path runs through torch."""

import warnings

import pytest
import torch
from beside import H, I, N, T, draw, pair
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lstm_fused


def sized(rows=N, h=H, c=H, layers=1):
    return draw(layers, rows, h), draw(layers, rows, c)


def called(*shape, state=None, dtype=torch.float64):
    return lambda m: m(torch.ones(*shape, dtype=dtype), state)


def packed(width=I, state=None, dtype=torch.float64, lengths=(5, 3, 1)):
    x = torch.ones(T, N, width, dtype=dtype)
    return lambda m: m(pack_padded_sequence(x, lengths, enforce_sorted=False), state)


def with_sizes(*sizes, dtype=torch.int64, rows=4):
    x = torch.ones(rows, I, dtype=torch.float64)
    return lambda m: m(PackedSequence(x, torch.tensor(sizes, dtype=dtype)))


def with_weight(name, *shape, **kind):
    def call(module):
        setattr(module, name, nn.Parameter(torch.zeros(*shape, **{"dtype": torch.float64} | kind)))
        return module(torch.ones(T, N, I, dtype=torch.float64))

    return call


X = (T, N, I)
# What is called, and what the message must say.
REFUSED = {
    "1-D": (called(I), "Expected input to be 2D or 3D, got 1D"),
    "4-D": (called(1, *X), "Expected input to be 2D or 3D, got 4D"),
    "width": (called(T, N, 5), "input.size.* Expected 4, got 5"),
    "width unbatched": (called(T, 5), "input.size.* Expected 4, got 5"),
    "no step": (called(0, N, I), "sequence length"),
    "float32": (called(*X, dtype=torch.float32), "input dtype .*float32.* weight dtype .*float64"),
    "integers": (called(*X, dtype=torch.int64), "input dtype .*int64"),
    "no input": (lambda m: m(), "'input'"),
    "None": (lambda m: m(None), "NoneType"),
    "list": (lambda m: m([1.0]), "list"),
    "h_0 rows": (called(*X, state=sized(rows=2)), r"hidden\[0\] size \(1, 3, 6\), got \[1, 2, 6\]"),
    "h_0 one row": (called(*X, state=sized(rows=1)), r"hidden\[0\] size"),
    "h_0 layers": (called(*X, state=sized(layers=2)), r"hidden\[0\] size"),
    "h_0 width": (called(*X, state=sized(h=5)), r"hidden\[0\] size"),
    "c_0 width": (called(*X, state=sized(c=5)), r"hidden\[1\] size \(1, 3, 6\), got \[1, 3, 5\]"),
    "h_0 rows unbatched": (called(T, I, state=(draw(2, H), draw(1, H))), r"hidden\[0\] size"),
    "2-D hx": (called(*X, state=(draw(1, H), draw(1, H))), "hx and cx should also be 3-D"),
    "2-D c_0": (called(*X, state=(draw(1, N, H), draw(1, H))), "hx and cx should also be 3-D"),
    "3-D hx": (called(T, I, state=sized(rows=1)), "hx and cx should also be 2-D"),
    "hx a tensor": (called(*X, state=draw(1, N, H)), "hx must be a tuple"),
    "hx of one": (called(*X, state=(draw(1, N, H),)), "hx must be"),
    "hx of three": (called(*X, state=(draw(1, N, H),) * 3), "lstm expects two hidden states"),
    "hx a number": (called(*X, state=3), "hx must be a tuple"),
    "c_0 None": (called(*X, state=(draw(1, N, H), None)), r"hx\[1\] must be a Tensor"),
    "hx dtype": (called(*X, state=[s.float() for s in sized()]), r"hx\[0\] with torch.float32"),
    "hx device": (called(*X, state=[s.to("meta") for s in sized()]), r"hx\[0\] at meta"),
    "packed width": (packed(width=5), "input.size.* Expected 4, got 5"),
    "packed float32": (packed(dtype=torch.float32), "input dtype .*float32"),
    "packed h_0 rows": (packed(state=sized(rows=2)), r"hidden\[0\] size"),
    "packed h_0 width": (packed(state=sized(h=5)), r"hidden\[0\] size"),
    "packed c_0 width": (packed(state=sized(c=5)), r"hidden\[1\] size"),
    "batch_sizes floats": (with_sizes(2, 2, dtype=torch.float32), "batch_sizes"),
    "batch_sizes empty": (with_sizes(rows=0), "batch_sizes"),
    "batch_sizes grow": (with_sizes(1, 3), "batch_sizes"),
    "batch_sizes too many": (with_sizes(3, 2), "batch_sizes"),
    "weight dtype": (with_weight("weight_hh_l0", 24, H, dtype=torch.float32), "weight_hh_l0 must"),
    "weight device": (
        with_weight("weight_hh_l0", 24, H, device="meta"),
        "parameter tensor at meta",
    ),
    "bias size": (with_weight("bias_ih_l0", 23), "bias_ih_l0 must have shape"),
}


@pytest.mark.parametrize("call, words", REFUSED.values(), ids=REFUSED)
def test_refused_alike(call, words):
    theirs, ours = pair()
    with pytest.raises(Exception) as expected:  # noqa: B017, PT011
        call(theirs)
    with pytest.raises(expected.type, match=words) as found:
        call(ours)
    assert found.type is expected.type


# torch.nn.LSTM gives an IndexError for the first, and no or a wrong answer for the others.
STRICTER = {
    "packed 2-D hx": (packed(state=(draw(1, H), draw(1, H))), r"hidden\[0\] size"),
    "more h_0 rows than packed": (packed(lengths=(5, 3, 3), state=sized(rows=4)), r"hidden\[0\]"),
    "c_0 dtype": (called(*X, state=(draw(1, N, H), draw(1, N, H).float())), r"hx\[1\] with"),
    "batch_sizes too few": (with_sizes(2, 1), "batch_sizes"),
    "batch_sizes zero": (with_sizes(4, 0), "batch_sizes"),
    "weight_ih shape": (with_weight("weight_ih_l0", 24, 5), "weight_ih_l0 must have shape"),
    "weight_hh columns": (with_weight("weight_hh_l0", 24, 5), "weight_hh_l0 must have shape"),
    "weight_hh rows": (with_weight("weight_hh_l0", 20, H), "weight_hh_l0 must have shape"),
    "bias of one": (with_weight("bias_hh_l0", 1), "bias_hh_l0 must have shape"),
}


@pytest.mark.parametrize("call, words", STRICTER.values(), ids=STRICTER)
def test_stricter(call, words):
    with pytest.raises(RuntimeError, match=words):
        call(pair()[1])


BAD_LENGTHS = {
    "too few": (X, [5, 3], ValueError, r"one length a row, shape \(3,\)"),
    "2-D": (X, [[5, 3, 1]], ValueError, "one length a row"),
    "too long": (X, [6, 3, 1], ValueError, "from 0 to 5"),
    "negative": (X, [5, 3, -1], ValueError, "from 0 to 5"),
    "fractions": (X, [5.0, 3.0, 1.0], TypeError, "lengths must be integers"),
    "booleans": (X, [True, True, False], TypeError, "lengths must be integers"),
    "words": (X, "abc", TypeError, "lengths must be a list or a tensor"),
    "2-D input": ((T, I), [5], ValueError, "padded 3-D input, got 2-D"),
}


@pytest.mark.parametrize("shape, lengths, kind, words", BAD_LENGTHS.values(), ids=BAD_LENGTHS)
def test_bad_lengths(shape, lengths, kind, words):
    with pytest.raises(kind, match=words):
        pair()[1](torch.ones(*shape, dtype=torch.float64), lengths=lengths)


def test_lengths_of_packed_input_are_refused():
    x = pack_padded_sequence(torch.ones(X, dtype=torch.float64), [5, 3, 1])
    with pytest.raises(ValueError, match="got PackedSequence"):
        pair()[1](x, lengths=[5, 3, 1])


def test_module_works_after_a_refusal():
    theirs, ours = pair()
    with pytest.raises(RuntimeError):
        ours(torch.ones(T, N, 5, dtype=torch.float64))
    x = draw(*X)
    torch.testing.assert_close(ours(x), theirs(x))


class Named(torch.Tensor):
    pass


ONES = torch.ones(X, dtype=torch.float64)


def tangent(module):
    with forward_ad.dual_level():
        y = module(forward_ad.make_dual(ONES, ONES))[0]
        return forward_ad.unpack_dual(y).tangent


def scripted(module):
    return torch.jit.script(nn.ModuleDict({"m": module})["m"])(ONES)[0]


THROUGH_TORCH = {
    "jvp": (lambda m: torch.func.jvp(lambda x: m(x)[0], (ONES,), (ONES,))[1], "jvp"),
    "forward mode": (tangent, "forward-mode"),
    "jit.trace": (lambda m: torch.jit.trace(m, ONES)(ONES)[0], "torch.jit.trace"),
    "subclass": (lambda m: m(ONES.as_subclass(Named))[0], "Named is a Tensor subclass"),
    "meta": (lambda m: m.to("meta")(ONES.to("meta"))[0], "input is on meta"),
    "complex": (lambda m: m.to(torch.complex64)(ONES.to(torch.complex64))[0], "complex64"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call, reason", THROUGH_TORCH.values(), ids=THROUGH_TORCH)
def test_through_torch_with_one_warning(call, reason):
    theirs, ours = pair()
    expected = call(theirs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [call(ours), call(ours)]
    for result in found:
        assert type(result) is type(expected)
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
    said = [str(w.message) for w in caught if "lstm_fused" in str(w.message)]
    assert len(said) == 1
    assert "ran through torch.nn.LSTM" in said[0] and reason in said[0]


@pytest.mark.filterwarnings("ignore")
def test_jit_script():
    theirs, ours = (nn.Sequential(m) for m in pair())
    with pytest.warns(UserWarning, match="torch.jit.script cannot call the fused op"):
        found = torch.jit.script(ours)
    expected = theirs(ONES)
    torch.testing.assert_close(found(ONES), expected, rtol=0, atol=0)


def test_vmap_fails_as_torch_does():
    theirs, ours = pair()
    for module in (theirs, ours):
        with pytest.raises(RuntimeError, match="Batching rule not implemented for aten::lstm"):
            torch.func.vmap(lambda x, m=module: m(x)[0])(ONES.expand(2, *X))


def test_func_grad_is_fused():
    theirs, ours = pair()
    expected, found = (torch.func.grad(lambda x, m=m: m(x)[0].sum())(ONES) for m in (theirs, ours))
    torch.testing.assert_close(found, expected)
    assert lstm_fused.ops.last_run()["pass"] == "backward"
