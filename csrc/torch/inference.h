#pragma once

#include "python.h"

namespace lstm_fused {

// infer(names, params, x, hx, cell, directions, layers): the layers of a module, or None to leave
// the call to the operator (see inference.cpp).
//   names: list of the weights' names, layer by layer; params: the dict they are looked up in
//   x: (T, N, I); hx: None, h_0 (L*D, N, H), or for cells with a cell state a tuple of
//   h_0 (L*D, N, R) and c_0 (L*D, N, H); cell: its id
// Returns (y (T, N, D*R), h_n) or (y, (h_n, c_n)).
//
// infer(names, params, x, hx, cell), or with directions 0: a single step; x (N, I) or (I,), states
// (N, H) or (H,). Returns h_1, or (h_1, c_1).
//
// infer(names, params, x, hx, cell, directions, layers, hidden_size, proj_size): the same of
// quantized weights; proj_size 0: no projection.
//
// All return a list instead, [x, *states, *weights], where a gradient is to be recorded: the
// tensors have been found fit.
PyObject* infer(PyObject*, PyObject* const* args, Py_ssize_t count);

}  // namespace lstm_fused
