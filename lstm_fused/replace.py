"""Exchange torch.nn.LSTM for lstm_fused.LSTM inside a model, in place, and back."""

import warnings

import torch
from torch.nn.utils.parametrize import is_parametrized

from lstm_fused.nn import LSTM


def replace(model):
    """Make every ``torch.nn.LSTM`` inside model, or model itself, an ``lstm_fused.LSTM``.

    Only the modules' class changes: each stays the object it was, with the very same Parameters,
    buffers, hooks, mode, attributes, parametrizations, weight norm and pruning, and a module held
    in two places stays one. An optimizer built before goes on working. ``restore`` undoes it.

    Left alone, with a warning that names them: subclasses of ``torch.nn.LSTM``, modules whose
    ``forward`` was overridden on the instance, and LSTMs compiled by TorchScript. Modules that
    ``model.modules()`` does not know, such as those kept in a plain list, are not found.

    Args:
        model: a ``torch.nn.Module``.

    Returns:
        model.

    Raises:
        TypeError: model is not a ``torch.nn.Module``.
    """
    left = _exchange(model, torch.nn.LSTM, LSTM)
    if left:
        warnings.warn(f"lstm_fused.replace left alone: {'; '.join(left)}", stacklevel=2)
    return model


def restore(model):
    """Make every ``lstm_fused.LSTM`` inside model a ``torch.nn.LSTM``, also those built as ours.

    The inverse of ``replace``: again only the class changes. Also the way to hand a model to what
    knows torch's own operators only, such as an ONNX export or a program without lstm_fused.

    Args:
        model: a ``torch.nn.Module``.

    Returns:
        model.

    Raises:
        TypeError: model is not a ``torch.nn.Module``.
    """
    _exchange(model, LSTM, torch.nn.LSTM)
    return model


def _exchange(model, old, new):
    """Give modules of class old the class new; returns what was left alone, and why."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    left = []
    classes = {old: new}
    for name, module in model.named_modules():
        cls = type(module)
        if "forward" in module.__dict__ and issubclass(cls, old) and not issubclass(cls, new):
            left.append(f"{name or 'the model'}, whose forward is overridden on the instance")
        elif cls in classes:
            module.__class__ = classes[cls]
        elif cls.__bases__ == (old,) and is_parametrized(module):
            classes[cls] = _rebase(cls, new)
            module.__class__ = classes[cls]
        elif reason := _why_left(module, old, new):
            left.append(f"{name or 'the model'}, {reason}")
    return left


def _rebase(cls, base):
    """The class torch.nn.utils.parametrize made, on another base."""
    namespace = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, (base,), namespace)


def _why_left(module, old, new):
    if isinstance(module, old) and not isinstance(module, new):
        return f"a {type(module).__name__}, which is a subclass"
    if isinstance(module, torch.jit.ScriptModule) and module.original_name == old.__name__:
        return "compiled by TorchScript"
    return None
