"""When a module's call runs through torch.nn's own forward, and the warning that says why."""

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from lstm_fused import cuda

State = TypeVar("State")  # the states of a module as its user passes and receives them

_FUSED_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
_PLAIN_TYPES = frozenset((Tensor, Parameter))
TRACED = "torch.jit.trace records torch's op, for programs without lstm_fused"
_warned: set[str] = set()
# Methods that torch.nn's forward of a layer calls on the module. Our forward calls the first of
# them too. A module that overrides one of the others runs through torch.
CALLED_BY_TORCH = (
    "check_input",
    "check_forward_args",
    "check_hidden_size",
    "get_expected_hidden_size",
    "get_expected_cell_size",
    "permute_hidden",
    "_update_flat_weights",
    "_weights_have_changed",
    "_init_flat_weights",
)


def fallback_reason(x, hx, weights):
    """Why torch's own module would run on these tensors, or None when the fused kernels would.

    x: the input's data (T, N, I), (N, T, I), (T, I) or packed (S, I); hx: what was given as such,
    not yet checked; weights: every weight of the module.
    """
    if not x.is_cpu and (reason := _device_reason(x.device)):
        return reason
    if x.dtype not in _FUSED_DTYPES:
        return f"the fused kernels have no {x.dtype}"
    states = hx if isinstance(hx, (tuple, list)) else () if hx is None else (hx,)
    if x.is_nested:
        return "the input is a nested tensor"
    for t in (x, *states):
        if isinstance(t, Tensor) and t.layout is not torch.strided:
            name = "the input's" if t is x else "a state's"
            return f"{name} layout is {t.layout}, the fused kernels need strided tensors"
    if torch.compiler.is_compiling():
        return None
    if torch.jit.is_tracing() and not torch.onnx.is_in_onnx_export():
        return TRACED
    for t in (x, *weights):
        same = t.is_cpu if x.is_cpu else isinstance(t, Tensor) and t.device == x.device
        if (type(t) not in _PLAIN_TYPES or not same) and (reason := _tensor_reason(t, x)):
            return reason
    return None


def _device_reason(device):
    if device.type != "cuda":
        return f"the input is on {device}, the fused kernels run on cpu and cuda"
    # While compiling, the operator itself refuses a device that is too old.
    reason = None if torch.compiler.is_compiling() else cuda.unsupported_reason(device)
    return reason and f"the input is on {device}: {reason}"


def _tensor_reason(t, x):
    from torch._subclasses.fake_tensor import FakeTensor

    if not isinstance(t, Tensor):
        return f"a weight is {t}"
    if t.device != x.device:
        return f"a weight is on {t.device}, the input on {x.device}"
    if type(t) in _PLAIN_TYPES or isinstance(t, FakeTensor):
        return None
    return f"{type(t).__name__} is a Tensor subclass"


if TYPE_CHECKING:

    class _Typed(Generic[State]):
        forward: Callable[..., Any]  # torch.nn's

else:

    class _Typed:
        """Without Generic, which changes the layout of objects: replace assigns __class__."""

        def __class_getitem__(cls, states):
            return cls


class Fused(_Typed[State]):
    """A mixin before torch.nn's class: what every fused module does where its kernels do not run.

    A subclass names that class as ``_torch_class``, None where torch.nn has none: the reference
    stands in for it then, see by_reference.py. A subclass that ``lstm_fused.replace`` made
    from a user's class names that as ``_user_class``.
    """

    _torch_class: Any = None
    _user_class: Any = None
    # Of a module that quantize_ has changed torch.int8 or torch.bfloat16, and the class it had.
    weights_dtype: torch.dtype | None = None
    _float_class: Any = None

    def __init_subclass__(cls, **options: Any) -> None:
        if "_user_class" not in vars(cls):  # the user's class has been announced before
            super().__init_subclass__(**options)

    @classmethod
    def _kind(cls):
        """What messages call a module of this class: as torch.nn does."""
        return cls._torch_class.__name__

    def _fallback_reason(self, x, hx, weights):
        """Why a call runs through torch.nn's forward, or None; the arguments of fallback_reason."""
        return fallback_reason(x, hx, weights)

    def _input_dtype(self, weights):
        """The dtype of input and states that the layers of these weights take."""
        return weights[0].dtype

    def _layer(self, run):
        """What runs a layer with the module's weights where run, `ops.layer` or its like, would."""
        return run

    def _through_torch(self, reason, input, hx):
        """torch.nn's own forward, and a warning that says why the first time."""
        result = super().forward(input, hx)
        if not torch.compiler.is_compiling():
            warn_once(self, reason)
        return result

    def _fx_leaf(self, input, hx, **more):
        """Make torch.fx treat this module as a leaf, as it does torch.nn's modules."""
        tracer = input.tracer
        return tracer.create_proxy("call_module", tracer.path_of_module(self), (input, hx), more)

    def __prepare_scriptable__(self):
        """What torch.jit.script compiles for this module: torch.nn's own of the same state.

        torch.jit.script also puts it into the model in this module's place.
        """
        ours = next(cls for cls in type(self).__mro__ if vars(cls).get("_torch_class"))
        if getattr(self, "learned_initial_state", False):
            raise RuntimeError(
                f"torch.jit.script cannot compile {type(self).__name__} with a learned initial "
                "state, which torch.nn has not; torch.export can"
            )
        own = overridden(type(self), ours, ("forward", *CALLED_BY_TORCH))
        if own and self._user_class is None:
            raise RuntimeError(
                f"torch.jit.script cannot compile {type(self).__name__}, derived from lstm_fused's "
                f"{ours.__name__}, which overrides {', '.join(own)}"
            )
        theirs = self._user_class or self._torch_class
        name = f"torch.nn.{theirs.__name__}" if theirs is self._torch_class else theirs.__name__
        warn_once(
            self,
            f"torch.jit.script cannot call the fused op, and leaves {name} in the model "
            "(lstm_fused.replace brings the fused module back)",
        )
        twin = theirs.__new__(theirs)
        twin.__dict__ = self.__dict__
        return twin


def overridden(cls, base, names=CALLED_BY_TORCH):
    """Those of names that cls overrides, where base is the class of torch.nn it derives from."""
    return tuple(n for n in names if getattr(cls, n, None) is not getattr(base, n, None))


def warn_once(module, reason, through=None):
    kind = module._kind()
    message = f"lstm_fused.{kind} ran through {through or f'torch.nn.{kind}'}: {reason}"
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=6)
