"""Recurrent policies of sb3-contrib and torchrl: a rollout is one call of a fused layer.

Episodes end inside a rollout. Where one does, sb3-contrib runs its LSTM in a Python loop, one step
a call, and torchrl splits the rollout and pads its pieces to one length. Here the layer is told
where episodes begin and runs once: sb3-contrib's ``episode_starts`` are its ``resets``, what
torchrl's ``is_init`` marks the first steps of are its documents.
"""

import functools
import importlib
import sys
import warnings
from typing import Any, TypeVar

import torch

from lstm_fused.fallback import overridden
from lstm_fused.recurrent import Recurrent
from lstm_fused.replace import derived
from lstm_fused.replace import replace as replace_modules
from lstm_fused.replace import restore as restore_modules

M = TypeVar("M")


def replace(model: M, *, verbose: bool = False) -> M:
    """``lstm_fused.replace`` for a recurrent policy of sb3-contrib or torchrl, episodes included.

    Inside model, sb3-contrib's ``RecurrentActorCriticPolicy`` and torchrl's ``LSTMModule`` and
    ``GRUModule`` get a class of the same name derived from theirs, which hands a whole rollout to
    the layer together with the steps at which episodes begin. They compute what they did, up to
    rounding: parameters, ``state_dict``, optimizer and files saved by the library stay what they
    are. A policy that is loaded from a file is as the library makes it, and needs this call again.

    Call it before a loss module of torchrl is made from the policy: the loss keeps a copy.

    A policy whose class overrides the method in question is left alone, with a warning; only the
    layers in it are replaced. While ``torch.compile`` traces, torchrl's modules run as theirs.

    Args:
        model: a ``RecurrentPPO`` of sb3-contrib or another object with a policy as ``policy``, or
            a ``torch.nn.Module`` that is or holds policies of either library.
        verbose: as of ``lstm_fused.replace``.

    Returns:
        model.

    Raises:
        TypeError: model is neither a ``torch.nn.Module`` nor has one as ``policy``.
        ValueError: model holds no recurrent policy of either library.
    """
    root = _root(model)
    found = [(name, *kind) for name, m in root.named_modules() if (kind := _kind(m))]
    if not found:
        raise ValueError(
            f"model must hold a recurrent policy of sb3-contrib or torchrl, the "
            f"{type(root).__name__} given holds none (lstm_fused.replace takes any model)"
        )
    replace_modules(root, verbose=verbose)
    left = []
    for name, module, theirs, ours in found:
        if isinstance(module, ours):
            continue
        names = ours._overrides
        own = {*overridden(type(module), theirs, names), *(n for n in names if n in vars(module))}
        if own:
            text = f"{name or 'the model'}, a {type(module).__name__}"
            left.append(f"{text}, with its own {', '.join(sorted(own))}")
        else:
            module.__class__ = derived(ours, type(module))
    if left:
        warnings.warn(f"lstm_fused.rl.replace left alone: {'; '.join(left)}", stacklevel=2)
    return model


def restore(model: M, *, verbose: bool = False) -> M:
    """The inverse of ``replace``: the policy and its layers are of the classes they had.

    Args:
        model, verbose: as of ``replace``.

    Returns:
        model.

    Raises:
        TypeError: model is neither a ``torch.nn.Module`` nor has one as ``policy``.
    """
    root = _root(model)
    for module in root.modules():
        if isinstance(module, _Rollouts):
            module.__class__ = type(module)._user_class
    restore_modules(root, verbose=verbose)
    return model


def _root(model):
    """The module that model is or has as its policy."""
    root = model if isinstance(model, torch.nn.Module) else getattr(model, "policy", None)
    if not isinstance(root, torch.nn.Module):
        raise TypeError(
            "model must be a torch.nn.Module or have one as its attribute policy, "
            f"got {type(model).__name__}"
        )
    return root


def _kind(module):
    """(module, the library's class it is of, our class to derive from), or None."""
    for (library, name), ours in _KINDS.items():
        theirs = getattr(sys.modules.get(library), name, None)
        if theirs is not None and isinstance(module, theirs):
            return module, theirs, ours
    return None


