"""A module's call in one call of C++, past torch's dispatcher: all of it, or its checks alone."""

import torch

from lstm_fused import _C, _plan

_IDS = {name: cell["id"] for name, cell in _plan.cells().items()}
_IDS_BY_MODE = {name.upper(): number for name, number in _IDS.items()}
_STEP_WEIGHTS = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]  # of torch.nn's single-step cells
_STEP_WEIGHTS_WITHOUT_BIAS = _STEP_WEIGHTS[:2]


def infer(module, input, hx):
    """The result of a recurrent module, past torch's dispatcher, or a list, or None.

    The list is [x, *states, *weights] where a gradient is to be recorded: nothing has run, and the
    tensors have been found fit. None leaves the call to the operator: a mode, hook or transform of
    torch's observes the call, weights are parametrized, or a tensor is not a contiguous CPU tensor
    of the expected shape and one of the four dtypes. All of that is checked at each call. Errors
    are raised by the operator.

    module: an LSTM, GRU or RNN of torch.nn's attributes. input: (T, N, I), or (N, T, I) if
    ``batch_first``. hx: None, or the states in the form the module takes them.
    """
    layers = module.num_layers
    if layers > 1 and module.dropout and module.training:
        return None
    first = module.batch_first and type(input) is torch.Tensor and input.dim() == 3
    found = _C.infer(
        module._flat_weights_names,
        module._parameters,
        input.transpose(0, 1) if first else input,
        hx,
        _IDS_BY_MODE[module.mode],
        2 if module.bidirectional else 1,
        layers,
    )
    if first and type(found) is tuple:
        return found[0].transpose(0, 1), found[1]
    return found


def infer_step(module, input, hx):
    """`infer` for a single-step cell: input (N, I) or (I,), and the states it returns likewise."""
    names = _STEP_WEIGHTS if module.bias else _STEP_WEIGHTS_WITHOUT_BIAS
    return _C.infer(names, module._parameters, input, hx, _IDS.get(module._cell(), -1))
