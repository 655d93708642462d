"""Exchange torch.nn's recurrent modules for ours inside a model, in place, and back."""

import types
import warnings
from typing import Any, TypeVar

import torch
from torch.nn.utils.parametrize import is_parametrized

from lstm_fused import nn, single_step
from lstm_fused.fallback import CALLED_BY_TORCH, Fused, overridden
from lstm_fused.recurrent import Recurrent

M = TypeVar("M", bound=torch.nn.Module)
OURS: dict[type[torch.nn.Module], type[Fused[Any]]] = {
    ours._torch_class: ours for ours in (*nn.MODULES, *single_step.MODULES)
}


def replace(model: M, *, verbose: bool = False) -> M:
    """Make every ``torch.nn.LSTM`` inside model, or model itself, an ``lstm_fused.LSTM``.

    So too every ``GRU``, ``RNN``, ``LSTMCell``, ``GRUCell`` and ``RNNCell``, and what is of a class
    derived from these without a ``forward`` of its own: it gets a class of the same name that is
    derived from both, so that its methods, ``isinstance`` and ``super()`` work as before, and that
    can be pickled where its own could.

    Only the modules' class changes: each stays the object it was, with the very same Parameters,
    buffers, hooks, mode, attributes, parametrizations, weight norm and pruning, and a module held
    in two places stays one. An optimizer built before goes on working. ``restore`` undoes it.

    Left alone, with a warning that names them and says why: modules with a ``forward`` of their
    own, or with another method of their own that torch.nn's forward calls and ours does not
    (``check_input`` ours calls, too); modules compiled by TorchScript, and those that
    ``fully_shard`` has given a class. Modules that ``model.modules()`` does not know, such as those
    kept in a plain list, are not found.

    Args:
        model: a ``torch.nn.Module``.
        verbose: print what was replaced, what was left alone and why, in place of the warning.
            A replaced module whose calls run through torch all the same has the reason beside it.

    Returns:
        model.

    Raises:
        TypeError: model is not a ``torch.nn.Module``.
    """
    return exchange(model, fused_class, "replace", verbose)


def restore(model: M, *, verbose: bool = False) -> M:
    """Make every ``lstm_fused.LSTM`` inside model a ``torch.nn.LSTM``, also those built as ours.

    So too every other module of ours; one of a class of the user's gets the very class it had.
    The inverse of ``replace``: again only the class changes. Also the way to hand a model to what
    knows torch's own modules only, or to a program without lstm_fused.

    Left alone, with a warning that names them: modules of a class that the user has derived from
    ours, those with a learned initial state, and those that ``fully_shard`` has given a class.
    Modules with quantized weights are dequantized, see ``dequantize_``.

    Args:
        model: a ``torch.nn.Module``.
        verbose: print what was restored, and what was left alone and why, in place of the warning.

    Returns:
        model.

    Raises:
        TypeError: model is not a ``torch.nn.Module``.
    """
    return exchange(model, _torch_class, "restore", verbose)


def restore_unquantized(model):
    """`restore` but for modules with quantized weights and those of cells that torch.nn has not,
    which stay as they are."""

    def class_for(module):
        stays = isinstance(module, Fused) and (
            module.weights_dtype is not None or module._torch_class is None
        )
        return None if stays else _torch_class(module)

    return exchange(model, class_for, "restore", False)


class LeftAlone(Exception):
    """Raised for a module that keeps its class; the message says why."""


def check_model(model):
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def exchange(model, class_for, caller, verbose):
    check_model(model)
    changed, left, silent = [], [], []
    for name, module in model.named_modules():
        name = name or "the model"
        try:
            cls = class_for(module)
            if cls is not None:
                become(module, cls)
                changed.append((name, module))
            elif verbose and (reason := _reason_to_keep(module)):
                silent.append(f"{name}, {reason}")
        except LeftAlone as reason:
            left.append(f"{name}, {reason}")
    if verbose:
        _print_report(caller, changed, left + silent)
    elif left:
        warnings.warn(f"lstm_fused.{caller} left alone: {'; '.join(left)}", stacklevel=3)
    return model


def _print_report(caller, changed, left):
    """changed: (name, module) each; left: a text for each module."""
    print(f"lstm_fused.{caller}: {len(changed)} {caller}d, {len(left)} left alone")
    for name, module in changed:
        cls = plain_class(module)
        theirs = next(theirs for theirs in OURS if isinstance(module, theirs))
        own = "" if cls in (theirs, OURS[theirs]) else f", derived from {theirs.__name__}"
        reason = _reason_for_torch(module) if isinstance(module, Fused) else None
        through = f", which runs through torch as it is now: {reason}" if reason else ""
        print(f"  {caller}d {name}: {cls.__name__}{own}{through}")
    for text in left:
        print(f"  left alone {text}")


def _reason_to_keep(module):
    """Why a module that looks like one to exchange needs none; None for any other module."""
    cls = type(module)
    if isinstance(module, Fused):
        return f"a {cls.__name__}, which is of lstm_fused already"
    if isinstance(module, tuple(OURS)):
        return f"a {cls.__name__}, which is not of lstm_fused"
    if cls.__name__ in {theirs.__name__ for theirs in OURS}:
        return f"a {cls.__name__} of {cls.__module__}, which is not derived from torch.nn's"
    return None


def _reason_for_torch(module):
    """Why calls with an input on the weights' device and of their dtype run through torch."""
    weights = list(module.parameters())  # of parametrized ones the originals: nothing is evaluated
    return module._fallback_reason(weights[0], None, weights) if weights else None


