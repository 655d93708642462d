"""Sequences of several lengths in one call: packed data, a padded batch with lengths, documents.

Sizes: T steps, N rows, I inputs, H hidden units, R recurrent width, S rows of packed data or of
documents, L layers, D directions.
"""

import torch
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from lstm_fused import by_reference, call_options, errors, padded
from lstm_fused.call_options import Given
from lstm_fused.fallback import TRACED, Fused, State
from lstm_fused.observed import is_captured, is_transformed


class Sequences(Fused[State]):
    """The part of Recurrent that runs sequences of several lengths; uses the rest of it.

    given: the call's options but for those named beside it, or None where there are none. What is
    returned is output, the states as the user receives them and, where given asks for them, the
    cell states laid out as output.
    """

    def _forward_packed(self, packed, hx, given=None):
        x, batch_sizes, sorted_indices, unsorted_indices = packed
        weights = self._weights()
        # torch.onnx on TorchScript looks for torch's operator between packing and padding.
        if reason := TRACED if torch.jit.is_tracing() else self._fallback_reason(x, hx, weights):
            given = call_options.for_fallback(self, x, reason, given)
            if given is None:
                return self._through_torch(reason, packed, hx)
        errors.check_batch_sizes(batch_sizes)
        dtype = self._input_dtype(weights)
        plain = x.dim() == 2 and x.shape[1] == self.input_size and x.dtype is dtype
        if not plain or self._overridden:
            errors.check_input(self, x, batch_sizes)
        state, options = (), None
        if hx is not None or given is not None:
            rows = self._rows_of(packed, hx)
            if hx is not None:
                state = _permuted(self._check_state(hx, None, rows), sorted_indices)
            if given is not None:
                resets = call_options.packed_resets(given.resets, packed, rows, self.batch_first)
                prepared = self, given, x, state, rows, resets, sorted_indices
                state, options = call_options.prepared(*prepared)
        y, state, *cells = self._run(x, batch_sizes, state, weights, options)
        state = self._as_given(_permuted(state, unsorted_indices))
        y, *cells = (
            PackedSequence(t, batch_sizes, sorted_indices, unsorted_indices) for t in (y, *cells)
        )
        return y, state, *cells

    def _rows_of(self, packed, hx):
        """The number of rows of a PackedSequence."""
        if packed.sorted_indices is not None:
            return packed.sorted_indices.shape[0]
        if is_captured() and hx is not None:
            return self._as_state(hx)[0].shape[1]  # the operator compares
        return int(packed.batch_sizes[0])

    def _forward_padded(self, input, hx, lengths, given=None):
        """input (T, N, I) or (N, T, I) whose row n holds lengths[n] steps, then padding."""
        if isinstance(input, torch.fx.Proxy):
            return self._fx_leaf(input, hx, lengths=lengths, **call_options.keywords(given))
        lengths = errors.check_lengths(input, lengths, self.batch_first)
        x = input.transpose(0, 1) if self.batch_first else input
        total, count, width = x.shape
        dtype = self._input_dtype(self._weights())
        plain = width == self.input_size and total and x.dtype is dtype
        if not plain or self._overridden:
            errors.check_input(self, input, None)
        state = () if hx is None else self._check_state(hx, 3, count)
        dense = given
        if given is not None:
            resets = call_options.dense_resets(given.resets, x, 3, self.batch_first)
            dense = given._replace(resets=resets)
        if is_captured() or is_transformed():
            return self._laid_out(*self._run_lengths(x, lengths, state, dense))
        if padded.stays_on_device(lengths):
            fused = self._fallback_reason(x, hx, self._weights()) is None
            if fused and padded.is_maskable(self, state, dense):
                return self._laid_out(*self._run_lengths(x, lengths, state, dense, padded.masked))
            lengths = lengths.cpu()
        if count == 0 or int(lengths.min()) == total:
            return self.forward(input, hx, **call_options.keywords(given))
        return self._laid_out(*self._run_rows(x, lengths, state, dense))

    def _laid_out(self, y, state, *cells):
        """What _run returns of a (T, N, I) input, as the user receives it."""
        if self.batch_first:
            y, *cells = (t.transpose(0, 1) for t in (y, *cells))
        return y, self._as_given(state), *cells

    def _run_lengths(self, x, lengths, state, given, layer=None):
        """_run of x (T, N, I) without reading the values of lengths; given.resets is (T, N)."""
        weights = self._weights()
        if reason := self._fallback_reason(x, None, weights):
            raise RuntimeError(f"lengths= cannot be recorded in a graph: {reason}")
        options = None
        if given is not None or layer is not None:
            given = (given or Given())._replace(layer=layer)
            prepared = self, given, x, state, x.shape[1], given.resets
            state, options = call_options.prepared(*prepared)
        return self._run(x, lengths, state, weights, options)

    def _run_rows(self, x, lengths, state, given):
        """_run of x (T, N, I) without its padding; given.resets is (T, N)."""
        total, count, _ = x.shape
        rows = lengths.nonzero().squeeze(1)
        if len(rows) == 0:
            return self._no_steps(x, state, given)
        if len(rows) == count:
            return self._run_packed(x, lengths, state, given)
        at = rows.to(x.device)
        part_state = tuple(s.index_select(1, at) for s in state)
        if given is not None and given.resets is not None:
            given = given._replace(resets=given.resets.index_select(1, at))
            if given.reset_state is not None:
                each = errors.check_reset_state(self, given.reset_state, count)
                each = tuple(s.index_select(1, at) for s in each)
                each = each[0] if len(each) == 1 else each
                given = given._replace(reset_state=each)
        part, ends, *cells = self._run_packed(
            x.index_select(1, at), lengths[rows], part_state, given
        )
        y, zeros = self._zeros(part, total, count)
        y = y.index_copy(1, at, part)
        cells = [c.new_zeros(total, count, c.shape[2]).index_copy(1, at, c) for c in cells]
        state = tuple(
            s.to(end.dtype).index_copy(1, at, end)
            for s, end in zip(state or zeros, ends, strict=True)
        )
        return y, state, *cells

    def _run_packed(self, x, lengths, state, given):
        """_run_rows, lengths being from 1 to T."""
        pack = torch.nn.utils.rnn.pack_padded_sequence
        packed = pack(x, lengths, enforce_sorted=False)
        if given is not None and given.resets is not None:
            resets = pack(given.resets, lengths, enforce_sorted=False)
            given = given._replace(resets=resets)
        hx = self._as_given(state) if state else None
        y, state, *cells = self._forward_packed(packed, hx, given)
        y, *cells = (pad_packed_sequence(t, total_length=x.shape[0])[0] for t in (y, *cells))
        return y, self._as_state(state), *cells

    def _no_steps(self, x, state, given):
        """_run_rows of x (T, N, I) without a row of at least one step."""
        y, zeros = self._zeros(x, *x.shape[:2])
        h_n, *c_n = state or zeros
        cells = []
        if given is not None and given.cell_states:
            directions = 2 if self.bidirectional else 1
            cells = [x.new_zeros(*x.shape[:2], directions * self.hidden_size)]
        if not torch.is_autocast_enabled(x.device.type):
            return y, (h_n, *c_n), *cells
        grad = torch.is_grad_enabled()
        dtype, h_dtype = self._autocast_dtypes(x, True, state, self._weights(), grad)
        ends = h_n.to(h_dtype), *(c.to(dtype) for c in c_n)
        return y.to(h_dtype), ends, *(c.to(dtype) for c in cells)

    def _zeros(self, like, total, count):
        """Zeros for y (T, N, D*R) and the final states."""
        directions = 2 if self.bidirectional else 1
        width = self.proj_size or self.hidden_size
        layers = self.num_layers * directions
        y = like.new_zeros(total, count, directions * width)
        states = tuple(like.new_zeros(layers, count, w) for w in self._state_widths())
        return y, self._as_state(states[0] if len(states) == 1 else states)

    def _forward_documents(self, input, hx, cu_seqlens, max_seqlen, given):
        """input (S, I): N documents one after the other, where cu_seqlens (N + 1,) says."""
        if isinstance(input, torch.fx.Proxy):
            more = {
                "cu_seqlens": cu_seqlens,
                "max_seqlen": max_seqlen,
                **call_options.keywords(given),
            }
            return self._fx_leaf(input, hx, **more)
        errors.check_cu_seqlens(input, cu_seqlens, max_seqlen)
        weights, rows = self._weights(), cu_seqlens.shape[0] - 1
        if reason := self._fallback_reason(input, hx, weights):
            by_reference.announce(self, input, reason)
            given = given._replace(layer=by_reference.layer)
        batch_sizes = cu_seqlens.unsqueeze(0)
        S, width = input.shape
        if width != self.input_size or not S or input.dtype is not self._input_dtype(weights):
            errors.check_input(self, input, batch_sizes)
        state = () if hx is None else self._check_state(hx, None, rows)
        if given.resets is not None:
            errors.check_resets(given.resets, (S,), "(S,)", input.device)
        if padded.stays_on_device(input) and reason is None:
            return self._documents_padded(input, cu_seqlens, max_seqlen, state, given)
        prepared = self, given, input, state, rows, given.resets
        state, options = call_options.prepared(*prepared)
        batch_sizes = batch_sizes.to("cpu", torch.int64)
        y, state, *cells = self._run(input, batch_sizes, state, weights, options)
        return y, self._as_given(state), *cells

    def _documents_padded(self, x, cu_seqlens, max_seqlen, state, given):
        """As _forward_documents, where each document becomes a row of max_seqlen steps."""
        if max_seqlen is None:
            if is_captured():
                raise RuntimeError(
                    "max_seqlen must be given with cu_seqlens where a graph is captured on a CUDA "
                    "device, its values are not known there"
                )
            max_seqlen = int(cu_seqlens.diff().max())
        layout = padded.Documents(cu_seqlens.to(x.device, torch.int64), max_seqlen, x.shape[0])
        resets = given.resets
        given = given._replace(resets=None if resets is None else layout.padded(resets))
        x = layout.padded(x)
        if padded.is_maskable(self, state, given):
            y, state, *cells = self._run_lengths(x, layout.lengths, state, given, padded.masked)
        elif is_captured():
            y, state, *cells = self._run_lengths(x, layout.lengths, state, given)
        else:
            y, state, *cells = self._run_rows(x, layout.lengths.cpu(), state, given)
        y, *cells = (layout.concatenated(t) for t in (y, *cells))
        return y, self._as_given(state), *cells


def _permuted(state, permutation):
    return state if permutation is None else tuple(s.index_select(1, permutation) for s in state)
