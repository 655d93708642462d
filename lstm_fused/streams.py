"""A step for real time: prepared once, with the state inside, and without an allocation."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lstm_fused import _C, inference, states
from lstm_fused.recurrent import Recurrent
from lstm_fused.single_step import Cell


def stream(module: torch.nn.Module, batch: int = 1, threads: int = 1) -> "Stream":
    """Prepare single steps of a layer or a cell, for audio, control and other real time.

    ::

        stream = lstm_fused.stream(gru)
        for block in blocks:  # each (1, I)
            stream(block, out=y)

    A step gives the results of ``module`` on a sequence of one step that begins with the state that
    the last step left, bit for bit. It computes no gradients and no dropout, and calls no hooks.

    Sizes: N ``batch``, I ``input_size``, R ``proj_size`` or else ``hidden_size``.

    Args:
        module: an LSTM, GRU or RNN of lstm_fused with any number of layers in one direction, or an
            LSTMCell, GRUCell or RNNCell, on the CPU. Weights changed in place, replaced or loaded
            later are those of the next step, as long as their shapes and their dtype stay.
        batch: N, the number of rows, each with a state of its own.
        threads: how many threads a step may use, no more than ``torch.get_num_threads()``. Only
            large layers gain from a second one.

    Returns:
        A ``Stream``, in the initial state: zeros, or the learned one.

    Raises:
        TypeError: module is of another class, or its class has a ``forward`` of its own.
        ValueError: batch or threads is less than 1, module has two directions, or is in training
            mode with dropout between its layers.
        RuntimeError: a weight is parametrized, not on the CPU, or of another dtype than the others.
    """
    return Stream(module, batch, threads)


class Stream(_C.Stream):
    """Single steps of a module, prepared by ``lstm_fused.stream``. Sizes are as there.

    ``stream(x)`` runs a step and returns y, a new tensor (N, R); ``stream(x, out=y)`` writes y and
    returns it, and allocates nothing. x is (N, I), y contiguous, both on the CPU and of the
    module's dtype. They share no memory with each other. Writing y does not count as a change in
    place for autograd.

    One thread uses a stream at a time. A second one that calls it during a step gets a
    RuntimeError. A step of more than 100,000 products lets other Python threads run meanwhile.

    ``stream.c_step()`` gives ``(address, handle)`` for callers from C, each an integer:
    ``int (*step)(void* handle, const void* x, const void* y)``, with x (N, I) and y (N, R)
    contiguous. It needs no interpreter lock, and returns 0, or 1 where another thread runs a step.
    Both are valid as long as the stream lives. Weights that are replaced later are used from the
    next step or ``c_step()`` from Python on; those changed in place at once.

    Attributes:
        module, batch, threads: as given to ``lstm_fused.stream``.

    Raises:
        TypeError: in a call, x or out is no torch.Tensor on the CPU, or a wrapped one of
            torch.func.
        ValueError: in a call, x or out has another shape or dtype, is not contiguous, or they share
            memory.
        RuntimeError: in a call, x or out requires a gradient while gradients are on, another thread
            runs a step, or the module's weights no longer fit.
    """

    def __init__(self, module: Any, batch: int = 1, threads: int = 1) -> None:
        _check(module, batch, threads)
        self.module, self.batch, self.threads = module, batch, threads
        names, params, *sizes = inference.weights_of(module)
        # Tensors that any mode may change in place.
        with torch.inference_mode(False), torch.no_grad():
            initial = self._initial()
            copies = [s.new_zeros(2, *s.shape) for s in initial]
        h, *c = copies
        self._copies = copies
        cell, inputs = inference.cell_of(module), module.input_size
        self._prepare(names, params, h, c[0] if c else None, cell, inputs, threads, *sizes)
        self.reset()

    def reset(self, rows: Tensor | Sequence[int] | None = None) -> None:
        """Put the initial state, zeros or the learned one, in the place of the state.

        Args:
            rows: of which rows: integers from 0 to N - 1, or a bool tensor (N,); None for all.

        Raises:
            IndexError: a row is not from 0 to N - 1.
        """
        at = slice(None) if rows is None else torch.as_tensor(rows)
        with torch.no_grad():
            for s, initial in zip(self._current(), self._initial(), strict=True):
                s[:, at] = initial[:, at]

    @property
    def state(self) -> Any:
        """A copy of the state, in the form of the module's hx; assigning one puts it in.

        ``(h, c)`` of an LSTM or an LSTMCell, else ``h``; (L, N, width), of a cell (N, width).

        Raises:
            TypeError: what is assigned is neither a tensor nor a tuple of two.
            ValueError: its tensors are not as many as the state's, or of another shape or dtype.
        """
        found = [s.clone() for s in self._current()]
        if isinstance(self.module, Cell):
            found = [s[0] for s in found]
        return found[0] if len(found) == 1 else tuple(found)

    @state.setter
    def state(self, state: Any) -> None:
        current = self._current()
        given = states.tensors_of(state)
        if isinstance(self.module, Cell):
            given = [s.unsqueeze(0) for s in given]
        wanted = [(s.shape, s.dtype) for s in current]
        if [(s.shape, s.dtype) for s in given] != wanted:
            shapes = ", ".join(f"{dtype} {tuple(shape)}" for shape, dtype in wanted)
            raise ValueError(f"state must be {shapes}")
        with torch.no_grad():
            for s, new in zip(current, given, strict=True):
                s.copy_(new)

    def _current(self):
        """The copies of the states, each (L, N, width), that the next step reads."""
        return [s[self._copy_read()] for s in self._copies]

    def _initial(self):
        """The initial states, each (L, N, width)."""
        module = self.module
        if isinstance(module, Cell):
            weights = module._weights()
            dtype = module._input_dtype(weights)
            zeros = weights[0].new_zeros(1, self.batch, module.hidden_size, dtype=dtype)
            return [zeros] * module._states
        return states.tensors_of(module.init_state(self.batch))

    def __reduce__(self):
        return stream, (self.module, self.batch, self.threads), self.state

    def __setstate__(self, state):
        self.state = state

    def __repr__(self):
        return f"lstm_fused.stream({self.module}, batch={self.batch}, threads={self.threads})"


def _check(module, batch, threads):
    kind = Recurrent if isinstance(module, Recurrent) else Cell
    if not isinstance(module, kind):
        raise TypeError(
            "module must be an LSTM, GRU, RNN or a cell of lstm_fused, got "
            f"{type(module).__module__}.{type(module).__name__}; lstm_fused.replace makes one of "
            "torch.nn's"
        )
    if module._torch_class is None:
        raise TypeError(f"module is a {module._kind()}, streams have the cells of torch.nn alone")
    if not type(module).forward.__module__.startswith("lstm_fused."):
        raise TypeError(f"{type(module).__name__} has a forward of its own, which no stream calls")
    for name, value in (("batch", batch), ("threads", threads)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
    if kind is Recurrent:
        if module.bidirectional:
            raise ValueError(
                "module must have one direction: the reverse one begins at the last step"
            )
        if module.training and module.dropout and module.num_layers > 1:
            raise ValueError("module is in training mode with dropout: call module.eval() first")
