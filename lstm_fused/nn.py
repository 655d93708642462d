"""LSTM, GRU and RNN: torch.nn's modules, computed by the fused kernels."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lstm_fused import errors
from lstm_fused.recurrent import Recurrent

if TYPE_CHECKING:
    from torch.types import Device


class LSTM(Recurrent[tuple[Tensor, Tensor]], torch.nn.LSTM):
    """``torch.nn.LSTM`` computed by fused kernels: same constructor, weights, inputs and results.

    Anything ``torch.nn.LSTM`` accepts is accepted, a module of one class loads the other's
    ``state_dict``, and ``isinstance(module, torch.nn.LSTM)`` holds. The weights are looked up at
    every call, so parametrizations, pruning, ``torch.func.functional_call``, shared and swapped
    weights all behave as they look.

    Sizes: T length, N batch, I ``input_size``, H ``hidden_size``, R ``proj_size`` or else H,
    L ``num_layers``, D 2 if ``bidirectional`` else 1.

    Args:
        input: (T, N, I), or (N, T, I) if ``batch_first``, or (T, I) for one sequence, or a
            ``PackedSequence``. float32, float64, bfloat16 or float16, the weights' dtype unless
            autocast is on.
        hx: ``(h_0, c_0)`` of shapes (L*D, N, R) and (L*D, N, H), without N for a (T, I) input;
            zeros if left out.
        lengths: beyond ``torch.nn.LSTM``: the length of each row of a padded (T, N, I) or
            (N, T, I) input, N integers from 0 to T in any order, as a list or a tensor. No time
            goes into the padding, ``output`` is zero there, and ``h_n``, ``c_n`` are those at each
            row's own end (``hx`` for a row of length 0). It may be a tensor that ``torch.compile``
            and ``torch.export`` do not know the values of.
        resets: beyond ``torch.nn.LSTM``, as is all that follows, and a keyword: bool, (T, N) or
            (N, T) as the input, (T,) or (S,): True where a row begins anew before that step.
            Nothing passes such a place, in either direction, forward or backward. For a
            ``PackedSequence`` padded, or packed as it is.
        reset_state: the state that resets put in, as ``hx``, or (L*D, width) each for all rows;
            zeros if left out.
        return_cell_states: return c of every step as well.
        cu_seqlens: (N + 1,), int32 or int64: the input (S, I) is N documents one after the other,
            each from ``cu_seqlens[n]`` to ``cu_seqlens[n + 1]``.
        max_seqlen: at least the longest document; on a CUDA device nothing waits for ``cu_seqlens``
            where it is given.
        checkpoint_every: keep the states of every so many steps for backward, which computes the
            others again, or "auto" for the least memory. Also an attribute, for every call.

    Returns:
        ``output, (h_n, c_n)``: (T, N, D*R) laid out as the input was, (L*D, N, R), (L*D, N, H);
        with ``return_cell_states`` a third, (T, N, D*H), of the last layer.

    Raises:
        ValueError: ``input`` is not 2-D or 3-D, its dtype is not the weights', ``lengths``,
            ``resets`` or ``cu_seqlens`` does not fit the input, or options exclude each other.
        RuntimeError: a size or a device of ``input``, ``hx``, ``reset_state`` or a weight does not
            fit, T is 0, ``hx`` has another dtype, or an option beyond torch.nn is given where only
            torch.nn can run the call.
        TypeError, IndexError, AttributeError: an argument is of the wrong kind.

    The constructor's ``learned_initial_state=True`` adds parameters ``initial_h`` and
    ``initial_c``, (L*D, R) and (L*D, H), zeros at first. A call without ``hx`` begins with them,
    and resets without ``reset_state`` put them in.

    Every transform of ``torch.func`` is fused: ``grad`` and ``vjp`` at any level, ``vmap`` over
    inputs and over stacked weights (an ensemble runs in one call), per-sample gradients by
    ``vmap(grad)``, ``jvp``; derivatives of derivatives go through a pure-torch reference.

    ``dropout`` draws the masks that torch.nn draws from the same seed. Under ``torch.compile``
    Inductor draws others, as in any module, unless ``torch._inductor.config.fallback_random`` is
    set.

    Inputs without a fused path (another device than cpu and cuda, other dtypes, Tensor subclasses,
    sparse and nested tensors, ``torch.jit.trace``) run through
    ``torch.nn.LSTM`` itself, with one warning for each reason. So does a module of a class derived
    from this one that overrides a method which only torch.nn's forward calls; ``check_input`` of
    such a class is called. ``torch.jit.script`` compiles ``torch.nn.LSTM``'s own forward, with the
    same warning. ``lstm_fused.explain`` tells beforehand.

    The equations and the options are those of ``torch.nn.LSTM``'s documentation; Hochreiter and
    Schmidhuber, Long Short-Term Memory, 1997; for ``proj_size`` Sak, Senior and Beaufays, Long
    Short-Term Memory Based Recurrent Neural Network Architectures, 2014.
    """

    _torch_class = torch.nn.LSTM
    _states = 2
    _state_names = ("initial_h", "initial_c")

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

    def _check_state(self, hx, dims, rows):
        return errors.check_state(self, hx, dims, rows)

    def _as_given(self, state):
        return state

    def _as_state(self, given):
        return given


class GRU(Recurrent[Tensor], torch.nn.GRU):
    """``torch.nn.GRU`` computed by fused kernels: same constructor, weights, inputs and results.

    Everything said of ``LSTM`` holds, with one state instead of two, no ``proj_size`` and no
    ``return_cell_states``.

    Args:
        input: (T, N, I), or (N, T, I) if ``batch_first``, or (T, I) for one sequence, or a
            ``PackedSequence``. float32, float64, bfloat16 or float16, the weights' dtype unless
            autocast is on.
        hx: ``h_0`` of shape (L*D, N, H), without N for a (T, I) input; zeros if left out.
        lengths, resets, reset_state, cu_seqlens, max_seqlen, checkpoint_every: as in ``LSTM``.

    Returns:
        ``output, h_n``: (T, N, D*H) laid out as the input was, (L*D, N, H).

    Raises:
        ValueError, RuntimeError, TypeError, AttributeError: as ``LSTM``.

    The equations and the options are those of ``torch.nn.GRU``'s documentation, which differ a
    little from Cho et al., Learning Phrase Representations using RNN Encoder-Decoder for
    Statistical Machine Translation, 2014: the reset gate multiplies what W_hh gives.
    """

    _torch_class = torch.nn.GRU

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


class RNN(Recurrent[Tensor], torch.nn.RNN):
    """``torch.nn.RNN`` computed by fused kernels: same constructor, weights, inputs and results.

    ``nonlinearity`` is ``"tanh"`` or ``"relu"``. Inputs, results and errors are those of ``GRU``;
    the equations those of ``torch.nn.RNN``'s documentation (Elman, Finding Structure in Time,
    1990).
    """

    _torch_class = torch.nn.RNN

    if TYPE_CHECKING:

        def __init__(
            self,
            input_size: int,
            hidden_size: int,
            num_layers: int = 1,
            nonlinearity: str = "tanh",
            bias: bool = True,
            batch_first: bool = False,
            dropout: float = 0.0,
            bidirectional: bool = False,
            device: Device = None,
            dtype: torch.dtype | None = None,
            *,
            learned_initial_state: bool = False,
        ) -> None: ...


MODULES: tuple[type[Recurrent[Any]], ...] = (LSTM, GRU, RNN)
