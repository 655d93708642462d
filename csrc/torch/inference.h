#pragma once

#include "python.h"

namespace lstm_fused {

// infer(names, params, x, hx, cell, directions, layers, hidden_size, proj_size, batch_first): the
// layers of a module, or None to leave the call to the operator (see inference.cpp).
//   names: list of the weights' names, layer by layer; params: the dict they are looked up in
//   x: (T, N, I), or (N, T, I) if batch_first; hx: None, h_0 (L*D, N, H), or for cells with a cell
//   state a tuple of h_0 (L*D, N, R) and c_0 (L*D, N, H); cell: its id
//   hidden_size, proj_size: of quantized weights, else 0; proj_size 0: no projection
// Returns (y (T, N, D*R) or (N, T, D*R), h_n) or (y, (h_n, c_n)).
//
// With directions 0 it is a single step: x (N, I) or (I,), states (N, H) or (H,). Returns h_1, or
// (h_1, c_1).
//
// Either returns a list instead, [x, *states, *weights], where a gradient is to be recorded: the
// tensors have been found fit.
PyObject* infer(PyObject*, PyObject* const* args, Py_ssize_t count);

}  // namespace lstm_fused
