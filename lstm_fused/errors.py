"""Errors for arguments that do not fit a module.

Where torch.nn checks an argument, its method or its message is used. Where torch.nn fails inside a
matrix product, the error here has the same type and names the argument.
"""

import torch
from torch import Tensor

from lstm_fused import padded
from lstm_fused.observed import is_captured


def check_input(module, input, batch_sizes):
    """Refuse an input as given, or packed data (S, I), of another dtype or width or without a step.

    The module's own check_input is what does, called where torch.nn's forward calls it.
    """
    module._update_flat_weights()
    time = 1 if module.batch_first and batch_sizes is None else 0
    if input.dim() == 2 and batch_sizes is None:
        input = input.unsqueeze(1 - time)
    if batch_sizes is None or not isinstance(module, torch.nn.LSTM):
        module.check_input(input, batch_sizes)
    else:
        # torch.nn.LSTM does not check packed input: the product refuses it, by a RuntimeError.
        try:
            torch.nn.RNNBase.check_input(module, input, batch_sizes)
        except ValueError as error:
            raise RuntimeError(str(error)) from None
    if input.shape[time] == 0:
        raise RuntimeError(
            "Expected sequence length to be larger than 0 in RNN, got an input without a time step"
        )


def check_state(module, hx, dims, rows):
    """hx as (h_0 (L*D, rows, R), c_0 (L*D, rows, H)), refused unless of those shapes.

    dims is 3 or 2 as the input is, without rows if 2, and None for packed input.
    """
    if type(hx) is not tuple or len(hx) != 2:
        hx = _unpack_odd_state(hx, dims)
    h_0, c_0 = hx
    layers = module.num_layers * (2 if module.bidirectional else 1)
    h_shape = (layers, rows, module.proj_size or module.hidden_size)
    c_shape = (layers, rows, module.hidden_size)
    plain = dims != 2 and type(h_0) is type(c_0) is Tensor
    if plain and h_0.shape == h_shape and c_0.shape == c_shape:
        return hx
    for name, t in (("hx[0]", h_0), ("hx[1]", c_0)):
        if not isinstance(t, Tensor):
            raise AttributeError(f"{name} must be a Tensor, got {type(t).__name__}")
    if dims is not None and (h_0.dim() != dims or c_0.dim() != dims):
        kind = "batched 3-D" if dims == 3 else "unbatched 2-D"
        raise RuntimeError(
            f"For {kind} input, hx and cx should also be {dims}-D "
            f"but got ({h_0.dim()}-D, {c_0.dim()}-D) tensors"
        )
    if dims == 2:
        h_0, c_0 = h_0.unsqueeze(1), c_0.unsqueeze(1)
    module.check_hidden_size(h_0, h_shape, "Expected hidden[0] size {}, got {}")
    module.check_hidden_size(c_0, c_shape, "Expected hidden[1] size {}, got {}")
    return h_0, c_0


def check_hidden(module, hx, dims, rows):
    """hx as h_0 (L*D, rows, H), refused unless of that shape; dims as for check_state."""
    if not isinstance(hx, Tensor):
        raise AttributeError(f"hx must be a Tensor, got {type(hx).__name__}")
    if dims is not None and hx.dim() != dims:
        kind = "batched 3-D" if dims == 3 else "unbatched 2-D"
        raise RuntimeError(
            f"For {kind} input, hx should also be {dims}-D but got {hx.dim()}-D tensor"
        )
    if dims == 2:
        hx = hx.unsqueeze(1)
    layers = module.num_layers * (2 if module.bidirectional else 1)
    module.check_hidden_size(hx, (layers, rows, module.hidden_size))
    return hx


def _unpack_odd_state(hx, dims):
    """(h_0, c_0) from a list, or from two states stacked for an unbatched input."""
    if isinstance(hx, Tensor):
        problem = f"hx must be a tuple (h_0, c_0), got a Tensor of shape {tuple(hx.shape)}"
        if dims is None or hx.dim() > 3:
            raise TypeError(problem)
        if hx.dim() == 0 or hx.shape[0] < 2:
            raise IndexError(problem)
    elif not isinstance(hx, (tuple, list)):
        raise TypeError(f"hx must be a tuple (h_0, c_0), got {type(hx).__name__}")
    if len(hx) != 2:
        kind = IndexError if len(hx) < 2 and dims is not None else RuntimeError
        raise kind(f"lstm expects two hidden states, hx must be (h_0, c_0), got {len(hx)}")
    return hx[0], hx[1]


