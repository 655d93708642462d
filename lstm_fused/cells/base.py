"""What the layers of cells beyond torch.nn share: their weights, in the operator's form.

Sizes: T steps, N rows, I inputs, H hidden units, R recurrent width, G gates, D directions, S rows
of packed data or of documents.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lstm_fused import cuda, errors
from lstm_fused.fallback import State
from lstm_fused.recurrent import Recurrent

if TYPE_CHECKING:
    from torch.types import Device


class _Parameters(torch.nn.RNNBase):
    """torch.nn.RNNBase without its four modes: the options are its own, the weights a subclass's.

    Behind the classes of lstm_fused in the order of bases, where torch.nn.LSTM is in LSTM's.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: "Device" = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if proj_size and not self.projects:
            raise ValueError(f"proj_size argument is only supported for LSTM, not {self._kind()}")
        sizes = input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional
        # For its checks of the options.
        checked = torch.nn.RNNBase("RNN_TANH", *sizes, proj_size, device="meta")
        torch.nn.Module.__init__(self)
        for name in checked.__constants__:
            setattr(self, name, getattr(checked, name))
        self.mode = self._kind()
        self._flat_weights_names: list[str] = []
        self._all_weights: list[list[str]] = []
        directions = 2 if bidirectional else 1
        for k in range(num_layers):
            inputs = directions * (proj_size or hidden_size) if k else input_size
            for suffix in ("", "_reverse")[:directions]:
                names = []
                for name in self._weight_names():
                    shape = self._weight_shape(name, inputs)
                    parameter = torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                    names.append(f"{name}_l{k}{suffix}")
                    setattr(self, names[-1], parameter)
                self._flat_weights_names.extend(names)
                self._all_weights.append(names)
        self._init_flat_weights()
        self.reset_parameters()

    def flatten_parameters(self) -> None:
        """Nothing: cuDNN has none of these cells."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Refuse an input that Recurrent.forward did not take."""
        raise ValueError(
            f"{self._kind()}: Expected input to be 2D or 3D, got {input.dim()}D instead"
        )

    if TYPE_CHECKING:
        projects: bool

        def _cell(self) -> str: ...
        def _kind(self) -> str: ...
        def _weight_names(self) -> tuple[str, ...]: ...
        def _weight_shape(self, name: str, inputs: int) -> tuple[int, ...]: ...


