"""Say which kernel a call would run, without running it."""

import functools
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import PackedSequence

from lstm_fused import ops
from lstm_fused.recurrent import Recurrent, why_torch


@dataclass(frozen=True)
class Layer:
    """One layer of a call: its sizes, and the plan of its forward pass (see ``ops.plan``)."""

    T: int
    N: int
    I: int  # noqa: E741
    H: int
    R: int
    directions: int
    training: bool
    plan: object

    def __str__(self):
        sizes = f"T={self.T} N={self.N} I={self.I} H={self.H}"
        sizes += f" R={self.R}" if self.R != self.H else ""
        sizes += ", two directions" if self.directions == 2 else ""
        return f"{sizes}{', keeps gates for backward' if self.training else ''}: {self.plan}"


@dataclass(frozen=True)
class Call:
    """One call of an LSTM, GRU or RNN: the layers that would run fused, or why torch would."""

    name: str
    module: str
    reason: str | None
    layers: tuple

    def __str__(self):
        head = f"{self.name}: {self.module}" if self.name else self.module
        if self.reason is not None:
            return f"{head}\n  runs through torch: {self.reason}"
        return "\n".join([head, *(f"  layer {k}: {layer}" for k, layer in enumerate(self.layers))])


@dataclass(frozen=True)
class Explanation:
    """What ``explain`` found, one ``Call`` for each recurrent layer's call; prints as text."""

    calls: tuple

    def __str__(self):
        return "\n".join(str(call) for call in self.calls) or "no LSTM, GRU or RNN was called"


def explain(model, input, hx=None):
    """Say which kernel, instruction set, thread partition and tile would run, or why torch would.

    Args:
        model: an ``lstm_fused.LSTM``, ``GRU`` or ``RNN`` (or torch.nn's), or a module that holds
            some. Such a layer is not run. Another module is run once on input, in evaluation mode,
            without gradients and leaving the random state as it was, to see what its layers are
            given.
        input: what model is called with; for a module that is no such layer a tuple is its
            positional and a dict its keyword arguments.
        hx: the layer's states, ``(h_0, c_0)`` of an LSTM, else ``h_0``; None for any other module.

    Returns:
        An ``Explanation``; ``print`` it, or read ``.calls[i].reason`` and
        ``.calls[i].layers[k].plan``. A layer counts as training if autograd would record it now.

    Raises:
        TypeError: model is not a ``torch.nn.Module``, or hx is given with one that is no recurrent
            layer.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    grad = torch.is_grad_enabled()
    if isinstance(model, torch.nn.RNNBase):
        return Explanation((_explain_call("", grad, model, (input, hx), {}),))
    if hx is not None:
        raise TypeError(f"hx goes with an LSTM, GRU or RNN, model is a {type(model).__name__}")
    calls = []

    def note(name, module, args, kwargs):
        calls.append(_explain_call(name, grad, module, args, kwargs))

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.RNNBase)]
    modes = [(m, m.training) for m in model.modules()]
    hooks = [
        m.register_forward_pre_hook(functools.partial(note, n), with_kwargs=True) for n, m in layers
    ]
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            if isinstance(input, dict):
                model(**input)
            elif isinstance(input, tuple) and not isinstance(input, PackedSequence):
                model(*input)
            else:
                model(input)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
    return Explanation(tuple(calls))


def _explain_call(name, grad, module, args, kwargs):
    input, hx, lengths = _arguments(*args, **kwargs)
    text = repr(module)
    if not isinstance(module, Recurrent):
        return Call(name, text, "it is not of lstm_fused, see lstm_fused.replace", ())
    packed = isinstance(input, PackedSequence)
    x, batch_sizes = (input.data, input.batch_sizes) if packed else (input, None)
    weights = module._weights()
    state = () if hx is None else module._as_state(hx)
    if reason := why_torch(x, hx, weights):
        return Call(name, text, reason, ())
    if packed:
        T, N = len(batch_sizes), int(batch_sizes[0])
    elif x.dim() == 2:
        T, N = x.shape[0], 1
    else:
        T, N = x.shape[:2] if not module.batch_first else (x.shape[1], x.shape[0])
    lengths = torch.as_tensor([] if lengths is None else lengths)
    if lengths.numel() and int(lengths.min()) < T:  # else it runs as if there were no lengths
        packed, T, N = True, max(1, int(lengths.max())), int((lengths > 0).sum())
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype, _ = module._autocast_dtypes(x, packed, state, weights, grad)
    training = grad and any(t.requires_grad for t in (x, *state, *weights))
    return Call(name, text, None, _layers(module, x.device, dtype, T, N, training))


def _arguments(input, hx=None, *, lengths=None):
    return input, hx, lengths


def _layers(module, device, dtype, T, N, training):
    directions = 2 if module.bidirectional else 1
    H, R = module.hidden_size, module.proj_size or module.hidden_size
    layers = []
    for k in range(module.num_layers):
        I = directions * R if k else module.input_size  # noqa: E741
        sizes = (T, N, I, H, R, directions)
        plan = ops.plan(module._cell(), dtype, *sizes, training=training, device=device)
        layers.append(Layer(T, N, I, H, R, directions, training, plan))
    return tuple(layers)
