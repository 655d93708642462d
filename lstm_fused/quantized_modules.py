"""The classes of modules with int8 or bfloat16 weights, which quantize_ makes of ours.

A module of such a class has no parameters but those of a learned initial state. Its weights and
biases are buffers, as the operator takes them; `state_dict` has them in torch's shapes.
"""

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils.rnn import PackedSequence

from lstm_fused import nn, panels, single_step
from lstm_fused.fallback import Fused, warn_once
from lstm_fused.ops import CELLS
from lstm_fused.quantized_ops import LAYERS

_CAST = frozenset((torch.float16, torch.bfloat16, torch.float64))  # to float32 and back
_SCALE = "_scale"  # behind a weight's name in a state_dict
# Behind a weight's name, the buffers that kernels read.
_PANELS, _PANEL_SCALES = "_panels", "_panel_scales"


class Quantized:
    """A mixin before a fused module's class. Everything is computed in float32.

    _buffer_names: the weights and biases among the buffers, in the operator's order.
    """

    _buffer_names: list[str]

    def __init__(self, *args, **kwargs):
        raise TypeError(
            f"{type(self).__name__} is made by lstm_fused.quantize_, not by a constructor"
        )

    # The call.

    def _weights(self):
        buffers = self._buffers
        return [buffers[name] for name in self._buffer_names]

    def _input_dtype(self, weights):
        return torch.float32

    def _layer(self, run):
        return partial(LAYERS[run], sizes=(self.hidden_size, getattr(self, "proj_size", 0)))

    def _fallback_reason(self, x, hx, weights):
        reason = super()._fallback_reason(x, hx, weights)
        if reason is None and not x.is_cpu and not torch.compiler.is_compiling():
            what = "int8 and bfloat16 weights have a kernel on the CPU only"
            warn_once(self, what, "its float32 kernel, with the weights dequantized in each call")
        return reason

    def _run_in_float32(self, run, input, hx, *rest, **options):
        """run(input, hx, *rest, **options) in float32, its floating results in input's dtype."""
        x = input.data if isinstance(input, PackedSequence) else input
        if not isinstance(x, Tensor):
            return run(input, hx, *rest, **options)
        device = x.device.type
        autocast = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
        cast = x.dtype in _CAST
        if not autocast and not cast and "reset_state" not in options:
            return run(input, hx, *rest, **options)
        if "reset_state" in options:
            options["reset_state"] = _cast(options["reset_state"], torch.float32)
        input = _cast(input, torch.float32) if cast else input
        with torch.autocast(device, enabled=False) if autocast else nullcontext():
            found = run(input, _cast(hx, torch.float32), *rest, **options)
        return _cast(found, x.dtype) if cast else found

    # The weights.

    def __getattr__(self, name):
        """A weight by torch's name is dequantized, into a new tensor."""
        buffers = self.__dict__.get("_buffers", {})
        if name + _PANELS in buffers:
            return panels.dequantized(*self._unpacked(name, _forms_of(self)[name]))
        return super().__getattr__(name)

    def __setattr__(self, name, value):
        if f"{name}{_PANELS}" in self.__dict__.get("_buffers", {}):
            raise AttributeError(
                f"{name} is quantized and cannot be assigned: change it before "
                "lstm_fused.quantize_, or load a state_dict"
            )
        super().__setattr__(name, value)

    def _unpacked(self, name, form):
        """(q (G*U, K), scales (G*U, groups) or None) of a weight."""
        scales = self._buffers.get(name + _PANEL_SCALES)
        return (
            panels.unpacked(self._buffers[name + _PANELS], form),
            None if scales is None else panels.unpacked_scales(scales, form),
        )

    def _become_quantized(self, buffers, dtype):
        """Take what `made_of` gave in place of the parameters; the class is this one already."""
        for name in names_in_torch(self):
            del self._parameters[name]
        self._buffers.update(buffers)
        # _save_to_state_dict has them, in torch's form.
        self._non_persistent_buffers_set.update(buffers)
        self.__dict__["weights_dtype"], self.__dict__["_buffer_names"] = dtype, list(buffers)
        self.__dict__.pop("_flat_weights", None)
        self.__dict__["_flat_weight_refs"] = []

    def _become_plain(self):
        """Make the weights and biases parameters again, in float32; the class is to follow."""
        weights = {name: getattr(self, name) for name in names_in_torch(self)}
        for name in self._buffer_names:
            del self._buffers[name]
            self._non_persistent_buffers_set.discard(name)
        del self.__dict__["weights_dtype"], self.__dict__["_buffer_names"]
        for name in getattr(self, "_learned", ()):
            initial = self._parameters[name]
            initial.data = initial.data.to(torch.float32)
        others = dict(self._parameters)
        self._parameters.clear()
        self._parameters.update({name: Parameter(w.detach()) for name, w in weights.items()})
        self._parameters.update(others)

    # What torch.nn.Module does with parameters and buffers.

    def _apply(self, fn, recurse=True):
        """fn may move the weights; they keep their dtypes and layouts."""
        ours = {id(self._buffers[name]) for name in self._buffer_names}

        def keep(t):
            if id(t) not in ours:
                return fn(t)
            flat = t.view(-1)  # of five dimensions, channels_last would lay them out anew
            moved = fn(flat)
            if moved.dtype is not t.dtype:
                moved = flat.to(moved.device)
            return t if moved is flat else moved.view(t.shape)

        return super()._apply(keep, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        forms = _forms_of(self)
        for name in names_in_torch(self):
            if name not in forms:
                destination[prefix + name] = self._buffers[name].detach()
                continue
            q, scales = self._unpacked(name, forms[name])
            destination[prefix + name] = q
            if scales is not None:
                destination[prefix + name + _SCALE] = scales
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, *rest):
        unexpected, error_msgs = rest
        forms, state_dict = _forms_of(self), dict(state_dict)
        assign = metadata.get("assign_to_params_buffers", False)

        def load(name, buffer, shape, dtype, pack):
            """state_dict's tensor of this name into a buffer, in the form pack gives."""
            given = state_dict.pop(prefix + name, None)
            if given is None:
                missing.append(prefix + name)
                return
            to = self._buffers[buffer]
            if not isinstance(given, Tensor) or given.shape != shape or given.dtype != dtype:
                got = type(given).__name__
                if isinstance(given, Tensor):
                    got = f"{given.dtype} {tuple(given.shape)}"
                error_msgs.append(
                    f"{prefix}{name} must be {dtype} {tuple(shape)}, got {got}: a state_dict of "
                    "other weights is loaded before lstm_fused.quantize_"
                )
                return
            with torch.no_grad():
                made = pack(given)
                if assign:
                    self._buffers[buffer] = made
                else:
                    to.copy_(made)

        for name in names_in_torch(self):
            form = forms.get(name)
            if form is None:
                load(name, name, self._buffers[name].shape, torch.float32, Tensor.detach)
                continue
            dtype, pack = self.weights_dtype, partial(panels.packed, form=form)
            load(name, name + _PANELS, form.shape, dtype, pack)
            if dtype is torch.int8:
                dtype, pack = torch.bfloat16, partial(panels.packed_scales, form=form)
                load(name + _SCALE, name + _PANEL_SCALES, form.scale_shape, dtype, pack)
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, missing, unexpected, error_msgs
        )

    def extra_repr(self):
        return f"{super().extra_repr()}, weights={str(self.weights_dtype).removeprefix('torch.')}"

    def __prepare_scriptable__(self):
        raise RuntimeError(
            f"torch.jit.script cannot compile {type(self).__name__} with quantized weights: "
            "lstm_fused.dequantize_ it first; torch.export can"
        )

    def reset_parameters(self):
        raise RuntimeError("quantized weights cannot be initialized: lstm_fused.dequantize_ first")


