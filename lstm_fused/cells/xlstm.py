"""The sLSTM cells of the packages xlstm and tirex, computed by our layer inside built models."""

import warnings
from typing import Any, TypeVar

import torch

from lstm_fused import ops
from lstm_fused.cells import slstm
from lstm_fused.fallback import overridden
from lstm_fused.replace import check_model, derived

M = TypeVar("M", bound=torch.nn.Module)


def replace_slstm(model: M, *, verbose: bool = False) -> M:
    """Make the sLSTM cells of the packages ``xlstm`` and ``tirex`` inside model run fused.

    For an ``xLSTMBlockStack``, an ``sLSTMBlock`` or ``sLSTMLayer``, TiRex's model, or a model that
    holds them. Each cell stays the object it was, with its Parameters and ``state_dict``; only its
    class changes, to one derived from its own. ``restore_slstm`` undoes it.

    A cell computes what it did, in the dtype of its weights, and returns the dtype of its input.
    So TiRex's, which rounds to bfloat16 at each step on a CPU, computes in float32. TiRex bounds
    the pre-activation of the forget gate by 15, which moves the gate by less than 4e-7 and is left
    out. A cell built for xlstm's CUDA backend runs on a CPU as well, with the backend it came with
    not loaded (``skip_backend_init``).

    Left alone, with a warning that names them and says why: cells with another ``function`` than
    "slstm", those that cut or clip gradients, which xlstm's CUDA backend alone can, and those of a
    class with a ``forward`` of its own.

    Args:
        model: a ``torch.nn.Module``.
        verbose: print what was replaced, and what was left alone and why, in place of the warning.

    Returns:
        model.

    Raises:
        TypeError: model is not a ``torch.nn.Module``.
    """
    check_model(model)
    changed, left = [], []
    for name, cell in model.named_modules():
        ours, theirs = _classes(cell)
        if ours is None or isinstance(cell, _Cell):
            continue
        name = name or "the model"
        if reason := _reason_to_keep(cell, theirs):
            left.append(f"{name}, {reason}")
        else:
            cell.__class__ = derived(ours, type(cell))
            changed.append(name)
    if verbose:
        print(f"lstm_fused.cells.replace_slstm: {len(changed)} replaced, {len(left)} left alone")
        print("".join(f"  replaced {t}\n" for t in changed), end="")
        print("".join(f"  left alone {t}\n" for t in left), end="")
    elif left:
        warnings.warn(f"lstm_fused.cells.replace_slstm left alone: {'; '.join(left)}", stacklevel=2)
    return model


def restore_slstm(model: M) -> M:
    """The inverse of ``replace_slstm``: each cell is of the class it had.

    Args:
        model: a ``torch.nn.Module``.

    Returns:
        model.

    Raises:
        TypeError: model is not a ``torch.nn.Module``.
    """
    check_model(model)
    for cell in model.modules():
        if isinstance(cell, _Cell):
            ours: Any = type(cell)
            cell.__class__ = ours._user_class
    return model


class _Cell:
    """A mixin before a cell's class: its forward by our layer.

    A subclass gives the recurrent weights and biases of the cell as `slstm.recurrence` takes them.
    Inside, a state is theirs: (4, N, H), h, c, n and m.
    """

    def _layer(self, run):
        """What runs the layer where run, `ops.layer`, would; as `fallback.Fused` has it."""
        return run

    def _run(self, preacts, state):
        """preacts (T, N, 4*H), state None or (4, N, H) -> y (T, N, H), the state after the last."""
        blocks, bias = self._weights_by_gate()
        x = preacts.to(blocks.dtype)
        state0 = ()
        if state is not None:
            h, *cells = state.to(blocks.dtype).unbind(0)
            state0 = h.unsqueeze(0), torch.cat(cells, -1).unsqueeze(0)
        with torch.autocast(x.device.type, enabled=False):
            y, (h_n, c_n) = slstm.recurrence(x, state0, blocks, bias, self._layer(ops.layer))
        state = torch.stack((h_n[0], *c_n[0].chunk(3, -1)))
        return y.to(preacts.dtype), state.to(preacts.dtype)


class _XlstmCell(_Cell):
    """A cell of xlstm; the layout of its weights is a subclass's."""

    def forward(self, input, state=None, lengths=None):
        """input (N, T, 4*H), or (T, N, 4*H) by the configuration; state None or (4, N, H)."""
        self._check_input(input)
        x = input.transpose(0, 1) if self.config.input_shape == "BSGNH" else input
        if state is not None:
            self._get_state(x, state)  # raises their error on another shape
        y, state = self._run(x, state)
        return self._permute_output(y), state


class _Vanilla(_XlstmCell):
    def _weights_by_gate(self):
        heads, D = self.config.num_heads, self.config.head_dim
        R = self._recurrent_kernel_.view(heads, 4, D, D)  # unit by hidden unit
        return R.transpose(0, 1), self._bias_


def _by_gate_from_cuda(config, kernel, bias):
    """Weights laid out for xlstm's CUDA kernels: (heads, hidden unit, gate, unit), and by head."""
    heads, D = config.num_heads, config.head_dim
    R = kernel.view(heads, D, 4, D).permute(2, 0, 3, 1)
    return R, bias.view(heads, 4, D).transpose(0, 1).reshape(-1)


class _Cuda(_XlstmCell):
    def _weights_by_gate(self):
        return _by_gate_from_cuda(self.config, self._recurrent_kernel_, self._bias_)


class _TiRex(_Cell):
    def forward(self, input, state):
        """input (N, T, 4*H), state None or (4, N, H)."""
        x = self._get_input(input).flatten(2)  # their check, and T first
        if state is not None:
            state = self._get_state(x, state)
        y, state = self._run(x, state)
        return self._permute_output(y), state

    def _weights_by_gate(self):
        return _by_gate_from_cuda(self.config, self._recurrent_kernel_, self._bias_)


# By module and name: neither package is imported for it.
_CLASSES = {
    ("xlstm.blocks.slstm.cell", "sLSTMCell_vanilla"): _Vanilla,
    ("xlstm.blocks.slstm.cell", "sLSTMCell_cuda"): _Cuda,
    ("tirex.models.slstm.cell", "sLSTMCell"): _TiRex,
}


def _classes(module):
    """Our class for a cell and that of theirs which it is of; (None, None) for another module."""
    for cls in type(module).__mro__:
        if ours := _CLASSES.get((cls.__module__, cls.__name__)):
            return ours, cls
    return None, None


def _reason_to_keep(cell, theirs):
    """Why a cell keeps its class, or None."""
    if "forward" in vars(cell) or overridden(type(cell), theirs, ("forward",)):
        return f"a {type(cell).__name__} with its own forward"
    function = getattr(cell.config, "function", "slstm")
    if function != "slstm":
        return f'whose function is "{function}"'
    options = ("gradient_recurrent_cut", "gradient_recurrent_clipval", "forward_clipval")
    on_cuda = theirs.__name__ == "sLSTMCell_cuda"  # the other backend ignores them
    given = [name for name in options if on_cuda and getattr(cell.config, name)]
    return f"which has {', '.join(given)}" if given else None
