// W_hh and W_hr as a step's product reads them on a CUDA device: rows that are padded with zeros to
// whole matrix instructions, transposed for a backward pass, and heads as blocks of one matrix.
#pragma once

#include "cuda_pass.h"

namespace lstm_fused::cuda {

// Where element (gate, head, i, j) of w_hh (gates * H, K) belongs in a matrix, in values. Without
// heads there is one, of all units.
struct WeightStrides {
  int64_t gate, head, i, j;
};

// Gates [first, end) of w_hh.
struct GateRange {
  int first, end;
  int count() const { return end - first; }
};

// A new matrix (rows, columns) with the elements of some gates of w_hh, and zeros where it has
// none. Heads as one matrix are as many products too many as there are heads, all but one of zeros,
// in place of a small product for each head and gate.
inline Tensor placed_hidden_weights(const Pass& pass, const Layer& layer, int d, GateRange gates,
                                    int64_t rows, int64_t columns, const WeightStrides& strides,
                                    const Tensor& x) {
  const LayerSizes& s = layer.size;
  const int64_t units = s.heads() > 1 ? s.K : s.H;
  Tensor out = pass.empty({rows, columns});
  if (rows * columns != gates.count() * s.H * s.K) torch::stable::zero_(out);
  const Shape sizes{gates.count(), s.heads(), units, s.K};
  const int64_t bytes = s.H * s.K * storage_bytes(layer.dtype);
  char* first = static_cast<char*>(const_cast<void*>(layer.weights[d].w_hh)) + gates.first * bytes;
  const Tensor from = torch::stable::from_blob(first, sizes, Shape{s.H * s.K, units * s.K, s.K, 1},
                                               x.device(), x.scalar_type());
  Tensor to = reinterpret(out, sizes, {strides.gate, strides.head, strides.i, strides.j}, 0);
  torch::stable::copy_(to, from);
  return out;
}

// w_hh with heads as a matrix (gates * H, H), for a forward pass.
inline Tensor whole_hidden_weights(const Pass& pass, const Layer& layer, int d, const Tensor& x) {
  const LayerSizes& s = layer.size;
  const int64_t padded = row_bytes(layer.dtype, s.H) / storage_bytes(layer.dtype);
  return placed_hidden_weights(pass, layer, d, {0, pass.gates()}, pass.gates() * s.H, padded,
                               {s.H * padded, s.K * padded + s.K, padded, 1}, x);
}

// Gates of w_hh transposed, (R, gates * H), each gate's columns padded.
inline Tensor transposed_hidden_weights(const Pass& pass, const Layer& layer, int d,
                                        GateRange gates, const Tensor& x) {
  const LayerSizes& s = layer.size;
  const int64_t padded = row_bytes(layer.dtype, s.H) / storage_bytes(layer.dtype);
  const int64_t columns = gates.count() * padded;
  return placed_hidden_weights(pass, layer, d, gates, s.R, columns,
                               {padded, s.K * columns + s.K, 1, columns}, x);
}

// w_hr transposed, (H, R), its rows padded.
inline Tensor transposed_projection(const Pass& pass, const Layer& layer, int d, const Tensor& x) {
  const LayerSizes& s = layer.size;
  const int64_t padded = row_bytes(layer.dtype, s.R) / storage_bytes(layer.dtype);
  Tensor out = pass.empty({s.H, padded});
  if (padded != s.R) torch::stable::zero_(out);
  const Tensor from =
      torch::stable::from_blob(const_cast<void*>(layer.weights[d].w_hr), Shape{s.R, s.H},
                               Shape{s.H, 1}, x.device(), x.scalar_type());
  Tensor to = reinterpret(out, {s.R, s.H}, {1, padded}, 0);
  torch::stable::copy_(to, from);
  return out;
}

}  // namespace lstm_fused::cuda
