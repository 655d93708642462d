"""torch.nn.LSTM with our kernels under it."""

import warnings

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lstm_fused import checks, cuda, dynamo, ops

_FUSED_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
_PLAIN_TYPES = frozenset((Tensor, Parameter))
_HAS_ONEDNN = torch.backends.mkldnn.is_available()
_warned = set()


def why_torch(x, hx, weights):
    """Why torch's own LSTM would run on these tensors, or None when the fused kernels would.

    x: the input's data (T, N, I), (N, T, I), (T, I) or packed (S, I); hx: what was given as such,
    not yet checked; weights: every weight of the module.
    """
    if not x.is_cpu and (reason := _why_not_on(x.device)):
        return reason
    if x.dtype not in _FUSED_DTYPES:
        return f"the fused kernels have no {x.dtype}"
    if x.layout is not torch.strided:
        return f"the input's layout is {x.layout}, the fused kernels need strided tensors"
    if torch.compiler.is_compiling():
        return None
    if torch.jit.is_tracing():
        return "torch.jit.trace records torch's op, for programs without lstm_fused"
    for t in (x, *weights):
        same = t.is_cpu if x.is_cpu else isinstance(t, Tensor) and t.device == x.device
        if (type(t) not in _PLAIN_TYPES or not same) and (reason := _why_not_plain(t, x)):
            return reason
    if torch._C._functorch.peek_interpreter_stack() is not None:
        for level in torch._C._functorch.get_interpreter_stack():
            transform = str(level.key()).partition(".")[2]
            if transform in ("Vmap", "Jvp"):
                return f"the fused op has no rule for torch.func's {transform.lower()}"
    if forward_ad._current_level >= 0:
        states = hx if isinstance(hx, (tuple, list)) else ()
        if any(_has_tangent(t) for t in (x, *states, *weights)):
            return "the fused op has no forward-mode derivative"
    return None


def _why_not_on(device):
    if device.type != "cuda":
        return f"the input is on {device}, the fused kernels run on cpu and cuda"
    # While compiling, an old device is left to the operator to refuse.
    reason = None if torch.compiler.is_compiling() else cuda.why_not(device)
    return reason and f"the input is on {device}: {reason}"


def _why_not_plain(t, x):
    from torch._subclasses.fake_tensor import FakeTensor

    if not isinstance(t, Tensor):
        return f"a weight is {t}"
    if t.device != x.device:
        return f"a weight is on {t.device}, the input on {x.device}"
    if type(t) in _PLAIN_TYPES or isinstance(t, FakeTensor):
        return None
    return f"{type(t).__name__} is a Tensor subclass"


def _has_tangent(t):
    return isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None