def names_of_states(argument, state):
    """What the tensors of a state, (h, c) or (h,), are called in an argument of this name."""
    return (argument,) if len(state) == 1 else tuple(f"{argument}[{k}]" for k in range(len(state)))


def check_state_kind(x, state, argument="hx"):
    """Refuse states, (h_0, c_0) or (h_0,), of another device or dtype than x."""
    for name, t in zip(names_of_states(argument, state), state, strict=True):
        if t.device != x.device:
            raise RuntimeError(
                "Input and hidden tensors are not at the same device, "
                f"found input tensor at {x.device} and {name} at {t.device}"
            )
        if t.dtype != x.dtype:
            raise RuntimeError(
                "Input and hidden tensors are not the same dtype, "
                f"found input tensor with {x.dtype} and {name} with {t.dtype}"
            )


def check_batch_sizes(batch_sizes):
    """Refuse batch_sizes unless an int64 vector on the CPU; the op checks its values."""
    if batch_sizes.dim() != 1 or batch_sizes.dtype != torch.int64 or not batch_sizes.is_cpu:
        kind = RuntimeError if batch_sizes.dtype == torch.int32 else TypeError
        raise kind(
            "batch_sizes of the PackedSequence must be int64 of shape (T,) on cpu, "
            f"got {batch_sizes.dtype} of shape {tuple(batch_sizes.shape)} on {batch_sizes.device}"
        )
    if batch_sizes.shape[0] == 0:
        raise IndexError("batch_sizes of the PackedSequence is empty, there must be a time step")


def check_weights(module, weights, dtype):
    """Refuse a weight, named, of another shape or dtype than the module's sizes and input ask for,
    or that is sparse."""
    width = module.proj_size or module.hidden_size
    directions = 2 if module.bidirectional else 1
    each = len(weights) // (module.num_layers * directions)
    for k, (name, w) in enumerate(zip(module._flat_weights_names, weights, strict=True)):
        first = k < each * directions
        inputs = module.input_size if first else width * directions
        expected = module._weight_shape(name.partition("_l")[0], inputs)
        if w.shape != expected:
            raise RuntimeError(f"{name} must have shape {expected}, got {tuple(w.shape)}")
        if w.dtype != dtype:
            raise RuntimeError(f"{name} must be {dtype} as the input is, got {w.dtype}")
        if w.layout is not torch.strided:
            raise RuntimeError(f"{name} must be strided, got {w.layout}")


def check_lengths(input, lengths, batch_first):
    """lengths as an int64 tensor (N,), refused unless it fits input (T, N, I) or (N, T, I).

    On the CPU; lengths on input's CUDA device stay there, and are compared there.
    """
    if not isinstance(input, Tensor) or input.dim() != 3:
        got = f"{input.dim()}-D" if isinstance(input, Tensor) else type(input).__name__
        raise ValueError(f"lengths needs a padded 3-D input, got {got}")
    captured = is_captured()
    stays = isinstance(lengths, Tensor) and padded.stays_on_device(lengths) and not captured
    stays = stays and lengths.device == input.device
    try:
        if not stays:
            lengths = torch.as_tensor(lengths, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"lengths must be a list or a tensor of integers: {error}") from None
    integers = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    if lengths.numel() and lengths.dtype not in integers:
        raise TypeError(f"lengths must be integers, got {lengths.dtype}")
    length, rows = (input.shape[1 - k] if batch_first else input.shape[k] for k in (0, 1))
    if lengths.shape != (rows,):
        raise ValueError(
            f"lengths must hold one length a row, shape ({rows},), got {tuple(lengths.shape)}"
        )
    if stays:
        torch._assert_async(
            ((lengths >= 0) & (lengths <= length)).all(),
            "lengths must be from 0 to the input's length",
        )
    elif rows and not captured and (int(lengths.min()) < 0 or int(lengths.max()) > length):
        raise ValueError(
            f"lengths must be from 0 to {length}, the input's length, "
            f"got {int(lengths.min())} to {int(lengths.max())}"
        )
    return lengths.to(torch.int64)


