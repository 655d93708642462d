// A layer's tensors as the operators are given them, checked, for every device.
#pragma once

#include "cells/cells.h"
#include "stable.h"

namespace lstm_fused {

using Tensors = std::vector<Tensor>;
using MaybeTensor = std::optional<Tensor>;

// A layer's tensors as kernels see them. Copies made to get there are kept alive in `kept`.
struct Layer {
  LayerSizes size;
  Sequence x;
  Weights weights[2];
  DType dtype;
  CellKind cell;
  bool bias, projection;
  int64_t rows;  // of x: T * N or S; more than those of its steps where padding follows packed data
  Tensors kept;
  std::vector<int64_t> offsets;

  const Tensor& keep(const Tensor& t) {
    kept.push_back(as_contiguous(t));
    return kept.back();
  }
};

// Whether a call is of one model, or of several with as many sets of weights, which every tensor
// but batch_sizes then has a first dimension for.
class Models {
 public:
  Models(const Tensor& x, const Tensors& weights)
      : several_(weights.size() > 1 && weights[1].dim() == 3 && x.dim() > 0),
        count_(several_ ? x.size(0) : 1) {}

  int64_t count() const { return count_; }

  Tensor of(const Tensor& t, int64_t model, const char* name) const {
    if (!several_) return t;
    LSTM_FUSED_CHECK(t.dim() > 0 && t.size(0) == count_, name, " has shape ", describe(t),
                     " but must begin with ", count_, ", the number of models");
    return select_first(t, model);
  }
  MaybeTensor of(const MaybeTensor& t, int64_t model, const char* name) const {
    return t ? MaybeTensor(of(*t, model, name)) : std::nullopt;
  }
  Tensors of(const Tensors& ts, int64_t model, const char* name) const {
    if (!several_) return ts;
    Tensors found;
    for (const Tensor& t : ts) found.push_back(of(t, model, name));
    return found;
  }
  // A result that the caller does not want is empty, without models.
  Tensor of_result(const Tensor& t, int64_t model) const {
    return several_ && t.numel() > 0 ? select_first(t, model) : t;
  }
  std::vector<int64_t> shape(std::vector<int64_t> one) const {
    if (several_) one.insert(one.begin(), count_);
    return one;
  }