def become(module, cls):
    """Change module's class to cls, or to a parametrized class derived from cls."""
    quantized = getattr(module, "weights_dtype", None) is not None
    if quantized:
        module._become_plain()
    if plain_class(module) is not type(module):
        cls = _rebase(type(module), cls)
    try:
        module.__class__ = cls
    except TypeError as error:  # the class has __slots__
        raise LeftAlone(f"a {type(module).__name__}: {error}") from None
    module.__dict__.pop("_overridden", None)
    if isinstance(module, Recurrent):
        module._find_overridden()
    if quantized and isinstance(module, torch.nn.RNNBase):
        module._init_flat_weights()


def plain_class(module):
    """The module's class, without the subclass that torch.nn.utils.parametrize made of it."""
    cls = type(module)
    base = cls.__bases__[0]
    if is_parametrized(module) and cls.__name__ == f"Parametrized{base.__name__}":
        return base
    return cls


def _rebase(cls, base):
    """The class that torch.nn.utils.parametrize made, with another base."""
    namespace = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, (base,), namespace)


def fused_class(module):
    """The fused class for a module; None if it is fused already or not recurrent."""
    if isinstance(module, torch.jit.ScriptModule):
        if module.original_name in {theirs.__name__ for theirs in OURS}:
            raise LeftAlone("compiled by TorchScript")
        return None
    ours = next((ours for theirs, ours in OURS.items() if isinstance(module, theirs)), None)
    if ours is None or isinstance(module, Fused):
        return None
    check_not_wrapped(module)
    cls = plain_class(module)
    called = ("forward", *(CALLED_BY_TORCH if issubclass(ours, Recurrent) else ()))
    matters = [name for name in called if name != "check_input"]
    for name in matters:
        if name in module.__dict__:
            raise LeftAlone(f"whose {name} is overridden on the instance")
    if cls is ours._torch_class:
        return ours
    if own := overridden(cls, ours._torch_class, matters):
        raise LeftAlone(f"a {cls.__name__}, which overrides {', '.join(own)}")
    if taken := [name for name in _names_of(ours) if hasattr(module, name)]:
        raise LeftAlone(f"a {cls.__name__}, which has {', '.join(taken)}, as lstm_fused has")
    try:
        return derived(ours, cls)
    except TypeError as error:
        raise LeftAlone(f"a {cls.__name__}, which cannot be derived from: {error}") from None


def _torch_class(module):
    """torch.nn's or the user's class for a fused module; None for any other module."""
    if not isinstance(module, Fused):
        return None
    if module._torch_class is None:
        raise LeftAlone(f"a {module._kind()}, which torch.nn has not")
    check_not_wrapped(module)
    cls = float_class(plain_class(module))
    if getattr(module, "learned_initial_state", False):
        raise LeftAlone(f"a {cls.__name__} with a learned initial state, which torch.nn has not")
    if cls in OURS.values():
        return cls._torch_class
    if "_user_class" in vars(cls):
        return cls._user_class
    raise LeftAlone(f"a {cls.__name__}, which is derived from lstm_fused's own class")


def float_class(cls):
    """The class that a module with quantized weights had before; cls itself without these."""
    if cls._float_class is None:
        return cls
    if "_user_class" not in vars(cls):
        return cls._float_class
    user = cls._user_class
    return user if issubclass(user, Fused) else derived(cls._float_class, user)


def check_not_wrapped(module):
    """Refuse a module whose class torch.distributed made and keeps track of."""
    for cls in type(module).__mro__:
        if cls.__module__.startswith("torch.distributed"):
            raise LeftAlone(
                f"a {type(module).__name__}, whose class torch.distributed made ({cls.__name__})"
            )


def _names_of(ours):
    """The attribute names that our classes use internally; a user's class must not define them.

    Methods that torch.nn's classes have too call those of the user's class. init_state, which
    nothing of ours calls on a module, is the user's where there is one.
    """
    names = {name for cls in ours.__mro__ if issubclass(cls, Fused) for name in vars(cls)}
    free = ("init_state", *dir(ours._torch_class))
    return sorted(name for name in names if name not in free and not name.startswith("__"))


class _Derived:
    """Pickling for classes made by derived, which pickle cannot find by name."""

    def __reduce_ex__(self, protocol):
        make, args, *rest = super().__reduce_ex__(protocol)
        cls = type(self)
        if args and args[0] is cls and "_user_class" in vars(cls):
            make, args = _make_derived, (cls._fused_class, cls._user_class, make, *args[1:])
        return make, args, *rest


def derived(ours, theirs):
    """A class derived from ours and from theirs, a user's class, with the name of theirs.

    What theirs overrides is overridden if it is derived from a class of ours.
    """
    for cls in type.__subclasses__(theirs):
        known = vars(cls)
        if known.get("_user_class") is theirs and known.get("_fused_class") is ours:
            return cls

    def fill(namespace):
        for name in ("__module__", "__qualname__", "__doc__"):
            namespace[name] = getattr(theirs, name)
        namespace["_user_class"], namespace["_fused_class"] = theirs, ours
        if hasattr(theirs, "init_state"):
            namespace["init_state"] = theirs.init_state

    bases = (theirs, ours) if issubclass(theirs, Fused) else (ours, theirs)
    return types.new_class(theirs.__name__, (_Derived, *bases), exec_body=fill)


def _make_derived(ours, theirs, make, *args):
    return make(derived(ours, theirs), *args)
