"""LSTM and GRU with the regularizers of the field.

Sizes: T steps, N rows, I inputs, H hidden units, R recurrent width, S rows of packed data or of
documents.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import dropout

from lstm_fused import reference_variants
from lstm_fused.cells.base import DescribedLayer, HiddenState, TwoStates
from lstm_fused.fallback import State

if TYPE_CHECKING:
    from torch.types import Device

_MODES = "variational", "update"


class _Regularized(DescribedLayer[State]):
    """What RegularizedLSTM and RegularizedGRU share: the options, and the masks they ask for.

    plain_cell: what runs while no option needs more; cell: what runs then; variational_cell: where
    h has a mask, csrc/cells/variational.h. masks of the operator: that of the update, then one of
    zoneout for each state, c first; of variational_cell one more, of h before W_hh.
    """

    plain_cell: str
    variational_cell: str
    recurrent_dropout: float
    recurrent_dropout_mode: str
    weight_dropout: float
    clip: float | None

    def _set_options(self, recurrent_dropout_mode, clips, **probabilities):
        """Check and set what both classes have; clips and probabilities by name."""
        if recurrent_dropout_mode not in _MODES:
            raise ValueError(
                'recurrent_dropout_mode must be "variational" or "update", '
                f"got {recurrent_dropout_mode!r}"
            )
        self.recurrent_dropout_mode = recurrent_dropout_mode
        for name, p in probabilities.items():
            if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p <= 1:
                raise ValueError(f"{name} must be a probability from 0 to 1, got {p!r}")
            setattr(self, name, float(p))
        for name, bound in clips.items():
            number = isinstance(bound, (int, float)) and not isinstance(bound, bool)
            if bound is not None and not (number and bound > 0):
                raise ValueError(f"{name} must be a number above 0 or None, got {bound!r}")
            setattr(self, name, None if bound is None else float(bound))

    # What a call needs.

    def _zoneouts(self):
        """The probabilities of zoneout, in the order of the operator's masks."""
        raise NotImplementedError

    def _drops(self, mode):
        return self.training and self.recurrent_dropout_mode == mode and self.recurrent_dropout > 0

    def _is_plain(self):
        """Whether no mask is needed and nothing is clipped."""
        return not (
            any(self._zoneouts())
            or self.clip is not None
            or self._drops("update")
            or self._drops("variational")
        )

    def _cell(self):
        if self._drops("variational"):
            return self.variational_cell
        return self.plain_cell if self._is_plain() else self.cell

    # Weights and masks.

    def _operator_weights(self, own, x, direction):
        if self.weight_dropout and self.training:
            own = own | {"weight_hh": dropout(own["weight_hh"], self.weight_dropout)}
        return super()._operator_weights(own, x, direction)

    def _masks(self, x, batch_sizes):
        if self._is_plain():
            return None
        shape, p = (*x.shape[:-1], self.hidden_size), self.recurrent_dropout
        ones = x.new_ones(shape)
        masks = [dropout(ones, p) if self._drops("update") else ones]
        for z in self._zoneouts():
            constant = x.new_full(shape, z)
            masks.append(torch.bernoulli(constant) if self.training and 0 < z < 1 else constant)
        if self._drops("variational"):
            masks.append(self._hidden_mask(x, batch_sizes))
        elif self._reference() is not None:
            masks.append(ones)
        return torch.cat(masks, dim=-1)

    def _hidden_mask(self, x, batch_sizes):
        """(*x.shape[:-1], H): one mask of each row for all of its steps."""
        dense = batch_sizes is None or x.dim() == 3
        if dense:
            rows = x.shape[1]
        elif batch_sizes.dim() == 2:
            rows = batch_sizes.shape[1] - 1
        else:
            rows = int(batch_sizes[0])
        mask = dropout(x.new_ones(rows, self.hidden_size), self.recurrent_dropout)
        if dense:
            return mask.expand(x.shape[0], -1, -1)
        if batch_sizes.dim() == 2:
            return mask.repeat_interleave(batch_sizes[0].diff().to(x.device), 0)
        return torch.cat([mask[:n] for n in batch_sizes.tolist()])

    def _run_layer(self, run, x, batch_sizes, state0, weights, directions, **more):
        if not self._drops("variational") or self._reference() is not None:
            return super()._run_layer(run, x, batch_sizes, state0, weights, directions, **more)
        # The cell's own h, which is masked, and the one that the layer has as its last cell state.
        H, each = self.hidden_size, len(weights) // directions
        if state0:
            masks = [weights[d * each - 1][..., -H:] for d in range(1, directions + 1)]
            h0, *c0 = state0
            rows = torch.stack([_of_each_row(m, batch_sizes) for m in masks])
            state0 = rows.repeat(1, h0.shape[1] // rows.shape[1], 1) * h0, torch.cat((*c0, h0), -1)
        wants_cells = more.pop("cell_states", False)
        _, (_, ends), cells = super()._run_layer(
            *(run, x, batch_sizes, state0, weights, directions), cell_states=True, **more
        )
        cells = cells.unflatten(-1, (directions, -1, H))
        y, state = cells[..., -1, :].flatten(-2), (ends[..., -H:], ends[..., :H])[: self._states]
        return (y, state, cells[..., 0, :].flatten(-2)) if wants_cells else (y, state)

    def _clip_row(self, like, bound):
        return like.new_full((1, self.hidden_size), math.inf if bound is None else bound)

    def _options_repr(self, **defaults):
        found = {name: getattr(self, name) for name in defaults}
        return "".join(f", {n}={v!r}" for n, v in found.items() if v != defaults[n])


def _of_each_row(masks, batch_sizes):
    """(N, H): that of a step of each row, of masks (T, N, H) or (S, H)."""
    if masks.dim() == 3:
        return masks[0]
    if batch_sizes.dim() == 2:  # documents; one without a step has any
        return masks[batch_sizes[0, :-1].clamp(max=len(masks) - 1).to(masks.device)]
    return masks[: int(batch_sizes[0])]


class RegularizedLSTM(_Regularized[Any], TwoStates):
    """LSTM with dropout of the recurrence, zoneout, DropConnect, clips and peepholes.

    Arguments of a call, shapes and errors are those of ``lstm_fused.LSTM``. Options that are off
    cost nothing: with none but ``weight_dropout`` and ``forget_bias`` the LSTM's own kernels run.
    Masks are torch's random numbers, drawn for each call, in training mode only; the same seed
    gives the same masks on every machine and number of threads. How many are drawn depends on the
    form of the input: padded and packed data do not have the same.

    Args:
        recurrent_dropout: the probability with which a hidden unit is dropped in the recurrence;
            what stays is divided by 1 - recurrent_dropout.
        recurrent_dropout_mode: ``"variational"``: one mask of h before W_hh for all steps of a row,
            that of Gal and Ghahramani 2016, and of Keras.
            ``"update"``: a mask of g for each step, that of Semeniuta, Severyn and Barth 2016.
        zoneout_h, zoneout_c: the probability with which a unit keeps its h, or c, of the step
            before; in evaluation mode the expectation of both. Krueger et al. 2017; as there h is
            made of the new c, before that is zoned out.
        weight_dropout: the probability with which an entry of W_hh is zero, in all steps of a call
            alike; the others are divided by 1 - weight_dropout. DropConnect as in AWD-LSTM, Merity
            et al. 2018.
        forget_bias: the initial bias of the forget gate: b_ih has it, b_hh is 0 there. As in
            haste, and in Keras, where ``unit_forget_bias`` is a forget_bias of 1; TF's cells add
            theirs in each step instead. None for torch.nn's uniform numbers. Jozefowicz et al.
            2015.
        clip: pre-activations are clipped to [-clip, clip], ONNX's ``clip``.
        cell_clip: the new c is clipped to [-cell_clip, cell_clip], TF's and cuDNN's.
        proj_clip: so is the projected h, with ``proj_size``; through the reference.
        peepholes: whether gates see c, as in ``PeepholeLSTM``.

    Masks and clips of a layer with ``proj_size`` run through the reference, with one warning.

    Weights: those of ``LSTM``, with peepholes ``weight_ph_l{k}`` (3, H) as well.

    Raises:
        ValueError: a probability is not from 0 to 1, a clip not above 0, proj_clip is given without
            proj_size, or forget_bias without a bias.
    """

    cell = "regularized_lstm"
    variational_cell = "variational_lstm"
    gates = 4

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
            recurrent_dropout: float = 0.0,
            recurrent_dropout_mode: str = "variational",
            zoneout_h: float = 0.0,
            zoneout_c: float = 0.0,
            weight_dropout: float = 0.0,
            forget_bias: float | None = None,
            clip: float | None = None,
            cell_clip: float | None = None,
            proj_clip: float | None = None,
            peepholes: bool = False,
            learned_initial_state: bool = False,
        ) -> None: ...

    else:

        def __init__(
            self,
            *args: Any,
            recurrent_dropout: float = 0.0,
            recurrent_dropout_mode: str = "variational",
            zoneout_h: float = 0.0,
            zoneout_c: float = 0.0,
            weight_dropout: float = 0.0,
            forget_bias: float | None = None,
            clip: float | None = None,
            cell_clip: float | None = None,
            proj_clip: float | None = None,
            peepholes: bool = False,
            **kwargs: Any,
        ) -> None:
            self._set_options(
                recurrent_dropout_mode,
                {"clip": clip, "cell_clip": cell_clip, "proj_clip": proj_clip},
                recurrent_dropout=recurrent_dropout,
                zoneout_h=zoneout_h,
                zoneout_c=zoneout_c,
                weight_dropout=weight_dropout,
            )
            self.forget_bias, self.peepholes = forget_bias, bool(peepholes)
            self.vectors = ("weight_ph", 3) if peepholes else None
            super().__init__(*args, **kwargs)
            if proj_clip is not None and not self.proj_size:
                raise ValueError("proj_clip needs a proj_size")
            if forget_bias is not None and not self.bias:
                raise ValueError("forget_bias needs bias=True")

    @property
    def plain_cell(self):
        return "peephole_lstm" if self.peepholes else "lstm"

    def _zoneouts(self):
        return self.zoneout_c, self.zoneout_h

    def _is_plain(self):
        clipped = self.cell_clip is not None or self.proj_clip is not None
        return not clipped and super()._is_plain()

    def _unsupported_reason(self):
        if self.proj_size and not self._is_plain():
            return "the kernels have no masks and no clips with a projection"
        return super()._unsupported_reason()

    def _reference(self):
        by_own = self.proj_size and not self._is_plain()
        return reference_variants.projected_lstm(self.proj_clip) if by_own else None

    def _vectors(self, own):
        peepholes = own.get("weight_ph")
        if self._is_plain():
            return peepholes
        like = own["weight_ih"]
        if peepholes is None:
            peepholes = like.new_zeros(3, self.hidden_size)
        rows = self._clip_row(like, self.clip), self._clip_row(like, self.cell_clip)
        return torch.cat((peepholes, *rows))

    def _init_own(self, own):
        H = self.hidden_size
        if self.forget_bias is not None and self.bias:
            own["bias_ih"][H : 2 * H] = self.forget_bias
            own["bias_hh"][H : 2 * H] = 0

    def extra_repr(self):
        return super().extra_repr() + self._options_repr(
            recurrent_dropout=0.0,
            recurrent_dropout_mode="variational",
            zoneout_h=0.0,
            zoneout_c=0.0,
            weight_dropout=0.0,
            forget_bias=None,
            clip=None,
            cell_clip=None,
            proj_clip=None,
            peepholes=False,
        )


