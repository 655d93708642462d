"""How much of a loss reaches back to each step: d loss / d h_t, by running a layer step by step."""

from collections.abc import Callable

import torch
from torch import Tensor

from lstm_fused import call_options, errors
from lstm_fused.nn import MODULES

_KINDS = (*MODULES, torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN)


def gradient_flow(
    module: torch.nn.RNNBase,
    input: Tensor,
    hx: Tensor | tuple[Tensor, Tensor] | None = None,
    *,
    loss: Callable[[Tensor], Tensor] | None = None,
    resets: Tensor | None = None,
    reset_state: Tensor | tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """d loss / d h_t for every step, layer and direction of an LSTM, GRU or RNN.

    The layer is run one step a call, and every h_t is a tensor of its own that the next step, the
    layer above and the output are made from, so that autograd finds the whole of its gradient: what
    later steps hand back, and what the loss takes from h_t itself. Nothing is left in any
    ``.grad``.

    Sizes as in ``lstm_fused.LSTM``: T length, N batch, R ``proj_size`` or else ``hidden_size``,
    L ``num_layers``, D 2 if ``bidirectional`` else 1.

    Args:
        module: an LSTM, GRU or RNN of ``lstm_fused`` or of ``torch.nn``, with any of their options.
        input: (T, N, I), or (N, T, I) if ``batch_first``, or (T, I) for one sequence.
        hx: the states to begin with, as the module takes them; zeros if left out.
        loss: a callable from ``output``, laid out as the module returns it, to a tensor of one
            element. Left out, it is the sum of the last step's output.
        resets, reset_state: as our modules take them; also with a module of ``torch.nn``. A
            document of ``cu_seqlens`` is a row with a reset where it begins.

    Returns:
        (T, L*D, N, R), or (T, L*D, R) for one sequence: at each step what ``h_n`` is laid out as,
        in the dtype of the hidden state. A step that the loss does not depend on has zeros, such as
        those before a reset for a loss of later steps.
        ``flow[:, -1].norm(dim=-1)`` is (T, N): the norms in the last layer.

    Raises:
        TypeError: module is no such layer, or input is no tensor (a ``PackedSequence`` is none).
        ValueError: T is 0, or loss does not return a tensor of one element made from output; and
            whatever the module raises of an input, hx, resets or reset_state that does not fit.

    That the norms fall or grow with a power of the distance: Bengio, Simard and Frasconi, Learning
    Long-Term Dependencies with Gradient Descent is Difficult, 1994; Pascanu, Mikolov and Bengio,
    On the difficulty of training recurrent neural networks, 2013.
    """
    if not isinstance(module, _KINDS):
        raise TypeError(f"module must be an LSTM, GRU or RNN, got {type(module).__name__}")
    if not isinstance(input, torch.Tensor):
        raise TypeError(f"input must be a tensor, got {type(input).__name__}")
    with torch.inference_mode(False), torch.enable_grad():
        # Every h_t has a gradient, since it depends on input, even if all weights are frozen.
        input = input.detach().clone()
        _check(module, input, hx)
        input.requires_grad_()
        output, steps = _run_steps(module, input, hx, resets, reset_state)
        value = _last_sum(module, output) if loss is None else loss(output)
        if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.requires_grad:
            raise ValueError("loss must return a tensor of one element made from output")
        flat = [h for of_steps in steps for h in of_steps]
        gradients = torch.autograd.grad(value.sum(), flat, allow_unused=True)
    filled = [torch.zeros_like(h) if g is None else g for h, g in zip(flat, gradients, strict=True)]
    length = len(steps[0])
    # A list of (1, N, R) for each layer and direction -> (T, L*D, N, R).
    flow = torch.stack([torch.cat(filled[t::length]) for t in range(length)])
    return flow.squeeze(2) if input.dim() == 2 else flow


def _check(module, input, hx):
    """Have the module raise its errors for arguments that do not fit, on one step of the input."""
    time = 1 if module.batch_first and input.dim() == 3 else 0
    if input.dim() in (2, 3) and input.shape[time] == 0:
        raise ValueError("input must have at least one step")
    devices = [input.device] if input.is_cuda else []  # the CPU is always one
    with torch.no_grad(), torch.random.fork_rng(devices):
        module(input.narrow(time, 0, 1) if input.dim() in (2, 3) else input, hx)


def _last_sum(module, output):
    return output.select(1 if module.batch_first and output.dim() == 3 else 0, -1).sum()


def _run_steps(module, input, hx, resets, reset_state):
    """The output of the module, and of each layer and direction h_t (1, N, R) of every step."""
    single = input.dim() == 2
    swap = module.batch_first and not single
    x = input.unsqueeze(1) if single else input.transpose(0, 1) if swap else input
    resets = call_options.dense_resets(resets, x, input.dim(), module.batch_first)
    learned = module._learned_state() if isinstance(module, MODULES) else None
    begin = _states(module, hx if hx is not None else learned, x, single)
    after_reset = _states(module, reset_state if reset_state is not None else learned, x, single)
    directions = 2 if module.bidirectional else 1
    found = []
    for k in range(module.num_layers):
        if k:
            x = torch.nn.functional.dropout(x, module.dropout, module.training)
        for d in range(directions):
            row = slice(k * directions + d, k * directions + d + 1)
            states = [[s[row] for s in begin], [s[row] for s in after_reset]]
            found.append(_steps(_one_layer(module, k, d), x, *states, resets, backwards=d == 1))
        x = torch.cat([torch.cat(steps) for steps in found[-directions:]], dim=-1)
    return x.squeeze(1) if single else x.transpose(0, 1) if swap else x, found


def _states(module, given, x, single):
    """A state as given, or zeros for None, as a list of (L*D, N, width)."""
    rows = x.shape[1]
    widths = [module.proj_size or module.hidden_size, module.hidden_size]
    widths = widths if isinstance(module, torch.nn.LSTM) else widths[:1]
    if given is not None:
        if single and isinstance(given, torch.Tensor) and isinstance(module, torch.nn.LSTM):
            given = given.unbind()  # torch.nn.LSTM takes two states stacked
        return [s.detach() for s in errors.check_reset_state(module, given, rows, widths)]
    layers = module.num_layers * (2 if module.bidirectional else 1)
    return [x.new_zeros(layers, rows, width) for width in widths]


def _steps(layer, x, state, after_reset, resets, backwards):
    """h_t (1, N, R) of every step, in the order of time, each the start of the step after it."""
    rows = x.split(1)
    T = len(rows)
    found = [None] * T
    for t in reversed(range(T)) if backwards else range(T):
        boundary = t + 1 if backwards else t
        if resets is not None and boundary < T:
            anew = resets[boundary].unsqueeze(1)
            state = [torch.where(anew, *pair) for pair in zip(after_reset, state, strict=True)]
        _, state = layer(rows[t], tuple(state) if len(state) > 1 else state[0])
        state = [state] if isinstance(state, torch.Tensor) else state
        found[t] = state[0]
    return found


def _one_layer(module, k, d):
    """Layer k in direction d of the module as a separate layer, with its weights, frozen."""
    suffix = f"_l{k}{'_reverse' if d else ''}"
    kind = next(c for c in type(module).__mro__ if c in _KINDS)
    names = ["weight_ih", "weight_hh"]
    names += ["bias_ih", "bias_hh"] if module.bias else []
    names += ["weight_hr"] if module.proj_size else []
    weights = {f"{name}_l0": getattr(module, name + suffix).detach() for name in names}
    options = {"proj_size": module.proj_size} if module.proj_size else {}
    if issubclass(kind, torch.nn.RNN):
        options["nonlinearity"] = module.nonlinearity
    with torch.random.fork_rng(devices=[]):
        sizes = weights["weight_ih_l0"].shape[1], module.hidden_size
        layer = kind(*sizes, bias=module.bias, device="cpu", **options)
    layer.to(weights["weight_ih_l0"])
    layer.load_state_dict(weights)
    return layer.requires_grad_(False)