class QuantizedLayers(Quantized):
    """Quantized of LSTM, GRU and RNN."""

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        # What is overridden here is not the user's.
        cls._overridden = tuple(
            name
            for name in cls._overridden
            if getattr(cls, name) is not vars(QuantizedLayers).get(name)
        )

    def forward(self, input, hx=None, lengths=None, **options):
        """As the float module's, in float32 whatever the dtype of input: the results have that.

        Args:
            input: float32, float64, bfloat16 or float16.
            hx: of any of these dtypes.
            lengths, options: as of the float module.

        Raises:
            RuntimeError: in backward, for gradients of input or hx; and as the float module.
        """
        if not options and _is_float32(input):
            return super().forward(input, hx, lengths)
        return self._run_in_float32(super().forward, input, hx, lengths, **options)

    def _check_state(self, hx, dims, rows):
        return _cast(super()._check_state(hx, dims, rows), torch.float32)

    # What torch.nn's own forward reads where it runs, and what keeps that up to date.

    @property
    def _flat_weights(self):
        return [getattr(self, name) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value):
        pass

    def _init_flat_weights(self):
        pass

    def _weights_have_changed(self):
        return False

    def flatten_parameters(self):
        pass


class QuantizedStep(Quantized):
    """Quantized of LSTMCell, GRUCell and RNNCell."""

    def forward(self, input, hx=None):
        """As the float cell's, in float32 whatever the dtype of input: the results have that."""
        if _is_float32(input):
            return super().forward(input, hx)
        return self._run_in_float32(super().forward, input, hx)

    def _state(self, input, hx):
        return _cast(super()._state(input, hx), torch.float32)