 private:
  bool several_;
  int64_t count_;
};

inline void read_steps(Layer& layer, const Tensor& x, const MaybeTensor& batch_sizes) {
  LayerSizes& size = layer.size;
  if (!batch_sizes) {
    LSTM_FUSED_CHECK(x.dim() == 3, "x has shape ", describe(x), " but must be (T, N, I)");
    size.steps = {x.size(0), x.size(1), nullptr, nullptr};
    size.I = x.size(2);
    layer.rows = size.steps.rows();
    return;
  }
  LSTM_FUSED_CHECK(x.dim() == 2, "packed x has shape ", describe(x), " but must be (S, I)");
  LSTM_FUSED_CHECK(batch_sizes->dim() == 1 && batch_sizes->is_cpu() &&
                       batch_sizes->scalar_type() == ScalarType::Long,
                   "batch_sizes must be a 1-D int64 tensor on the CPU");
  int64_t T = batch_sizes->numel();
  LSTM_FUSED_CHECK(T > 0, "batch_sizes must not be empty");
  const Tensor& sizes = layer.keep(*batch_sizes);
  const int64_t* data = sizes.const_data_ptr<int64_t>();
  // A negative last entry says how many rows of x follow that belong to no step. It is there where
  // the number of rows could not depend on the lengths (lstm_fused/padded.py); a step may have no
  // row then.
  const bool padded = data[T - 1] < 0;
  const int64_t padding = padded ? -data[--T] : 0;
  layer.offsets.assign(T + 1, 0);
  for (int64_t t = 0; t < T; ++t) {
    LSTM_FUSED_CHECK(data[t] >= (padded ? 0 : 1) && (t == 0 || data[t] <= data[t - 1]),
                     "batch_sizes must be positive and must not grow");
    layer.offsets[t + 1] = layer.offsets[t] + data[t];
  }
  layer.rows = layer.offsets[T] + padding;
  LSTM_FUSED_CHECK(layer.rows == x.size(0), "batch_sizes add up to ", layer.rows, " but x has ",
                   x.size(0), " rows");
  while (T > 0 && data[T - 1] == 0) --T;
  size.steps = {T, T > 0 ? data[0] : 0, data, layer.offsets.data()};
  size.I = x.size(1);
}

inline void read_weights(Layer& layer, const Tensor& x, const Tensors& weights) {
  const size_t each = weights.size() / layer.size.D;
  LSTM_FUSED_CHECK(weights.size() % layer.size.D == 0 && each >= 2 && each <= 5,
                   "weights must hold 2 to 5 tensors for each direction, not ", weights.size(),
                   " in all");
  layer.bias = each >= 4;
  layer.projection = each % 2 == 1;
  LayerSizes& size = layer.size;
  const int G = info(layer.cell).gates;
  LSTM_FUSED_CHECK(!layer.projection || info(layer.cell).memory == Memory::kCell, "cell ",
                   info(layer.cell).name, " has no projection");
  LSTM_FUSED_CHECK(weights[1].dim() == 2 && weights[1].size(0) % G == 0, "w_hh has shape ",
                   describe(weights[1]), " but must be (", G, " * H, R)");
  size.H = weights[1].size(0) / G;
  size.R = weights[1].size(1);
  LSTM_FUSED_CHECK(size.H >= 1 && size.R >= 1 && size.I >= 1, "I, H and R must be at least 1");
  LSTM_FUSED_CHECK(layer.projection || size.R == size.H, "w_hh has shape ", describe(weights[1]),
                   ": without a projection it must be (", G, " * H, H)");
  for (int d = 0; d < size.D; ++d) {
    const Tensor* w = weights.data() + d * each;
    for (size_t i = 0; i < each; ++i) check_like(w[i], x, "every weight");
    check_shape(w[0], {G * size.H, size.I}, "w_ih");
    check_shape(w[1], {G * size.H, size.R}, "w_hh");
    if (layer.bias) {
      check_shape(w[2], {G * size.H}, "b_ih");
      check_shape(w[3], {G * size.H}, "b_hh");
    }
    if (layer.projection) check_shape(w[each - 1], {size.R, size.H}, "w_hr");
    const auto data = [&](size_t i) { return layer.keep(w[i]).const_data_ptr(); };
    layer.weights[d] = {data(0), data(1), layer.bias ? data(2) : nullptr,
                        layer.bias ? data(3) : nullptr,
                        layer.projection ? data(each - 1) : nullptr};
  }
}

inline Layer read_layer(const Tensor& x, const MaybeTensor& batch_sizes, const Tensors& weights,
                        int64_t cell, int64_t directions) {
  Layer layer{};
  LSTM_FUSED_CHECK(cell >= 0 && cell < kCellCount, "unknown cell ", cell);
  LSTM_FUSED_CHECK(directions == 1 || directions == 2, "directions must be 1 or 2");
  layer.cell = static_cast<CellKind>(cell);
  layer.dtype = dtype_of(x, "x");
  layer.size.D = static_cast<int>(directions);
  layer.kept.reserve(weights.size() + 8);
  read_steps(layer, x, batch_sizes);
  read_weights(layer, x, weights);
  const bool rows_lie_whole = x.stride(x.dim() - 1) == 1 || layer.size.I == 1;
  layer.kept.push_back(rows_lie_whole ? x : as_contiguous(x));
  const Tensor& data = layer.kept.back();
  layer.x = {data.const_data_ptr(), data.stride(0), data.stride(data.dim() - 2)};
  return layer;
}

inline const void* read_state(Layer& layer, const Tensor& x, const Tensors& state, size_t i,
                              int64_t width, const char* name) {
  if (state.empty()) return nullptr;
  check_like(state[i], x, name);
  check_shape(state[i], {layer.size.D, layer.size.steps.N, width}, name);
  return layer.keep(state[i]).const_data_ptr();
}

inline bool has_cell_state(const Layer& layer) {
  return info(layer.cell).memory == Memory::kCell;
}

// Params with what forward and backward are both given.
template <class Params>
Params given(Layer& layer, const Tensor& x, const Tensors& state0) {
  const bool own = has_cell_state(layer);
  LSTM_FUSED_CHECK(state0.empty() || state0.size() == (own ? 2 : 1), "state0 must hold ",
                   own ? "h0 and c0" : "h0", " or nothing");
  Params params{};
  params.size = layer.size;
  params.x = layer.x;
  params.weights[0] = layer.weights[0];
  params.weights[1] = layer.weights[1];
  params.h0 = read_state(layer, x, state0, 0, layer.size.R, "h0");
  if (own) params.c0 = read_state(layer, x, state0, 1, layer.size.H, "c0");
  return params;
}

// That of x, with D * R for I.
inline std::vector<int64_t> output_shape(const Layer& layer, const Tensor& x) {
  std::vector<int64_t> shape = shape_of(x);
  shape.back() = layer.size.D * layer.size.R;
  return shape;
}

// gates or cells, as forward saved them for backward.
inline void check_saved(const Tensor& t, const Tensor& x, const Layer& layer,
                        const std::vector<int64_t>& shape, const char* name) {
  LSTM_FUSED_CHECK(
      same_device(t, x) && t.is_contiguous() && t.scalar_type() == compute_dtype(layer.dtype), name,
      " must be as the forward pass saved it");
  check_shape(t, shape, name);
}

// The outputs' gradients, those there are, into backward's params.
template <class Params>
void read_gradients(Layer& layer, const Tensor& x, const MaybeTensor& dy, const MaybeTensor& dh_n,
                    const MaybeTensor& dc_n, Params& params) {
  if (dy) {
    check_like(*dy, x, "dy");
    check_shape(*dy, output_shape(layer, x), "dy");
    params.dy = layer.keep(*dy).const_data_ptr();
  }
  // Shapes of the final states' gradients are those of the states that forward began with.
  if (dh_n) params.dh_n = read_state(layer, x, {*dh_n}, 0, layer.size.R, "dh_n");
  if (dc_n) params.dc_n = read_state(layer, x, {*dc_n}, 0, layer.size.H, "dc_n");
}

}  // namespace lstm_fused
