// The operators' passes as Python functions, past torch's dispatcher and its Autograd kernels.
#pragma once

#include "python.h"

namespace lstm_fused {

// forward(x, batch_sizes, state0, weights, cell, directions) -> (y, h_n, c_n, gates, saved_states):
// recurrent_forward, None for what the cell does not have. directions 0: x, the states and h_n, c_n
// are those of a single-step cell, and y is None.
PyObject* forward(PyObject*, PyObject* const* args, Py_ssize_t count);

// backward(x, batch_sizes, state0, weights, y, gates, saved_states, dy, dh_n, dc_n, cell,
// directions, mask) -> (dx, dh0, dc0, *dweights): recurrent_backward, None for what the mask does
// not ask for.
PyObject* backward(PyObject*, PyObject* const* args, Py_ssize_t count);

// Both return None, having done nothing, where only the operator can take the call: something
// observes it, or a tensor is not a plain one on the CPU or does not fit.

}  // namespace lstm_fused