class DescribedLayer(Recurrent[State], _Parameters):
    """A layer of a described cell (csrc/cells/described.h): what ``LSTM`` is for torch.nn's cells.

    A subclass names its cell and says of which weights it consists. Where the kernels do not run a
    call, the reference does, with one warning for each reason.

    cell: as ops.layer knows it. gates: blocks of H rows in weight_ih. has_hidden_weight: whether
    the hidden state is multiplied by a matrix; without one there is no bias_hh either. vectors: the
    name of the weight with a few values of each unit, and how many; None if there is none.
    projects: whether there may be a proj_size.

    Options that decide about the weights are set before the constructor here is called.
    """

    cell: str
    gates: int
    has_hidden_weight = True
    vectors: tuple[str, int] | None = None
    projects = False

    @classmethod
    def _kind(cls):
        return next(c.__name__ for c in cls.__mro__ if c.__module__.startswith("lstm_fused."))

    def _cell(self):
        return self.cell

    def _find_overridden(self):
        """Nothing: there is no forward of torch.nn that could call a method."""

    # Weights.

    def _weight_names(self):
        """Of one layer and direction, in the operator's order."""
        names = ["weight_ih", "weight_hh"] if self.has_hidden_weight else ["weight_ih"]
        if self.bias:
            names += ["bias_ih", "bias_hh"] if self.has_hidden_weight else ["bias_ih"]
        names += ["weight_hr"] if self.proj_size else []
        return (*names, self.vectors[0]) if self.vectors else tuple(names)

    def _weight_shape(self, name, inputs):
        H = self.hidden_size
        if self.vectors and name == self.vectors[0]:
            return self.vectors[1], H
        shapes = {
            "weight_ih": (self.gates * H, inputs),
            "weight_hh": (self.gates * H, self.proj_size or H),
            "weight_hr": (self.proj_size, H),
        }
        return shapes.get(name, (self.gates * H,))

    def _operator_weights(self, own, x, direction):
        """One direction's weights as ops.layer takes them, without the masks.

        own: by name, without the number of the layer. x: the layer's input, (T, N, I) or (S, I).
        """
        w_ih = own["weight_ih"]
        w_hh = own.get("weight_hh")
        weights = [w_ih, w_ih.new_empty(len(w_ih), 0) if w_hh is None else w_hh]
        if "bias_ih" in own:
            b_ih, b_hh = own["bias_ih"], own.get("bias_hh")
            weights += [b_ih, torch.zeros_like(b_ih) if b_hh is None else b_hh]
        more = own.get("weight_hr"), self._vectors(own)
        return weights + [w for w in more if w is not None]

    def _vectors(self, own):
        """The parameters of each unit, (kVectors, H), or None."""
        return own[self.vectors[0]] if self.vectors else None

    def _masks(self, x, batch_sizes):
        """The values of each unit and step, (*x.shape[:-1], kMasks * H), or None; new ones for each
        direction. batch_sizes: as ops.layer or padded.layer takes them."""
        return None

    def _layer(self, run):
        """`run`, which takes the operator's weights, for those that the module has."""
        names = self._weight_names()

        def layer(x, batch_sizes, state0, weights, cell, directions, **more):
            parts = [
                dict(zip(names, weights[d * len(names) :], strict=False)) for d in range(directions)
            ]
            flat = []
            for d, own in enumerate(parts):
                flat += self._operator_weights(own, x, d)
                masks = self._masks(x, batch_sizes)
                flat += [] if masks is None else [masks]
            return self._run_layer(run, x, batch_sizes, state0, flat, directions, **more)

        return layer

    def _run_layer(self, run, x, batch_sizes, state0, weights, directions, **more):
        own = self._reference()
        if own is not None:
            more.pop("save_every", None)  # every step is kept
            return own(x, batch_sizes, state0, weights, directions, **more)
        return run(x, batch_sizes, state0, weights, self._cell(), directions, **more)

    def _reference(self):
        """A layer as reference.CELLS has them, where neither these nor the kernels run it."""
        return None

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for names in self._all_weights:
            with torch.no_grad():
                self._init_own({n.partition("_l")[0]: getattr(self, n) for n in names})

    def _init_own(self, own):
        """Initialize what begins otherwise than torch.nn's weights; own: as _operator_weights."""

    # Calls.

    def _fallback_reason(self, x, hx, weights):
        if reason := self._unsupported_reason():
            return reason
        if x.is_cuda and not cuda.has_cell(self._cell()):
            return f"the CUDA kernels have no {self._cell()}"
        return super()._fallback_reason(x, hx, weights)

    def _unsupported_reason(self):
        """Why the kernels run no call of the module with its options, or None."""
        return None

    def _autocast_dtypes(self, x, packed, state, weights, grad):
        """Everything runs in autocast's dtype, as cuDNN's layers do; float64 is left alone."""
        double = [t.dtype is torch.float64 for t in (x, *state, *weights)]
        if any(double) and not all(double):
            raise RuntimeError("autocast does not cast float64: give float64 all or none")
        dtype = torch.float64 if all(double) else torch.get_autocast_dtype(x.device.type)
        return dtype, dtype

    def __prepare_scriptable__(self):
        raise RuntimeError(
            f"torch.jit.script cannot compile {self._kind()}, which torch.nn has not; torch.export "
            "can"
        )

    if TYPE_CHECKING:

        def __init__(
            self,
            input_size: int,
            hidden_size: int,
            num_layers: int = 1,
            bias: bool = True,
            batch_first: bool = False,
            dropout: float = 0.0,
            bidirectional: bool = False,
            device: Device = None,
            dtype: torch.dtype | None = None,
            *,
            learned_initial_state: bool = False,
        ) -> None: ...


class HiddenState(DescribedLayer[Tensor]):
    """A layer whose state is h, as that of ``GRU``."""


class TwoStates(DescribedLayer[tuple[Tensor, Tensor]]):
    """A layer whose state is (h, c), as that of ``LSTM``; with a projection if given one."""

    projects = True
    _states = 2
    _state_names = ("initial_h", "initial_c")

    def _check_state(self, hx, dims, rows):
        return errors.check_state(self, hx, dims, rows)

    def _as_given(self, state):
        return state

    def _as_state(self, given):
        return given

    if TYPE_CHECKING:

        def __init__(
            self,
            input_size: int,
            hidden_size: int,
            num_layers: int = 1,
            bias: bool = True,
            batch_first: bool = False,
            dropout: float = 0.0,
            bidirectional: bool = False,
            proj_size: int = 0,
            device: Device = None,
            dtype: torch.dtype | None = None,
            *,
            learned_initial_state: bool = False,
        ) -> None: ...


class CellState(DescribedLayer[Tensor]):
    """A layer whose state is c: h of the step before is not used."""

    _state_names = ("initial_c",)

    def _has_cell_state(self):
        return True

    def _check_state(self, hx, dims, rows):
        return self._as_state(errors.check_hidden(self, hx, dims, rows))

    def _as_given(self, state):
        return state[1]

    def _as_state(self, given):
        return torch.zeros_like(given), given
