"""A module's call in one call of C++, past torch's dispatcher: all of it, or its checks alone."""

import torch

from lstm_fused import _C, _plan

_IDS = {name: cell["id"] for name, cell in _plan.cells().items()}
_IDS_BY_MODE = {
    name.upper(): cell["id"]
    for name, cell in _plan.cells().items()
    if not cell.get("described", False)
}
_STEP_WEIGHTS = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]  # of torch.nn's single-step cells
_STEP_WEIGHTS_WITHOUT_BIAS = _STEP_WEIGHTS[:2]


def infer(module, input, hx):
    """The result of a recurrent module, past torch's dispatcher, or a list, or None.

    The list is [x (T, N, I), *states, *weights] where a gradient is to be recorded: nothing has
    run, and the tensors have been found fit. None leaves the call to the operator: a mode, hook or
    transform of torch's observes the call, weights are parametrized, a tensor is not a contiguous
    CPU tensor of the expected shape and one of the four dtypes, or a gradient would pass through
    quantized weights, or the cell is a described one. All of that is checked at each call. Errors
    are raised by the operator.

    module: an LSTM, GRU or RNN of ours. input: (T, N, I), or (N, T, I) if ``batch_first``. hx:
    None, or the states in the form the module takes them.
    """
    layers = module.num_layers
    if layers > 1 and module.dropout and module.training:
        return None
    number = _IDS_BY_MODE.get(module.mode)
    if number is None:  # a described cell
        return None
    # The weights, looked up here instead of in weights_of: a tenth of a microsecond less.
    quantized = module.weights_dtype is not None
    hidden_size = proj_size = 0
    if quantized:
        hidden_size, proj_size = module.hidden_size, module.proj_size
    found = _C.infer(
        module._buffer_names if quantized else module._flat_weights_names,
        module._buffers if quantized else module._parameters,
        input,
        hx,
        number,
        2 if module.bidirectional else 1,
        layers,
        hidden_size,
        proj_size,
        module.batch_first,
    )
    if type(found) is list:
        if quantized:
            return None
        if module.batch_first:
            found[0] = input.transpose(0, 1)
    return found


def infer_step(module, input, hx):
    """`infer` for a single-step cell: input (N, I) or (I,), and the states it returns likewise."""
    names, params, hidden_size, _ = weights_of(module)
    found = _C.infer(names, params, input, hx, cell_of(module), 0, 1, hidden_size, 0, False)
    return None if type(found) is list and hidden_size else found


def weights_of(module):
    """The weights of a module or of a single-step cell as _C takes them: a list of names, the dict
    that they are looked up in, and of quantized ones hidden_size and proj_size, else 0 and 0."""
    if module.weights_dtype is not None:
        proj_size = getattr(module, "proj_size", 0)
        return module._buffer_names, module._buffers, module.hidden_size, proj_size
    if isinstance(module, torch.nn.RNNBase):
        return module._flat_weights_names, module._parameters, 0, 0
    names = _STEP_WEIGHTS if module.bias else _STEP_WEIGHTS_WITHOUT_BIAS
    return names, module._parameters, 0, 0


def cell_of(module):
    """The id of a module's cell, or -1."""
    return _IDS.get(module._cell(), -1)
