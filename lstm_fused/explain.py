"""Say which kernel a call would run, without running it."""

import functools
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lstm_fused import _plan, call_options, checkpointing, padded, runtime
from lstm_fused.fallback import Fused
from lstm_fused.single_step import Cell

_KINDS = (torch.nn.RNNBase, torch.nn.RNNCellBase)


@dataclass(frozen=True)
class Layer:
    """One layer of a call, or a cell's step: its sizes, the plan of its forward pass (see
    ``runtime.plan``), and what the layer is predicted to take on the CPU.

    seconds: of the forward pass, and where training is true of the backward pass; None on a GPU.
    save_every: how many steps lie between the states kept for backward; 1 keeps every step.
    kept_bytes: what is kept for backward beside arguments and results; without ``checkpoint_every``
    it would be kept_bytes_of_every_step.
    """

    T: int
    N: int
    I: int  # noqa: E741
    H: int
    R: int
    directions: int
    training: bool
    plan: _plan.Plan | Any  # Any: CudaPlan, on a GPU
    seconds: tuple[float, ...] | None = None
    save_every: int = 1
    kept_bytes: int = 0
    kept_bytes_of_every_step: int = 0

    def __str__(self) -> str:
        sizes = f"T={self.T} N={self.N} I={self.I} H={self.H}"
        sizes += f" R={self.R}" if self.R != self.H else ""
        sizes += ", two directions" if self.directions == 2 else ""
        return f"{sizes}{self._kept() if self.training else ''}: {self.plan}"

    def _kept(self):
        if self.save_every == 1:
            return ", keeps gates for backward"
        return (
            f", keeps the states of every {self.save_every} steps for backward "
            f"({_size(self.kept_bytes)} in place of {_size(self.kept_bytes_of_every_step)})"
        )

    def prediction(self, total: float) -> str:
        """The predicted times, and their share of `total` seconds, in words."""
        seconds = self.seconds or ()
        passes = zip(("forward", "backward"), seconds, strict=False)
        times = ", ".join(f"{_duration(s)} {name}" for name, s in passes)
        share = f" ({sum(seconds) / total:.0%} of all)" if total > sum(seconds) else ""
        return f"predicted {times}{share}"


@dataclass(frozen=True)
class Call:
    """One call of an LSTM, GRU or RNN or of a cell: what would run fused, or why torch would.

    layers: a ``Layer`` for each layer, one for a single-step cell.
    options: what the call's options beyond torch.nn do, a sentence each.
    """

    name: str
    module: str
    reason: str | None
    layers: tuple[Layer, ...]
    step: bool = False
    options: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """The predicted time of all layers; 0 where there is none."""
        return sum(sum(layer.seconds or ()) for layer in self.layers)

    def __str__(self) -> str:
        return self.text(self.seconds)

    def text(self, total: float) -> str:
        """As printed, where all calls are predicted to take `total` seconds."""
        head = f"{self.name}: {self.module}" if self.name else self.module
        if self.reason is not None:
            through = "its reference in pure torch" if self.options else "torch"
            return f"{head}\n  runs through {through}: {self.reason}"
        names = ["step"] if self.step else [f"layer {k}" for k in range(len(self.layers))]
        lines = [head, *(f"  {option}" for option in self.options)]
        for name, layer in zip(names, self.layers, strict=True):
            lines.append(f"  {name}: {layer}")
            lines += [f"    {layer.prediction(total)}"] if layer.seconds else []
        return "\n".join(lines)


@dataclass(frozen=True)
class Explanation:
    """What ``explain`` found, one ``Call`` for each call of a layer or cell.

    Prints as text, calls that are alike once.
    """

    calls: tuple[Call, ...]

    def __str__(self) -> str:
        total = sum(call.seconds for call in self.calls)
        counts = Counter(call.text(total) for call in self.calls)
        texts = [f"{text}\n  called {n} times" if n > 1 else text for text, n in counts.items()]
        return "\n".join(texts) or "no LSTM, GRU, RNN or single-step cell was called"


