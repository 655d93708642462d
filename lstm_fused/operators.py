"""The operators of one recurrent layer, as torch knows them: csrc/torch/operators.cpp, and
those composed of them.

Their kernels are registered where they are written: the CPU's with the library that is loaded here,
CUDA's in cuda.py, derivatives in autograd.py, vmap in batching.py, shapes in fakes.py.
"""

import torch

from lstm_fused import _C  # noqa: F401  loads the operators

library = torch.library.Library("lstm_fused", "FRAGMENT")
# recurrent_backward with a gradient of each weight for every sample, see samples.py.
library.define(
    "recurrent_backward_samples(Tensor x, Tensor? batch_sizes, Tensor[] state0, Tensor[] weights, "
    "Tensor? y, Tensor gates, Tensor saved_states, Tensor? dy, Tensor? dh_n, Tensor? dc_n, "
    "int cell, int directions, bool[] mask, int samples) "
    "-> (Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dweights, Tensor d_preacts)"
)

# The tangents of recurrent_forward's y, h_n and c_n, see tangents.py. tangents: of x, of each state
# and of each weight, None for one that does not move.
library.define(
    "recurrent_jvp(Tensor x, Tensor? batch_sizes, Tensor[] state0, Tensor[] weights, Tensor y, "
    "Tensor gates, Tensor saved_states, Tensor?[] tangents, int cell, int directions) "
    "-> (Tensor y, Tensor h_n, Tensor c_n)"
)

# A layer of a padded batch with lengths in an exported graph, see padded.py.
library.define(
    "recurrent_padded(Tensor x, Tensor lengths, Tensor[] state0, Tensor[] weights, int cell, "
    "int directions) -> (Tensor y, Tensor h_n, Tensor c_n)"
)

forward_op = torch.ops.lstm_fused.recurrent_forward.default
backward_op = torch.ops.lstm_fused.recurrent_backward.default
samples_op = torch.ops.lstm_fused.recurrent_backward_samples.default
jvp_op = torch.ops.lstm_fused.recurrent_jvp.default
padded_op = torch.ops.lstm_fused.recurrent_padded.default
tangent_op = torch.ops.lstm_fused.recurrent_tangent.default


def run_directly(op, *args):
    """The operator itself, past its Autograd kernel."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)