class _Rollouts:
    """What `replace` puts before a library's class in the order of bases."""

    _user_class: Any = None  # the library's, or one derived from it
    _overrides: tuple[str, ...] = ()  # the methods of the library's class in question


class _ActorCriticPolicy(_Rollouts):
    """Before sb3-contrib's RecurrentActorCriticPolicy."""

    _overrides = ("_process_sequence",)

    def _process_sequence(self, features, lstm_states, episode_starts, lstm):
        """Sizes: N environments or pieces of a rollout, T steps of each, L layers.

        features: (N*T, I), the steps of a row one after the other; lstm_states: (h, c), each
        (L, N, H), those before the first steps; episode_starts: (N*T,), not 0 where a row begins
        anew before the step. Returns the output (N*T, H) and the states after the last steps.
        """
        if not isinstance(lstm, Recurrent):
            return super()._process_sequence(features, lstm_states, episode_starts, lstm)
        rows = lstm_states[0].shape[1]
        x = features.reshape(rows, -1, lstm.input_size).transpose(0, 1)
        if x.shape[0] == 1:  # a step of a rollout: its states are reset for less than resets= costs
            kept = (1.0 - episode_starts).view(1, rows, 1)
            y, ends = lstm(x, (kept * lstm_states[0], kept * lstm_states[1]))
        else:
            starts = episode_starts.reshape(rows, -1).transpose(0, 1) != 0
            y, ends = lstm(x, lstm_states, resets=starts)
        return y.transpose(0, 1).flatten(0, 1), ends


class _Module(_Rollouts):
    """Before torchrl's LSTMModule and GRUModule."""

    _layer = ""  # the attribute that holds the layer

    def forward(self, *args, **kwargs):
        if torch.compiler.is_compiling():  # shapes of documents depend on values
            return super().forward(*args, **kwargs)
        return _dispatched()(self, *args, **kwargs)

    def _forward(self, tensordict):
        """Sizes: B the batch without its last dimension T, S = B*T steps, K episodes, L layers.

        Reads the input (*B, T, I), ``is_init`` (*B, T, 1) and the states before each step
        (*B, T, L, H). A piece of a row begins at its first step and where is_init is set, with the
        states that the tensordict holds there. Writes the output, and the states after the last
        step of each piece among zeros.
        """
        layer, shape = getattr(self, self._layer), tensordict.shape
        if not (self.recurrent_mode and isinstance(layer, Recurrent) and shape.numel()):
            return super().forward(tensordict)
        x, *states = [tensordict.get(key, None) for key in self.in_keys[: 1 + layer._states]]
        if x is None or any(s is None for s in states):
            return super().forward(tensordict)
        starts = tensordict.get("is_init").reshape(-1, shape[-1]).clone()
        starts[:, 0] = True
        starts = starts.flatten().nonzero().squeeze(1)
        ends = torch.cat([starts[1:], starts.new_tensor([shape.numel()])])
        first = [s.flatten(0, -3)[starts].transpose(0, 1) for s in states]  # (L, K, H)
        y, last = layer(
            x.flatten(0, -2),
            layer._as_given(first),
            cu_seqlens=torch.cat([starts[:1], ends]),
        )
        tensordict.set(self.out_keys[0], y.unflatten(0, shape))
        for key, s in zip(self.out_keys[1:], layer._as_state(last), strict=True):
            s = s.transpose(0, 1)
            steps = s.new_zeros(shape.numel(), *s.shape[1:]).index_copy(0, ends - 1, s)
            tensordict.set(key, steps.unflatten(0, shape))
        return tensordict


class _LSTMModule(_Module):
    _overrides = ("forward", "_lstm")
    _layer = "lstm"


class _GRUModule(_Module):
    _overrides = ("forward", "_gru")
    _layer = "gru"


@functools.cache
def _dispatched():
    """_Module._forward as torchrl has its own: it also takes tensors in place of a tensordict."""

    def forward(self, tensordict):
        return self._forward(tensordict)

    return importlib.import_module("tensordict.nn").dispatch(forward)


_KINDS = {
    ("sb3_contrib.common.recurrent.policies", "RecurrentActorCriticPolicy"): _ActorCriticPolicy,
    ("torchrl.modules", "LSTMModule"): _LSTMModule,
    ("torchrl.modules", "GRUModule"): _GRUModule,
}