def check_together(module, resets, reset_state, cell_states, cu_seqlens, max_seqlen, lengths):
    """Refuse options of a call that do not go together, or not with the module."""
    if cell_states and not module._has_cell_state():
        raise TypeError(f"return_cell_states needs an LSTM, {module._kind()} has no cell state")
    if reset_state is not None and resets is None:
        raise ValueError("reset_state is given without resets, which say where it is put in")
    if cu_seqlens is not None and lengths is not None:
        raise ValueError("cu_seqlens and lengths are given, it must be one of them")
    if max_seqlen is not None and cu_seqlens is None:
        raise ValueError("max_seqlen is given without cu_seqlens")


def check_resets(resets, shape, axes, device):
    """Refuse resets unless a bool tensor of this shape, whose axes are named so, on this device."""
    if not isinstance(resets, Tensor):
        raise TypeError(f"resets must be a bool Tensor {axes}, got {type(resets).__name__}")
    if resets.dtype is not torch.bool:
        raise TypeError(f"resets must be of dtype torch.bool, got {resets.dtype}")
    if resets.shape != shape:
        raise ValueError(
            f"resets must have shape {axes}, {tuple(shape)} here, got {tuple(resets.shape)}"
        )
    if resets.device != device:
        raise RuntimeError(f"resets must be on {device} as input is, got {resets.device}")


def check_reset_state(module, reset_state, rows, widths=None):
    """reset_state as a tuple of states (L*D, rows, width); a state (L*D, width) is that of all.

    widths: of the states; left out, those that module, which is of ours then, has.
    """
    widths = module._state_widths() if widths is None else widths
    if len(widths) == 1:
        if not isinstance(reset_state, Tensor):
            raise TypeError(f"reset_state must be a Tensor, got {type(reset_state).__name__}")
        reset_state = (reset_state,)
    elif not isinstance(reset_state, (tuple, list)) or len(reset_state) != len(widths):
        of, count = ("(h, c)", "two") if len(widths) == 2 else ("(h, c, n, m)", "four")
        got = type(reset_state).__name__
        raise TypeError(f"reset_state must be a tuple {of} of {count} tensors, got {got}")
    layers = module.num_layers * (2 if module.bidirectional else 1)
    found = []
    names = names_of_states("reset_state", reset_state)
    for name, t, width in zip(names, reset_state, widths, strict=True):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(t).__name__}")
        each = t.unsqueeze(1).expand(-1, rows, -1) if t.dim() == 2 else t
        if each.shape != (layers, rows, width):
            raise RuntimeError(
                f"{name} must have shape {(layers, width)}, or {(layers, rows, width)} for a state "
                f"of each row, got {tuple(t.shape)}"
            )
        found.append(each)
    return tuple(found)


def check_cu_seqlens(input, cu_seqlens, max_seqlen):
    """Refuse cu_seqlens unless it fits documents (S, I), and max_seqlen unless an int or None."""
    if not isinstance(input, Tensor) or input.dim() != 2:
        got = f"{input.dim()}-D" if isinstance(input, Tensor) else type(input).__name__
        raise ValueError(f"cu_seqlens needs an input of concatenated rows (S, I), got {got}")
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be a Tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            "cu_seqlens must have shape (N + 1,) for N documents, at least one, "
            f"got {tuple(cu_seqlens.shape)}"
        )
    if max_seqlen is not None and (isinstance(max_seqlen, bool) or not isinstance(max_seqlen, int)):
        raise TypeError(f"max_seqlen must be an int, got {type(max_seqlen).__name__}")
    if not cu_seqlens.is_cpu or is_captured():
        return
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != input.shape[0]:
        raise ValueError(
            f"cu_seqlens must begin with 0 and end with {input.shape[0]}, the rows of input, "
            f"got {first} and {last}"
        )
    lengths = cu_seqlens.diff()
    if bool((lengths < 0).any()):
        n = int((lengths < 0).nonzero()[0])
        raise ValueError(
            "cu_seqlens must not decrease, "
            f"got {int(cu_seqlens[n])} and then {int(cu_seqlens[n + 1])}"
        )
    if max_seqlen is not None and int(lengths.max()) > max_seqlen:
        raise ValueError(
            f"max_seqlen must be at least {int(lengths.max())}, the longest document, "
            f"got {max_seqlen}"
        )


def check_checkpoint_every(value):
    """Refuse a value of checkpoint_every that is neither None, "auto" nor an int from 1 on."""
    if value is None or (isinstance(value, str) and value == "auto"):
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f'checkpoint_every must be an int or "auto", got {value!r}')
    if value < 1:
        raise ValueError(f'checkpoint_every must be at least 1 or "auto", got {value}')