class LSTM(torch.nn.LSTM):
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
            row's own end (``hx`` for a row of length 0).

    Returns:
        ``output, (h_n, c_n)``: (T, N, D*R) laid out as the input was, (L*D, N, R), (L*D, N, H).

    Raises:
        ValueError: ``input`` is not 2-D or 3-D, its dtype is not the weights', or ``lengths``
            does not fit the input.
        RuntimeError: a size or a device of ``input``, ``hx`` or a weight does not fit, T is 0, or
            ``hx`` has another dtype.
        TypeError, IndexError, AttributeError: an argument is of the wrong kind.

    Inputs without a fused path (another device than cpu and cuda, other dtypes, Tensor subclasses,
    vmap, forward-mode derivatives, ``torch.jit.trace``) run through ``torch.nn.LSTM`` itself, with
    one warning for each reason. ``torch.jit.script`` compiles ``torch.nn.LSTM``'s own forward, with
    the same warning. ``lstm_fused.explain`` tells beforehand.

    The equations and the options are those of ``torch.nn.LSTM``'s documentation; Hochreiter and
    Schmidhuber, Long Short-Term Memory, 1997; for ``proj_size`` Sak, Senior and Beaufays, Long
    Short-Term Memory Based Recurrent Neural Network Architectures, 2014.
    """

    def forward(self, input, hx=None, *, lengths=None):
        if lengths is not None:
            return self._forward_padded(input, hx, lengths)
        if type(input) is not Tensor:
            if isinstance(input, PackedSequence):
                return self._forward_packed(input, hx)
            if isinstance(input, torch.fx.Proxy):
                return self._fx_leaf(input, hx)
        dim = input.dim()
        if dim != 3 and dim != 2:
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {dim}D instead")
        weights = self._weights()
        if reason := why_torch(input, hx, weights):
            return self._through_torch(reason, input, hx)
        x = input
        if dim == 2:
            x = input.unsqueeze(1)
        elif self.batch_first:
            x = input.transpose(0, 1)
        length, rows, width = x.shape
        if width != self.input_size or length == 0 or x.dtype is not weights[0].dtype:
            checks.check_input(self, x, None)
        if hx is not None:
            hx = checks.check_state(self, hx, dim, rows)
        y, state = self._run(x, None, hx, weights)
        if dim == 2:
            return y.squeeze(1), (state[0].squeeze(1), state[1].squeeze(1))
        return (y.transpose(0, 1) if self.batch_first else y), state

    def _forward_packed(self, packed, hx):
        x, batch_sizes, sorted_indices, unsorted_indices = packed
        weights = self._weights()
        if reason := why_torch(x, hx, weights):
            return self._through_torch(reason, packed, hx)
        checks.check_batch_sizes(batch_sizes)
        if x.dim() != 2 or x.shape[1] != self.input_size or x.dtype is not weights[0].dtype:
            checks.check_input(self, x, batch_sizes)
        if hx is not None:
            rows = int(batch_sizes[0]) if sorted_indices is None else sorted_indices.shape[0]
            hx = self.permute_hidden(checks.check_state(self, hx, None, rows), sorted_indices)
        y, state = self._run(x, batch_sizes, hx, weights)
        state = self.permute_hidden(state, unsorted_indices)
        return PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices), state

    def _forward_padded(self, input, hx, lengths):
        """input (T, N, I) or (N, T, I) whose row n holds lengths[n] steps, then padding."""
        lengths = checks.check_lengths(input, lengths, self.batch_first)
        x = input.transpose(0, 1) if self.batch_first else input
        checks.check_input(self, x, None)
        total, count = x.shape[:2]
        if hx is not None:
            hx = checks.check_state(self, hx, 3, count)
        if count == 0 or int(lengths.min()) == total:
            return self.forward(input, hx)
        rows = lengths.nonzero().squeeze(1)
        if len(rows) == 0:
            y, state = self._zeros(x, total, count)
            state = hx or state
        elif len(rows) == count:
            y, state = self._forward_rows(x, lengths, hx)
        else:
            at = rows.to(x.device)
            part_hx = None if hx is None else tuple(s.index_select(1, at) for s in hx)
            part, ends = self._forward_rows(x.index_select(1, at), lengths[rows], part_hx)
            y, state = self._zeros(part, total, count)
            y = y.index_copy(1, at, part)
            state = tuple(
                s.to(end.dtype).index_copy(1, at, end)
                for s, end in zip(hx or state, ends, strict=True)
            )
        return (y.transpose(0, 1) if self.batch_first else y), state

    def _forward_rows(self, x, lengths, hx):
        """x (T, N, I), lengths (N,) from 1 to T, in any order."""
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        y, state = self._forward_packed(packed, hx)
        return pad_packed_sequence(y, total_length=x.shape[0])[0], state

    def _zeros(self, like, total, count):
        """Zeros for y (T, N, D*R), (h_n (L*D, N, R), c_n (L*D, N, H))."""
        directions = 2 if self.bidirectional else 1
        width = self.proj_size or self.hidden_size
        layers = self.num_layers * directions
        y = like.new_zeros(total, count, directions * width)
        h_n = like.new_zeros(layers, count, width)
        return y, (h_n, like.new_zeros(layers, count, self.hidden_size))

    def _weights(self):
        """Every weight as it is now, in the order of _flat_weights_names."""
        params = self._parameters
        try:
            return [params[name] for name in self._flat_weights_names]
        except KeyError:  # parametrized, pruned, weight-normed, or a replica: plain attributes
            return [getattr(self, name) for name in self._flat_weights_names]

    def _run(self, x, batch_sizes, hx, weights):
        """All layers: x (T, N, I) or packed (S, I), hx None or (L*D, N, R), (L*D, N, H)."""
        if torch.is_autocast_enabled(x.device.type):
            return self._run_autocast(x, batch_sizes, hx, weights)
        if hx is not None:
            h_0, c_0 = hx
            same = h_0.dtype is x.dtype is c_0.dtype
            if not (same and h_0.device == x.device == c_0.device):
                checks.check_state_kind(x, hx)
        try:
            if self.num_layers == 1:
                directions = 2 if self.bidirectional else 1
                return ops.layer(x, batch_sizes, hx or (), weights, "lstm", directions)
            return self._run_layers(x, batch_sizes, hx, weights)
        except RuntimeError:
            checks.check_weights(self, weights, x.dtype)
            raise

    def _run_layers(self, x, batch_sizes, hx, weights):
        directions = 2 if self.bidirectional else 1
        each = len(weights) // self.num_layers
        dropout = self.dropout if self.training else 0.0
        states = [()] * self.num_layers
        if hx is not None:
            states = list(zip(hx[0].split(directions), hx[1].split(directions), strict=True))
        h_n, c_n = [], []
        for k in range(self.num_layers):
            if k and dropout:
                x = torch.dropout(x, dropout, True)
            layer_weights = weights[k * each : (k + 1) * each]
            x, (h, c) = ops.layer(x, batch_sizes, states[k], layer_weights, "lstm", directions)
            h_n.append(h)
            c_n.append(c)
        return x, (torch.cat(h_n), torch.cat(c_n))

    def _run_autocast(self, x, batch_sizes, hx, weights):
        dtype, h_dtype = self._autocast_dtypes(x, batch_sizes, hx, weights)
        hx = hx and tuple(s.to(dtype) for s in hx)
        with torch.autocast(x.device.type, enabled=False):
            weights = [w.to(dtype) for w in weights]
            y, (h_n, c_n) = self._run(x.to(dtype), batch_sizes, hx, weights)
        return y.to(h_dtype), (h_n.to(h_dtype), c_n)

    def _autocast_dtypes(self, x, batch_sizes, hx, weights):
        """The dtypes of (c_n and everything computed, output and h_n) under autocast.

        torch.nn.LSTM runs wholly in autocast's dtype where oneDNN or cuDNN has the layer. Elsewhere
        it only narrows matrix products, and its cell state keeps the wider of autocast's and c_0's
        dtype: that is the one everything runs in here.
        """
        tensors = (x, *(hx or ()), *weights)
        double = [t.dtype is torch.float64 for t in tensors]
        if all(double):
            return torch.float64, torch.float64
        if any(double):
            raise RuntimeError(
                "autocast leaves float64 as it is, so that input, hx and weights must be float64 "
                f"all or none, got {sorted({str(t.dtype) for t in tensors})}"
            )
        narrow = torch.get_autocast_dtype(x.device.type)
        if x.is_cuda:
            return narrow, narrow
        onednn = _HAS_ONEDNN and torch.backends.mkldnn.enabled
        dense = batch_sizes is None and not self.proj_size
        if onednn and dense and x.dtype in (torch.float32, torch.bfloat16):
            return narrow, narrow
        wide = torch.promote_types(narrow, x.dtype if hx is None else hx[1].dtype)
        return wide, narrow if self.proj_size else wide

    def _through_torch(self, reason, input, hx):
        result = super().forward(input, hx)
        if not torch.compiler.is_compiling():
            _warn_once(reason)
        return result

    def _fx_leaf(self, input, hx):
        """torch.fx keeps torch.nn's own modules whole; this one asks for the same."""
        tracer = input.tracer
        return tracer.create_proxy("call_module", tracer.path_of_module(self), (input, hx), {})

    def __prepare_scriptable__(self):
        """What torch.jit.script compiles for this module: a torch.nn.LSTM of the same state.

        torch.jit.script also puts it into the model in this module's place.
        """
        _warn_once(
            "torch.jit.script cannot call the fused op, and leaves torch.nn.LSTM in the model "
            "(lstm_fused.replace brings the fused module back)"
        )
        twin = torch.nn.LSTM.__new__(torch.nn.LSTM)
        twin.__dict__ = self.__dict__
        return twin


def _warn_once(reason):
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"lstm_fused.LSTM ran through torch.nn.LSTM: {reason}", stacklevel=6)


dynamo.allow(LSTM)
