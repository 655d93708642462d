"""One recurrent layer as a differentiable function, and what can be asked about the kernels.

`layer` calls the operator `lstm_fused::recurrent_forward`, in eager mode past its Autograd kernel.
Shapes: T steps, N rows, I inputs, H hidden units, R
recurrent width (the projection's size, or H), D directions, S rows of packed data.
"""

import torch
from torch.autograd import forward_ad

from lstm_fused import _C, _plan, autograd, batching, cuda, fakes, samples, tangents  # noqa: F401
from lstm_fused.export import state_or_zeros
from lstm_fused.operators import forward_op, run_directly

CELLS = _plan.cells()  # by name: id, gates, sums, memory; csrc/cells/cells.h
_IDS = {name: cell["id"] for name, cell in CELLS.items()}
_IDS_BY_MODE = {name.upper(): number for name, number in _IDS.items()}
_STEP_WEIGHTS = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]  # of torch.nn's cells
_STEP_WEIGHTS_WITHOUT_BIAS = _STEP_WEIGHTS[:2]

cuda.load()
autograd.register()
batching.register()
samples.register()
tangents.register()


def layer(x, batch_sizes, state0, weights, cell="lstm", directions=1):
    """Run one layer of a recurrent network in one or two directions.

    Args:
        x: (T, N, I), any strides; or the data of a PackedSequence, (S, I).
        batch_sizes: None, or the PackedSequence's (T,), int64 on the CPU, never growing.
        state0: () for zeros, or (h0 (D, N, R),), with c0 (D, N, H) after it for "lstm".
        weights: for each direction w_ih (G*H, I), w_hh (G*H, R), then b_ih (G*H,) and b_hh (G*H,)
            if there are biases, then w_hr (R, H) if there is a projection ("lstm" only); flat, as a
            sequence. G, the gates, are 4 of "lstm", 3 of "gru" and 1 of the others.
        cell: "lstm", "gru", "rnn_tanh" or "rnn_relu".
        directions: 1, or 2 for a second one that walks from the last step to the first.

    Returns:
        y (T, N, D * R) or (S, D * R), and the final states (h_n (D, N, R),), with c_n (D, N, H)
        after it for "lstm".

    Everything is of one dtype, float32, float64, bfloat16 or float16, and on the CPU or one CUDA
    device. Gradients of any order are given. Raises RuntimeError on shapes, dtypes or devices that
    do not fit.
    """
    if not state0 and torch.compiler.is_exporting():
        # As torch.nn's layers do: AOTInductor's runtime, for one, takes no empty list of tensors.
        state0 = state_or_zeros(x, batch_sizes, (), weights, _IDS[cell], directions)
    args = x, batch_sizes, state0, weights, _IDS[cell], directions
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _is_transformed():
        y, h_n, c_n, _, _ = forward_op(*args, False)
    elif torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights, *state0)):
        y, h_n, c_n, _, _ = autograd.record(*args)
    else:
        y, h_n, c_n, _, _ = run_directly(forward_op, *args, False)
    return y, ((h_n, c_n) if CELLS[cell]["memory"] == "cell" else (h_n,))


def _is_transformed():
    """Whether a transform of torch.func or forward-mode differentiation is on."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    )


def infer(module, input, hx):
    """The result of a recurrent module without gradients, past torch's dispatcher, or None.

    None whenever something is not plain: gradients are recorded, a mode of torch's is on that wants
    to see operators, weights are parametrized, anything is not a contiguous CPU tensor of the
    expected shape and one of the four dtypes. It checks that anew at each call and raises nothing:
    what is wrong is for the usual way to say.

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
    return (found[0].transpose(0, 1), found[1]) if first and found is not None else found


def infer_step(module, input, hx):
    """`infer` for a single-step cell: input (N, I) or (I,), and the states it returns likewise."""
    names = _STEP_WEIGHTS if module.bias else _STEP_WEIGHTS_WITHOUT_BIAS
    return _C.infer(names, module._parameters, input, hx, _IDS.get(module._cell(), -1))


def set_isa(name=None):
    """Force the instruction set kernels use, for every thread; None goes back to the best one.

    Raises RuntimeError for a name that is unknown or that this machine cannot run. The environment
    variable LSTM_FUSED_ISA does the same when the package is imported.
    """
    torch.ops.lstm_fused.force_isa(name or "")


def available_isas():
    """Names of the instruction sets this machine can run, slowest first."""
    return tuple(torch.ops.lstm_fused.available_isas().split())


def last_run(device="cpu"):
    """What the newest forward or backward call ran, as a dict; empty before any.

    On the CPU that is this thread's; on "cuda" any thread's, as autograd has its own there.
    """
    if device == "cuda":
        return cuda.last_run()
    return cuda.words_as_dict(torch.ops.lstm_fused.last_run())


def plan(
    cell,
    dtype,
    T,
    N,
    I,  # noqa: E741
    H,
    R,
    directions,
    threads=None,
    training=False,
    device=None,
):
    """The plan a forward call with these sizes would run, as a printable object.

    cell is as for ``layer``; dtype is a torch.dtype or its name; threads is
    torch.get_num_threads() unless given; device is a torch.device, the CPU unless given. Raises
    ValueError for a name that is unknown.
    """
    if device is not None and device.type == "cuda":
        return cuda.plan_on(device, _IDS[cell], dtype, T, N, H, R, directions)
    return _plan.plan(
        str(dtype).removeprefix("torch."),
        torch.ops.lstm_fused.active_isa(),
        torch.get_num_threads() if threads is None else threads,
        T,
        N,
        I,
        H,
        R,
        directions,
        projection=R != H,
        training=training,
        cell=cell,
    )


def build_info():
    """Version, compiler, the torch built against, ISAs compiled in, whether CUDA kernels are."""
    return _plan.build_info()
