"""Layers of a user's own cell, compiled from its forward function.

Sizes: T steps, N rows, I inputs, H hidden units, R recurrent width, G gates, K cell states, L
layers, D directions.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lstm_fused import _plan, cell_library, cuda, errors, ops, reference, traces
from lstm_fused.cells.base import DescribedLayer

Step = Callable[..., tuple[Tensor, list[Tensor]]]
_layers: dict[tuple[str, bool], type["CompiledLayer"]] = {}


def compile_cell(
    source: str | os.PathLike[str],
    *,
    struct: str | None = None,
    hidden_weight: bool = True,
) -> type["CompiledLayer"]:
    """A module class for a cell that is written as a C++ struct with a ``forward`` function.

    The cell is compiled for this machine's instruction sets, which takes some seconds and a C++
    compiler (g++ 11 or newer, or clang; the variable CXX names another than ``c++``). The result is
    kept under torch's folder for extensions (TORCH_EXTENSIONS_DIR), so that the same source is
    compiled once. Backward is derived from forward; so is a reference in torch, which serves
    derivatives of derivatives and other devices than the CPU. docs/your_own_cell.md builds a cell
    step by step.

    Args:
        source: the path of a header, or its text: a struct that derives from ``DescribedCell``, as
            the comment in csrc/cells/described.h says.
        struct: the struct's name, needed where the source has several cells.
        hidden_weight: whether the hidden state is multiplied by a matrix. False is for cells whose
            gates see the input alone, and ``prev`` and the vectors.

    Returns:
        A subclass of ``CompiledLayer``, named as the struct. Its constructor takes what
        ``lstm_fused.GRU``'s takes, ``Layer(input_size, hidden_size, num_layers=1, ...)``.

    Raises:
        ValueError: the source has no such struct, or its cell has an operand (a product of its own
            with the hidden weight) and hidden_weight is False.
        RuntimeError: there is no compiler, or the cell does not compile; the message has the
            compiler's, with the lines of the source.
        FileNotFoundError: there is no such header.
    """
    text = os.fspath(source)
    if not isinstance(source, str) or "\n" not in text:
        text = cell_library.read(Path(text).absolute())
    name = cell_library.struct_of(text, struct)
    library = cell_library.compile_and_load(text, name)
    if library.trace.operand and not hidden_weight:
        raise ValueError(f"{name} has an operand: hidden_weight is False but must be True")
    key = library.name, hidden_weight
    if key not in _layers:
        if library.name not in ops.CELLS:
            _register(library)
        recipe = {"source": text, "struct": name, "hidden_weight": hidden_weight}
        members = {
            "cell": library.name,
            "trace": library.trace,
            "has_hidden_weight": hidden_weight,
            "_library": library,
            "_recipe": recipe,
            "__module__": __name__,
            "__doc__": f"Layers of the cell {name}, compiled by lstm_fused.compile_cell.",
        }
        _layers[key] = type(name, (CompiledLayer,), members)
    return _layers[key]


def _register(library: cell_library.Library) -> None:
    """Make the cell known to the kernels and to whoever reads the lists of cells."""
    trace, name = library.trace, library.name
    facts = (
        *(trace.gates, trace.preacts, trace.cells, trace.keeps_hidden),
        *(trace.vectors, trace.masks, trace.groups, trace.operand is not None),
    )
    number = torch.ops.lstm_fused.register_cell(name, [int(n) for n in facts])
    for isa, addresses in library.functions.items():
        torch.ops.lstm_fused.register_functions(number, isa, *addresses)
    _plan.register_cell(name, *facts)
    info = _plan.cells()[name]
    reference.CELLS[name] = traces.reference_layer(trace)
    cuda.CELLS[number] = {"name": name, **info}
    ops._IDS[name] = number
    ops.CELLS[name] = info


class CompiledLayer(DescribedLayer[Any]):
    """What the classes that ``compile_cell`` makes have in common; a call as that of ``GRU``.

    The state is ``h``, or ``(h, c)`` of a cell with cell states, ``(h, c_1, ..., c_K)`` of K, each
    (L*D, N, H). Weights: ``weight_ih_l{k}`` (G*H, I), ``weight_hh_l{k}`` (G*H, R), ``bias_ih_l{k}``
    and ``bias_hh_l{k}`` (G*H,), without the two of hh where there is no hidden weight, and
    ``weight_v_l{k}`` (kVectors, H) of a cell with vectors.

    A subclass may override ``init_weights`` for initial values other than torch.nn's, and overrides
    ``masks`` where the cell has masks.
    """

    trace: traces.Trace
    _library: cell_library.Library
    _recipe: dict[str, Any]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        trace = cls.trace
        cls.gates = trace.gates
        cls.vectors = ("weight_v", trace.vectors) if trace.vectors else None
        cls.projects = trace.cells > 0 and not trace.keeps_hidden and cls.has_hidden_weight
        cls._states = 1 + trace.cells
        names = [f"initial_c{k + 1}" for k in range(trace.cells)]
        cls._state_names = ("initial_h", *(["initial_c"] if trace.cells == 1 else names))

    def init_weights(self, weights: dict[str, Tensor]) -> None:
        """Set initial values of one layer and direction, in place, under no_grad.

        weights: by name without the layer's number, such as ``weight_ih``; uniform in
        +-1/sqrt(H) before.
        """

    def masks(self, input: Tensor) -> Tensor:
        """The masks of one layer and direction: (T, N, kMasks * H), or (S, kMasks * H), for its
        input (T, N, I) or (S, I)."""
        raise NotImplementedError(
            f"the cell has {self.trace.masks} masks: override masks(input) in a subclass of "
            f"{self._kind()}"
        )

    @classmethod
    def check(
        cls, step: Step | None = None, operand: Callable[..., Tensor] | None = None
    ) -> list[str]:
        """Compare the cell's kernels with its reference, on every ISA of this machine.

        Outputs, final states and every gradient, in float64 and float32, of the kernels for one
        step and for many; the derivatives with finite differences (torch.autograd.gradcheck and
        gradgradcheck); and the cell's values and gradients with those of ``step``.

        Args:
            step: the cell written in torch, ``step(preact, vector, mask, prev)``: sequences of
                tensors (n, H), vectors (H,); prev has h last if the cell keeps it. It returns h and
                the list of the cell states after the step.
            operand: the cell's ``operand`` in torch, of the same arguments, if it has one.

        Returns:
            A line for each thing that was compared.

        Raises:
            AssertionError: something is off; the message says what, and by how much.
        """
        from lstm_fused.testing import cell_check

        return cell_check.check(cls, step, operand)

    def _init_own(self, own):
        if self.trace.groups:
            own["weight_v"][-1] = 1e-5
        self.init_weights(own)

    def _masks(self, x, batch_sizes):
        return self.masks(x) if self.trace.masks else None

    def _state_widths(self):
        return (self.proj_size or self.hidden_size, *[self.hidden_size] * self.trace.cells)

    def _has_cell_state(self):
        return self.trace.cells > 0

    def _check_state(self, hx, dims, rows):
        cells = self.trace.cells
        if cells == 0:
            return (errors.check_hidden(self, hx, dims, rows),)
        if cells == 1:
            return errors.check_state(self, hx, dims, rows)
        if not isinstance(hx, (tuple, list)) or len(hx) != 1 + cells:
            kind = f"{len(hx)} states" if isinstance(hx, (tuple, list)) else type(hx).__name__
            raise TypeError(f"hx must be a tuple of h and {cells} cell states, got {kind}")
        return self._as_state(tuple(errors.check_hidden(self, t, dims, rows) for t in hx))

    def _as_given(self, state):
        if self.trace.cells == 0:
            return state[0]
        h, cells = state
        return (h, *cells.chunk(self.trace.cells, dim=-1))

    def _as_state(self, given):
        if self.trace.cells == 0:
            return (given,)
        h, *cells = given
        return h, torch.cat(cells, dim=-1)

    def __reduce_ex__(self, protocol):
        """A module of a class that compile_cell made is found again by its source."""
        found = super().__reduce_ex__(protocol)
        if "_recipe" not in vars(type(self)):
            return found  # a subclass, which has a module to be found in
        return (_remade, (self._recipe,), *found[2:])


def _remade(recipe):
    layer = compile_cell(**recipe)
    return layer.__new__(layer)
