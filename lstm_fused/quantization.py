"""int8 and bfloat16 weights for inference: quantize_ and dequantize_."""

import warnings
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils.parametrize import is_parametrized

from lstm_fused import panels, quantized_modules
from lstm_fused.fallback import Fused
from lstm_fused.replace import (
    LeftAlone,
    become,
    check_model,
    check_not_wrapped,
    derived,
    exchange,
    float_class,
    fused_class,
    plain_class,
)

M = TypeVar("M", bound=torch.nn.Module)


def quantize_(model: M, dtype: torch.dtype = torch.int8) -> M:
    """Give every LSTM, GRU, RNN and single-step cell inside model, or model itself, int8 or
    bfloat16 weights, in place; for inference.

    Those of torch.nn become lstm_fused's first, see ``replace``. Everything beside the weights
    stays as it is: biases, states and results are float32. ``float16``, ``bfloat16`` and
    ``float64`` inputs are taken too, and results are in the input's dtype; so it is under autocast.

    ``torch.int8``: each row of a weight is cut into groups of 16 consecutive columns, and a group
    has one bfloat16 scale, the one with the least squared error. The kernel rounds the inputs and
    hidden states of each row to 10 bits by a scale of their own, and adds the products of a group
    exactly. Results do not depend on the instruction set, if that has fused multiply-adds, nor on
    VNNI. ``torch.bfloat16``: the weights are rounded, the products are float32.

    A module stays the object it was and an instance of the class it was; its weights become
    buffers, which ``state_dict`` has under torch's names: ``weight_ih_l0`` int8 with
    ``weight_ih_l0_scale`` beside it, or ``weight_ih_l0`` bfloat16. A module that was quantized
    before loads it, strictly. ``module.weight_ih_l0`` reads as a new dequantized tensor. ``half()``
    and ``double()`` leave weights and biases as they are. A weight that several modules shared
    becomes a copy in each. An optimizer made before has parameters that are in use no longer.

    On a CUDA device the weights are dequantized in each call, and the float32 kernels run.

    Left alone, with a warning that names them and says why: modules with parametrized, pruned or
    weight-normed weights, those that ``replace`` leaves alone, and those that ``fully_shard`` has
    given a class.

    Args:
        model: a ``torch.nn.Module``.
        dtype: ``torch.int8`` or ``torch.bfloat16``.

    Returns:
        model.

    Raises:
        TypeError: model is not a ``torch.nn.Module``.
        ValueError: dtype is another, a module is quantized to the other already, or a weight is
            not finite.

    Backward, and ``jvp``, of a call raises a RuntimeError. ``dequantize_`` and ``restore`` undo it,
    except for the rounding. A scale for each group of a row: Dai, Venkatesan, Ren, Zimmer, Dally
    and Khailany, VS-Quant: Per-vector Scaled Quantization for Accurate Low-Precision Neural Network
    Inference, 2021.
    """
    check_model(model)
    if dtype not in panels.DTYPES:
        raise ValueError(f"dtype must be torch.int8 or torch.bfloat16, got {dtype}")
    exchange(model, fused_class, "quantize_", False)
    changes: list[Any] = []
    left = []
    for name, module in model.named_modules():
        if not isinstance(module, Fused) or module.weights_dtype is dtype:
            continue
        name = name or "the model"
        try:
            if module._torch_class is None:
                raise LeftAlone(f"a {module._kind()}, which has no quantized kernels")
            _check(name, module, dtype)
            cls = _quantized_class(plain_class(module))
            changes.append((module, cls, quantized_modules.made_of(module, dtype)))
        except LeftAlone as reason:
            left.append(f"{name}, {reason}")
    for module, cls, buffers in changes:
        become(module, cls)
        module._become_quantized(buffers, dtype)
    if left:
        warnings.warn(f"lstm_fused.quantize_ left alone: {'; '.join(left)}", stacklevel=2)
    return model


def dequantize_(model: M) -> M:
    """Undo ``quantize_`` inside model, in place, but for the rounding of the weights.

    Weights and biases are new float32 parameters with the values that the quantized ones had, and
    require gradients. A learned initial state becomes float32.

    Args:
        model: a ``torch.nn.Module``.

    Returns:
        model.

    Raises:
        TypeError: model is not a ``torch.nn.Module``.
    """
    check_model(model)
    for module in model.modules():
        if isinstance(module, Fused) and module.weights_dtype is not None:
            become(module, float_class(plain_class(module)))
    return model


def _quantized_class(cls):
    """The class of a module of ours of this class with quantized weights."""
    if cls in quantized_modules.CLASSES:
        return quantized_modules.CLASSES[cls]
    ours = next(to for plain, to in quantized_modules.CLASSES.items() if issubclass(cls, plain))
    return derived(ours, vars(cls).get("_user_class", cls))


def _check(name, module, dtype):
    """Refuse a module whose weights cannot become of this dtype."""
    check_not_wrapped(module)
    if module.weights_dtype is not None:
        raise ValueError(
            f"{name} has {module.weights_dtype} weights already: lstm_fused.dequantize_ it first"
        )
    cls = type(module).__name__
    if is_parametrized(module):
        raise LeftAlone(
            f"a {cls} with parametrized weights: torch.nn.utils.parametrize has "
            "remove_parametrizations"
        )
    if module.input_size == 0:
        raise LeftAlone(f"a {cls} without an input")
    for weight in quantized_modules.names_in_torch(module):
        w = module._parameters.get(weight)
        if w is None:
            raise LeftAlone(f"a {cls} whose {weight} is not a parameter: it is pruned or normed")
        if type(w) not in (Tensor, Parameter) or not w.is_floating_point():
            raise LeftAlone(f"a {cls} whose {weight} is a {type(w).__name__} of {w.dtype}")
        if not w.is_meta and not bool(w.detach().isfinite().all()):
            raise ValueError(f"{weight} of {name} has values that are not finite")