def explain(
    model: torch.nn.Module,
    input: Any,
    hx: Tensor | tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> Explanation:
    """Say which kernel, instruction set, thread partition and tile would run, or why torch would.

    Args:
        model: an ``lstm_fused.LSTM``, ``GRU`` or ``RNN``, a single-step cell of these (or
            torch.nn's), or a module that holds some. A layer or cell is not run. Another module is
            run once on input, in evaluation mode, without gradients and leaving the random state as
            it was, to see what its layers and cells are given.
        input: what model is called with; for a module that is no layer or cell a tuple is its
            positional and a dict its keyword arguments.
        hx: the states, ``(h_0, c_0)`` of an LSTM, else ``h_0``; None for any other module.
        options: further keyword arguments of a layer's call, such as ``lengths``, ``resets``,
            ``cu_seqlens`` and ``checkpoint_every``.

    Returns:
        An ``Explanation``; ``print`` it, or read ``.calls[i].reason`` and
        ``.calls[i].layers[k].plan``. A layer counts as training if autograd would record it now.

    Raises:
        TypeError: model is not a ``torch.nn.Module``, or hx or options are given with one that is
            no layer or cell.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    grad = torch.is_grad_enabled()
    if isinstance(model, _KINDS):
        return Explanation((_explain_call("", grad, model, (input, hx), options),))
    for argument in (["hx"] if hx is not None else []) + list(options):
        raise TypeError(
            f"{argument} goes with a layer or a cell, model is a {type(model).__name__}"
        )
    calls = []

    def note(name, module, args, kwargs):
        calls.append(_explain_call(name, grad, module, args, kwargs))

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, _KINDS)]
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
    text = repr(module)
    if not isinstance(module, Fused):
        return Call(name, text, "it is not of lstm_fused, see lstm_fused.replace", ())
    if isinstance(module, Cell):
        return _explain_step(name, text, grad, module, *args, **kwargs)
    input, hx, lengths, options = _arguments(*args, **kwargs)
    given, documents = call_options.from_call(module, lengths, **options)
    packed = isinstance(input, PackedSequence)
    x, batch_sizes = (input.data, input.batch_sizes) if packed else (input, None)
    weights = module._weights()
    state = () if hx is None else module._as_state(hx)
    if reason := module._fallback_reason(x, hx, weights):
        return Call(name, text, reason, (), options=_sentences(module, given, documents, x, False))
    if packed:
        T, N = len(batch_sizes), int(batch_sizes[0])
    elif documents is not None:
        packed = not padded.stays_on_device(x)
        T, N = _sizes_of_documents(*documents, packed)
    elif x.dim() == 2:
        T, N = x.shape[0], 1
    else:
        T, N = x.shape[:2] if not module.batch_first else (x.shape[1], x.shape[0])
    plain = given is None and documents is None and lengths is None and not packed
    if plain and (reason := module._cudnn_reason(x, T, N, state, weights)):
        return Call(name, text, f"plan cudnn: {reason}", ())
    on_device = isinstance(lengths, Tensor) and padded.stays_on_device(lengths)
    lengths = torch.as_tensor([] if lengths is None or on_device else lengths)
    if lengths.numel() and int(lengths.min()) < T:  # else it runs as if there were no lengths
        packed, T, N = True, max(1, int(lengths.max())), int((lengths > 0).sum())
    dtype = x.dtype
    quantized = module.weights_dtype is not None
    if quantized:
        dtype = torch.float32
    elif torch.is_autocast_enabled(x.device.type):
        dtype, _ = module._autocast_dtypes(x, packed, state, weights, grad)
    tensors = (x, *state, *weights)
    training = grad and not quantized and any(t.requires_grad for t in tensors)
    every = given.checkpoint_every if given else None
    every = module.checkpoint_every if every is None else every
    every = None if packed else every  # packed data keeps every step
    layers = _layers(module, x.device, dtype, T, N, training, every)
    return Call(name, text, None, layers, options=_sentences(module, given, documents, x, True))


def _sizes_of_documents(cu_seqlens, max_seqlen, in_place):
    """T and N of the kernel's call."""
    N = cu_seqlens.shape[0] - 1
    if max_seqlen is not None and not in_place:
        return max_seqlen, N
    return int(cu_seqlens.diff().max()), N


def _sentences(module, given, documents, x, fused):
    """What the options of a call do."""
    if given is None:
        return ()
    found = []
    if documents is not None:
        in_place = "read in place" if not fused or not padded.stays_on_device(x) else None
        found.append(f"documents: {in_place or 'copied to rows of max_seqlen steps and back'}")
    if given.resets is not None:
        where = "in the kernel" if fused else "step by step"
        state = "the learned initial state" if module.learned_initial_state else "zeros"
        state = state if given.reset_state is None else "reset_state"
        found.append(f"resets: {where}, to {state}")
    if given.cell_states:
        found.append("cell states: of every step, of the last layer")
    return tuple(found)


def _explain_step(name, text, grad, module, input, hx=None):
    """As _explain_call, of a single-step cell."""
    quantized = module.weights_dtype is not None
    input = input.to(torch.float32) if quantized else input
    state = () if hx is None else module._state(input, hx)
    if not module._fits(input, state):
        return Call(name, text, "input or hx does not fit, as torch.nn will say", (), step=True)
    weights = module._weights()
    if reason := module._fallback_reason(input, state, weights):
        return Call(name, text, reason, (), step=True)
    N = 1 if input.dim() == 1 else input.shape[0]
    H = module.hidden_size
    sizes = (1, N, module.input_size, H, H, 1)
    tensors = (input, *state, *weights)
    training = grad and not quantized and any(t.requires_grad for t in tensors)
    layer = _layer(module, input.dtype, sizes, training, input.device)
    return Call(name, text, None, (layer,), step=True)


def _arguments(input, hx=None, lengths=None, **options):
    return input, hx, lengths, options


def _layers(module, device, dtype, T, N, training, checkpoint_every):
    directions = 2 if module.bidirectional else 1
    H, R = module.hidden_size, module.proj_size or module.hidden_size
    layers = []
    for k in range(module.num_layers):
        I = directions * R if k else module.input_size  # noqa: E741
        sizes = (T, N, I, H, R, directions)
        layers.append(_layer(module, dtype, sizes, training, device, checkpoint_every))
    return tuple(layers)


def _layer(module, dtype, sizes, training, device, checkpoint_every=None):
    cell, weights = module._cell(), module.weights_dtype
    plan = runtime.plan(cell, dtype, *sizes, training=training, device=device, weights=weights)
    kept = {}
    if training:
        T, N, _, H, R, directions = sizes
        every = checkpointing.interval(checkpoint_every, cell, T, N, H, R)
        itemsize = 8 if dtype is torch.float64 else 4  # of the compute dtype
        block = _plan.block if device.type == "cpu" else 1
        both = [
            checkpointing.kept_bytes(cell, T, N, H, R, directions, k, itemsize, block)
            for k in (every, 1)
        ]
        kept = {"save_every": every, "kept_bytes": both[0], "kept_bytes_of_every_step": both[1]}
    if device.type != "cpu":
        return Layer(*sizes, training, plan, **kept)
    plans = [plan]
    if training:
        plans.append(runtime.plan(cell, dtype, *sizes, backward=True))
    return Layer(*sizes, training, plan, tuple(p.nanoseconds / 1e9 for p in plans), **kept)


def _size(count):
    """Bytes in two digits and a unit."""
    scale, unit = (1e9, "GB") if count >= 1e9 else (1e6, "MB") if count >= 1e6 else (1e3, "kB")
    return f"{float(f'{count / scale:.2g}'):g} {unit}"


def _duration(seconds):
    """Two digits and a unit."""
    scale, unit = (1, "s") if seconds >= 1 else (1e3, "ms") if seconds >= 1e-3 else (1e6, "us")
    return f"{float(f'{seconds * scale:.2g}'):g} {unit}"
