"""Exchange torch.nn's recurrent modules for ours inside a model, in place, and back."""

import warnings

import torch
from torch.nn.utils.parametrize import is_parametrized

from lstm_fused import cells, nn

OURS = {ours._original: ours for ours in (*nn.MODULES, *cells.MODULES)}


def replace(model):
    """Make every ``torch.nn.LSTM`` inside model, or model itself, an ``lstm_fused.LSTM``.

    So too every ``GRU``, ``RNN``, ``LSTMCell``, ``GRUCell`` and ``RNNCell``.

    Only the modules' class changes: each stays the object it was, with the very same Parameters,
    buffers, hooks, mode, attributes, parametrizations, weight norm and pruning, and a module held
    in two places stays one. An optimizer built before goes on working. ``restore`` undoes it.

    Left alone, with a warning that names them: subclasses of these classes, modules whose
    ``forward`` was overridden on the instance, and modules compiled by TorchScript. Modules that
    ``model.modules()`` does not know, such as those kept in a plain list, are not found.

    Args:
        model: a ``torch.nn.Module``.

    Returns:
        model.

    Raises:
        TypeError: model is not a ``torch.nn.Module``.
    """
    left = _exchange(model, OURS)
    if left:
        warnings.warn(f"lstm_fused.replace left alone: {'; '.join(left)}", stacklevel=2)
    return model


def restore(model):
    """Make every ``lstm_fused.LSTM`` inside model a ``torch.nn.LSTM``, also those built as ours.

    So too every other module of ours.
    The inverse of ``replace``: again only the class changes. Also the way to hand a model to what
    knows torch's own modules only, or to a program without lstm_fused.

    Args:
        model: a ``torch.nn.Module``.

    Returns:
        model.

    Raises:
        TypeError: model is not a ``torch.nn.Module``.
    """
    _exchange(model, {ours: original for original, ours in OURS.items()})
    return model


def _exchange(model, classes):
    """Give each module the class its own is mapped to; returns what was left alone, and why."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    left = []
    known = dict(classes)
    for name, module in model.named_modules():
        cls = type(module)
        base = cls.__bases__[0]
        if reason := _why_left(module, classes, known):
            left.append(f"{name or 'the model'}, {reason}")
        elif cls in known:
            module.__class__ = known[cls]
        elif base in classes and is_parametrized(module):
            known[cls] = _rebase(cls, classes[base])
            module.__class__ = known[cls]
    return left


def _rebase(cls, base):
    """The class torch.nn.utils.parametrize made, on another base."""
    namespace = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, (base,), namespace)


def _why_left(module, classes, known):
    """Why a module that is of the old classes, or derived from one, keeps its class."""
    for old, new in classes.items():
        if isinstance(module, torch.jit.ScriptModule) and module.original_name == old.__name__:
            return "compiled by TorchScript"
        if not isinstance(module, old) or isinstance(module, new):
            continue
        if "forward" in module.__dict__:
            return "whose forward is overridden on the instance"
        cls = type(module)
        parametrized = cls.__bases__ == (old,) and is_parametrized(module)
        if cls not in known and not parametrized:
            return f"a {cls.__name__}, which is a subclass"
    return None
