"""The dtypes of a recurrent layer's call under CPU autocast: those that torch.nn returns.

torch.nn.LSTM has two implementations there, oneDNN's layer and one of single operators, whose
dtypes differ. Which one runs depends on the machine, the switch ``torch.backends.mkldnn.enabled``
and the call. `dtypes` repeats torch's decision (``use_mkldnn`` in ATen/native/RNN.cpp).
"""

import functools
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes


class OneDNN(NamedTuple):
    """What torch runs in oneDNN: nothing unless enabled, else float32 and what is True here."""

    enabled: bool
    bfloat16: bool
    float16: bool


class Call(NamedTuple):
    """What the dtypes of a call depend on."""

    carry: str  # "cell" (LSTM), "hidden" (GRU) or "none" (RNN): ops.CELLS[cell]["carry"]
    x: torch.dtype
    state: torch.dtype  # of c_0, or h_0 where there is no c_0; of x if none is given
    packed: bool = False
    projection: bool = False
    empty: bool = False  # x has no element
    grad: bool = False  # the grad mode is on, whether or not anything requires a gradient


def dtypes(call, narrow, onednn):
    """The dtypes of (c_n and everything computed, output and h_n), narrow being autocast's.

    oneDNN's layer runs wholly in narrow. Where it has no such layer, torch.nn.LSTM raises
    ("could not create a primitive descriptor"), and the result is in narrow all the same, so that
    a model returns the same dtypes on every machine that runs it.

    Elsewhere autocast narrows matrix products only. The products of an RNN are all there is. A GRU
    adds h_0 to theirs and an LSTM c_0, whose dtype may be wider. A projection is a product again.
    """
    if call.carry == "none" or (call.carry == "cell" and _runs_in_onednn(call, onednn)):
        return narrow, narrow
    wide = torch.promote_types(narrow, call.state)
    return wide, narrow if call.projection else wide


def _runs_in_onednn(call, onednn):
    """Whether torch.nn.LSTM runs the call in oneDNN, by x's dtype before autocast casts it."""
    if not onednn.enabled or call.packed or call.projection or call.empty:
        return False
    if call.x is torch.float16:
        return onednn.float16 and not call.grad
    return call.x is torch.float32 or (call.x is torch.bfloat16 and onednn.bfloat16)


def onednn():
    """This machine's OneDNN under torch's current switches."""
    built, bfloat16, float16 = _has()
    return OneDNN(built and torch.backends.mkldnn.enabled, bfloat16, float16)


def _has():
    return _ask_torch()


# Dynamo calls it once, and does not trace it.
_has._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _ask_torch():
    """Whether torch has oneDNN, and oneDNN bfloat16, float16.

    Asked at the first call under autocast: the answer, which ONEDNN_MAX_CPU_ISA limits, is final
    from then on. No mode of torch's is to record the question.
    """
    if not torch.backends.mkldnn.is_available():
        return False, False, False
    with _disable_current_modes():
        ask = torch.ops.mkldnn
        return True, ask._is_mkldnn_bf16_supported(), ask._is_mkldnn_fp16_supported()