def names_in_torch(module):
    """The names of a module's weights and biases, in the order of the operator's."""
    if isinstance(module, torch.nn.RNNBase):
        return module._flat_weights_names
    names = ["weight_ih", "weight_hh"]
    return [*names, "bias_ih", "bias_hh"] if module.bias else names


def _forms_of(module):
    """By the name of each weight of a module, its panels.Form."""
    H, proj_size = module.hidden_size, getattr(module, "proj_size", 0)
    directions = 2 if getattr(module, "bidirectional", False) else 1
    found = {}
    for name in names_in_torch(module):
        part, _, suffix = name.partition("_l")
        first = suffix.partition("_")[0] in ("", "0")  # a cell's has no suffix
        inputs = module.input_size if first else directions * (proj_size or H)
        forms = panels.forms_of(CELLS[module._cell()]["id"], inputs, H, proj_size)
        kinds = {"weight_ih": forms.w_ih, "weight_hh": forms.w_hh, "weight_hr": forms.w_hr}
        if part in kinds:
            found[name] = kinds[part]
    return found


def made_of(module, dtype):
    """The buffers of a module of ours with weights of this dtype, by name, in operator order."""
    forms, made = _forms_of(module), {}
    for name in names_in_torch(module):
        w = module._parameters[name].detach()
        if name not in forms:
            made[name] = w.to(torch.float32, copy=True)
        elif dtype is torch.int8:
            q, scales = panels.quantized(w)
            made[name + _PANELS] = panels.packed(q, forms[name])
            made[name + _PANEL_SCALES] = panels.packed_scales(scales, forms[name])
        else:
            made[name + _PANELS] = panels.packed(w.to(dtype), forms[name])
    return made


def _is_float32(input):
    """Whether a call is as it is to be run, without a cast or autocast."""
    plain = type(input) is Tensor and input.dtype is torch.float32
    return plain and not torch._C._is_any_autocast_enabled()


def _cast(value, dtype):
    """value with its floating tensors in this dtype: a tensor, packed data, or a tuple of them."""
    if isinstance(value, PackedSequence):
        return value._replace(data=_cast(value.data, dtype))
    if isinstance(value, (tuple, list)):
        return tuple([_cast(each, dtype) for each in value])
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


class QuantizedLSTM(QuantizedLayers, nn.LSTM):
    """``lstm_fused.LSTM`` with int8 or bfloat16 weights, for inference; see ``quantize_``."""

    _float_class = nn.LSTM


class QuantizedGRU(QuantizedLayers, nn.GRU):
    """``lstm_fused.GRU`` with int8 or bfloat16 weights, for inference; see ``quantize_``."""

    _float_class = nn.GRU


class QuantizedRNN(QuantizedLayers, nn.RNN):
    """``lstm_fused.RNN`` with int8 or bfloat16 weights, for inference; see ``quantize_``."""

    _float_class = nn.RNN


class QuantizedLSTMCell(QuantizedStep, single_step.LSTMCell):
    """``lstm_fused.LSTMCell`` with int8 or bfloat16 weights, for inference; see ``quantize_``."""

    _float_class = single_step.LSTMCell


class QuantizedGRUCell(QuantizedStep, single_step.GRUCell):
    """``lstm_fused.GRUCell`` with int8 or bfloat16 weights, for inference; see ``quantize_``."""

    _float_class = single_step.GRUCell


class QuantizedRNNCell(QuantizedStep, single_step.RNNCell):
    """``lstm_fused.RNNCell`` with int8 or bfloat16 weights, for inference; see ``quantize_``."""

    _float_class = single_step.RNNCell


CLASSES: dict[type[Fused[Any]], type[Fused[Any]]] = {
    cls._float_class: cls
    for cls in (
        *(QuantizedLSTM, QuantizedGRU, QuantizedRNN),
        *(QuantizedLSTMCell, QuantizedGRUCell, QuantizedRNNCell),
    )
}