class RegularizedGRU(_Regularized[Any], HiddenState):
    """GRU with dropout of the recurrence, zoneout, DropConnect and a clip.

    Arguments of a call, shapes and errors are those of ``lstm_fused.GRU``, and so are the weights.
    Everything said of ``RegularizedLSTM`` holds.

    Args:
        recurrent_dropout, recurrent_dropout_mode, weight_dropout, clip: as in ``RegularizedLSTM``;
            ``"update"`` masks n, and ``"variational"`` what W_hh multiplies, not the h that the
            update gate keeps.
        zoneout: the probability with which a unit keeps its h of the step before; in evaluation
            mode the expectation of both.

    Raises:
        ValueError: a probability is not from 0 to 1, or clip not above 0.
    """

    cell = "regularized_gru"
    variational_cell = "variational_gru"
    plain_cell = "gru"
    gates = 3

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
            recurrent_dropout: float = 0.0,
            recurrent_dropout_mode: str = "variational",
            zoneout: float = 0.0,
            weight_dropout: float = 0.0,
            clip: float | None = None,
            learned_initial_state: bool = False,
        ) -> None: ...

    else:

        def __init__(
            self,
            *args: Any,
            recurrent_dropout: float = 0.0,
            recurrent_dropout_mode: str = "variational",
            zoneout: float = 0.0,
            weight_dropout: float = 0.0,
            clip: float | None = None,
            **kwargs: Any,
        ) -> None:
            self._set_options(
                recurrent_dropout_mode,
                {"clip": clip},
                recurrent_dropout=recurrent_dropout,
                zoneout=zoneout,
                weight_dropout=weight_dropout,
            )
            super().__init__(*args, **kwargs)

    def _zoneouts(self):
        return (self.zoneout,)

    def _vectors(self, own):
        return None if self._is_plain() else self._clip_row(own["weight_ih"], self.clip)

    def extra_repr(self):
        return super().extra_repr() + self._options_repr(
            recurrent_dropout=0.0,
            recurrent_dropout_mode="variational",
            zoneout=0.0,
            weight_dropout=0.0,
            clip=None,
        )
