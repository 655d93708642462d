"""Registration of our modules and operators with other libraries, when these are imported."""

import functools
from math import prod

import torch

from lstm_fused import cells, dynamo, onnx
from lstm_fused.fallback import Fused, warn_once
from lstm_fused.hooks import when_imported
from lstm_fused.nn import MODULES
from lstm_fused.replace import OURS, replace, restore_unquantized

_THEIRS = {ours: theirs for theirs, ours in OURS.items()}


def _products(x_shape, batch_sizes_shape, weights_shapes):
    """(rows of a model, for each weight the multiply-adds of one product of it with all rows)."""
    several = len(weights_shapes[1]) == 3
    rows = x_shape[-2] if batch_sizes_shape is not None else x_shape[-3] * x_shape[-2]
    matrix = 3 if several else 2
    return rows, [rows * prod(w) if len(w) == matrix else 0 for w in weights_shapes]


def _forward_flops(x_shape, batch_sizes_shape, resets, state0_shapes, weights_shapes, *_, **__):
    """Every matrix times every row of every step."""
    return 2 * sum(_products(x_shape, batch_sizes_shape, weights_shapes)[1])


def _quantized_flops(x_shape, batch_sizes_shape, resets, state0_shapes, weights_shapes, *_, **__):
    """Every matrix times every row of every step, as the kernel pads them."""
    rows = x_shape[-2] if batch_sizes_shape is not None else x_shape[-3] * x_shape[-2]
    return 2 * rows * sum(prod(w) for w in weights_shapes if len(w) == 5)  # panels


def _backward_flops(x_shape, batch_sizes_shape, resets, state0_shapes, weights_shapes, *rest, **__):
    """Every row times W_hh and W_hr, through time, and the products that mask asks for.

    With checkpoints, which are saved in place of gates, the forward pass once more.
    """
    gates_shape, directions, mask = rest[1], rest[7], rest[9]
    rows, products = _products(x_shape, batch_sizes_shape, weights_shapes)
    each = len(products) // directions
    count = sum(products) if len(gates_shape) == 1 else 0
    for k, product in enumerate(products):
        w_ih = k % each == 0
        count += product * mask[3 + k]
        if w_ih:
            count += product * mask[0]
        elif k % each == 1 and not mask[1] and batch_sizes_shape is None:
            count += product - product // x_shape[-3]  # not through the first step to h_0
        else:
            count += product
    return 2 * count


def _register_flops(flop_counter):
    operators = torch.ops.lstm_fused
    flop_counter.register_flop_formula(operators.recurrent_forward)(_forward_flops)
    flop_counter.register_flop_formula(operators.quantized_forward)(_quantized_flops)
    backward = [operators.recurrent_backward, operators.recurrent_backward_samples]
    flop_counter.register_flop_formula(backward)(_backward_flops)


def _ours_in(model):
    """Our modules inside a model, or the model itself; not those with quantized weights."""
    modules = model.modules()
    return [m for m in modules if isinstance(m, Fused) and m.weights_dtype is None]


def _register_quantization(quantize):
    """Have quantize_dynamic and the like, which look a module's class up, see torch.nn's.

    Those that will not be converted, for want of a configuration or because they are the model
    itself, are ours again.
    """
    propagate = quantize.propagate_qconfig_

    @functools.wraps(propagate)
    def propagate_qconfig_(module, qconfig_dict=None, *args, **more):
        if qconfig_dict:
            qconfig_dict = {_THEIRS.get(key, key): value for key, value in qconfig_dict.items()}
        ours = _ours_in(module)
        restore_unquantized(module)
        propagate(module, qconfig_dict, *args, **more)
        for each in ours:
            kept = each is module or getattr(each, "qconfig", None) is None
            if kept and not isinstance(each, Fused):
                replace(each)

    quantize.propagate_qconfig_ = propagate_qconfig_


def _register_fx_quantization(quantize_fx):
    """The same of prepare_fx, which shares the modules of the model it is given."""
    prepare = quantize_fx._prepare_fx

    @functools.wraps(prepare)
    def _prepare_fx(model, *args, **more):
        for each in _ours_in(model):
            warn_once(
                each,
                "torch.ao.quantization knows that class, and leaves it in the model "
                "(lstm_fused.replace brings the fused module back)",
            )
        return prepare(restore_unquantized(model), *args, **more)

    quantize_fx._prepare_fx = _prepare_fx


def _register_opacus(validators):
    """Have opacus judge, and replace, our modules as it does torch.nn's."""
    registry = validators.ModuleValidator
    for theirs, ours in OURS.items():
        for known in (registry.VALIDATORS, registry.FIXERS):
            if theirs in known:
                known[ours] = known[theirs]


def register() -> None:
    """Called when lstm_fused is imported."""
    dynamo.allow((*MODULES, *cells.MODULES))
    onnx.register()
    when_imported("torch.utils.flop_counter", _register_flops)
    when_imported("torch.ao.quantization.quantize", _register_quantization)
    when_imported("torch.ao.quantization.quantize_fx", _register_fx_quantization)
    when_imported("opacus.validators", _register_opacus)
