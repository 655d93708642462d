"""The operators of one recurrent layer, as torch knows them: csrc/torch/operators.cpp, and
those composed of them.

Their kernels are registered where they are written: the CPU's with the library that is loaded here,
CUDA's in cuda.py, derivatives in autograd.py, vmap in batching.py, shapes in fakes.py.
"""

import torch

from lstm_fused import _C

library = torch.library.Library("lstm_fused", "FRAGMENT")
# recurrent_backward with a gradient of each weight for every sample, see samples.py.
library.define(
    "recurrent_backward_samples(Tensor x, Tensor? batch_sizes, Tensor? resets, Tensor[] state0, "
    "Tensor[] weights, Tensor? y, Tensor gates, Tensor saved_states, Tensor? dy, Tensor? dh_n, "
    "Tensor? dc_n, int cell, int directions, int save_every, bool[] mask, int samples) "
    "-> (Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dweights, Tensor d_preacts)"
)

# The tangents of recurrent_forward's y, h_n and c_n, see tangents.py. tangents: of x, of each state
# and of each weight, None for one that does not move.
library.define(
    "recurrent_jvp(Tensor x, Tensor? batch_sizes, Tensor? resets, Tensor[] state0, "
    "Tensor[] weights, Tensor y, Tensor gates, Tensor saved_states, Tensor?[] tangents, int cell, "
    "int directions) "
    "-> (Tensor y, Tensor h_n, Tensor c_n)"
)

# A layer of a padded batch with lengths in an exported graph, see padded.py.
library.define(
    "recurrent_padded(Tensor x, Tensor lengths, Tensor? resets, Tensor[] state0, Tensor[] weights, "
    "int cell, int directions, bool cell_states) -> (Tensor y, Tensor h_n, Tensor c_n)"
)

# In the place of t's gradient in a layer that has none: raises where it is run. d_out, the gradient
# of an output, keeps the call in the backward part of a compiled graph.
library.define("quantized_gradient(Tensor t, Tensor d_out) -> Tensor")

forward_op = torch.ops.lstm_fused.recurrent_forward.default
backward_op = torch.ops.lstm_fused.recurrent_backward.default
samples_op = torch.ops.lstm_fused.recurrent_backward_samples.default
jvp_op = torch.ops.lstm_fused.recurrent_jvp.default
padded_op = torch.ops.lstm_fused.recurrent_padded.default
quantized_op = torch.ops.lstm_fused.quantized_forward.default
quantized_gradient_op = torch.ops.lstm_fused.quantized_gradient.default
tangent_op = torch.ops.lstm_fused.recurrent_tangent.default


def run_directly(op, *args):
    """The operator itself, past its Autograd kernel."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def forward(*args):
    """(y, h_n, c_n, gates, saved_states) of recurrent_forward, in eager mode.

    None for what the cell does not have, or an empty tensor.
    """
    return _C.forward(*args) or run_directly(forward_op, *args)


def forward_step(x, state0, weights, cell):
    """(h_1, c_1, gates, saved_states) of a single-step cell: `forward` for x (N, I) or (I,)."""
    if found := _C.forward(x, None, None, state0, weights, cell, 0, False, 1):
        return found[1:]
    missing = 3 - x.dim()
    state0 = [lifted(s, missing) for s in state0]
    x = lifted(x, missing)
    _, h, c, *saved = forward(x, None, None, state0, weights, cell, 1, False, 1)
    return lowered(h, missing), c if c is None else lowered(c, missing), *saved


def lifted(t, missing):
    """t with so many dimensions of size 1 before its own; None stays None."""
    for _ in range(missing if t is not None else 0):
        t = t.unsqueeze(0)
    return t


def lowered(t, missing):
    """t without so many leading dimensions of size 1."""
    for _ in range(missing):
        t = t.squeeze(0)
    return t
