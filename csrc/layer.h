// One recurrent layer, described once for every device and caller: from views of its tensors to
// sizes and pointers, checked. The operators (torch/operators.h) and the fast path for inference
// (torch/inference.cpp) both begin here.
#pragma once

#include <algorithm>
#include <numeric>
#include <optional>
#include <span>
#include <vector>

#include "cells/cells.h"
#include "saved.h"
#include "tensor_view.h"

namespace lstm_fused {

// The arguments of a call. State and weight tensors must be contiguous, and so must x's rows.
struct LayerTensors {
  TensorView x;                                         // (T, N, I), or packed (S, I)
  std::optional<std::span<const int64_t>> batch_sizes;  // (T,) of packed data, see describe_steps
  // Nothing, or h0 (D, N, R) and, with cell states, c0 (D, N, C * H); with resets they may have
  // 2 * N rows: LayerSizes.
  std::span<const TensorView> state0;
  // Of each direction w_ih, w_hh[, b_ih, b_hh][, w_hr]; of a described cell that has any, its
  // vectors (vectors, H) and its masks, as x with masks * H for I, follow. Its w_ih may have no
  // columns: x (.., G * H) is the input's part of the pre-activations then.
  std::span<const TensorView> weights;
  int64_t cell;
  int64_t directions;
  bool documents = false;           // batch_sizes are the documents' cu_seqlens, (N + 1,)
  const uint8_t* resets = nullptr;  // a flag for each row of x, or null
  bool cell_states = false;         // y has those of all steps
  // Of quantized weights, else 0. They are panels (params.h), each followed by its scales if int8.
  int64_t hidden_size = 0;
  int64_t proj_size = 0;  // 0: no projection
};

// Pointers are those of the tensors, which must outlive the layer.
struct Layer {
  CellKind cell;
  DType dtype;
  LayerSizes size;
  Sequence x;
  const void* h0;  // or null for zeros
  const void* c0;
  Weights weights[2];
  WeightFormat format;
  bool bias, projection;
  int weights_per_direction;
  int64_t rows;  // of x: T * N or S; more than those of its steps where padding follows packed data
  std::vector<int64_t> offsets;    // of packed data and documents
  std::vector<int64_t> documents;  // their sizes, starts, places and ranks

  bool has_cell_state() const { return info(cell).cells > 0; }
  int64_t padding() const { return rows - size.steps.rows(); }

  // The shape of gates or saved_states as a device lays them out.
  std::vector<int64_t> saved_shape(const SavedLayout& layout) const {
    const auto extent = [&](Dim dim) -> int64_t {
      switch (dim) {
        case Dim::kDirections: return size.D;
        case Dim::kBlocks: return size.blocks();
        case Dim::kRows: return rows;
        case Dim::kPreacts: return info(cell).preacts;
        case Dim::kLanes: return kBlock;
        case Dim::kUnits: return size.H;
        case Dim::kCarriedLanes: return info(cell).saved() * kBlock;
        case Dim::kCarriedUnits: return info(cell).saved() * size.H;
      }
      return 0;
    };
    std::vector<int64_t> shape;
    for (int i = 0; i < layout.count; ++i) shape.push_back(extent(layout.dims[i]));
    return shape;
  }
};

// Documents of x's rows, in any order and of any length: the kernels take them by length.
inline void describe_documents(Layer& layer, std::span<const int64_t> bounds, int64_t rows) {
  LSTM_FUSED_CHECK(!bounds.empty() && bounds[0] == 0, "cu_seqlens must begin with 0");
  const int64_t N = static_cast<int64_t>(bounds.size()) - 1;
  int64_t T = 0;
  for (int64_t i = 0; i < N; ++i) {
    LSTM_FUSED_CHECK(bounds[i] <= bounds[i + 1], "cu_seqlens must not decrease");
    T = std::max(T, bounds[i + 1] - bounds[i]);
  }
  LSTM_FUSED_CHECK(bounds[N] == rows, "cu_seqlens ends with ", bounds[N], " but x has ", rows,
                   " rows");
  layer.rows = rows;
  layer.documents.assign(T + 3 * N, 0);
  int64_t* const sizes = layer.documents.data();
  int64_t *const starts = sizes + T, *const places = starts + N, *const ranks = places + N;
  const auto length = [&](int64_t i) { return bounds[i + 1] - bounds[i]; };
  std::iota(places, places + N, int64_t{0});
  std::stable_sort(places, places + N, [&](int64_t a, int64_t b) { return length(a) > length(b); });
  for (int64_t n = 0; n < N; ++n) {
    starts[n] = bounds[places[n]];
    ranks[places[n]] = n;
    for (int64_t t = 0, end = length(places[n]); t < end; ++t) ++sizes[t];
  }
  layer.offsets.assign(T + 1, 0);
  for (int64_t t = 0; t < T; ++t) layer.offsets[t + 1] = layer.offsets[t] + sizes[t];
  layer.size.steps = {T, N, sizes, layer.offsets.data(), starts, places, bounds.data(), ranks};
}

// A negative last entry of batch_sizes says how many rows of x follow that belong to no step. It is
// there where the number of rows could not depend on the lengths (lstm_fused/padded.py); a step may
// have no row then.
inline void describe_steps(Layer& layer, const LayerTensors& given) {
  const TensorView& x = given.x;
  LayerSizes& size = layer.size;
  if (!given.batch_sizes) {
    LSTM_FUSED_CHECK(x.dim == 3, "x has shape ", describe(x), " but must be (T, N, I)");
    size.steps = {x.size(0), x.size(1)};
    size.I = x.size(2);
    layer.rows = size.steps.rows();
    return;
  }
  LSTM_FUSED_CHECK(x.dim == 2, "packed x has shape ", describe(x), " but must be (S, I)");
  size.I = x.size(1);
  if (given.documents) return describe_documents(layer, *given.batch_sizes, x.size(0));
  const std::span<const int64_t> sizes = *given.batch_sizes;
  int64_t T = static_cast<int64_t>(sizes.size());
  LSTM_FUSED_CHECK(T > 0, "batch_sizes must not be empty");
  const bool padded = sizes[T - 1] < 0;
  const int64_t padding = padded ? -sizes[--T] : 0;
  layer.offsets.assign(T + 1, 0);
  for (int64_t t = 0; t < T; ++t) {
    LSTM_FUSED_CHECK(sizes[t] >= (padded ? 0 : 1) && (t == 0 || sizes[t] <= sizes[t - 1]),
                     "batch_sizes must be positive and must not grow");
    layer.offsets[t + 1] = layer.offsets[t] + sizes[t];
  }
  layer.rows = layer.offsets[T] + padding;
  LSTM_FUSED_CHECK(layer.rows == x.size(0), "batch_sizes add up to ", layer.rows, " but x has ",
                   x.size(0), " rows");
  while (T > 0 && sizes[T - 1] == 0) --T;
  size.steps = {T, T > 0 ? sizes[0] : 0, sizes.data(), layer.offsets.data()};
}

inline void describe_weights(Layer& layer, const LayerTensors& given) {
  const std::span<const TensorView> weights = given.weights;
  LayerSizes& size = layer.size;
  const size_t each = weights.size() / size.D;
  const CellInfo& cell = info(layer.cell);
  const size_t values = (cell.vectors > 0) + (cell.masks > 0);  // the last of them
  LSTM_FUSED_CHECK(weights.size() % size.D == 0 && each >= 2 + values && each <= 5 + values,
                   "weights must hold ", 2 + values, " to ", 5 + values,
                   " tensors for each direction, not ", weights.size(), " in all");
  layer.weights_per_direction = static_cast<int>(each);
  layer.bias = each - values >= 4;
  layer.projection = (each - values) % 2 == 1;
  const int G = cell.gates;
  const TensorView& w_hh = weights[1];
  LSTM_FUSED_CHECK(!layer.projection || layer.has_cell_state(), "cell ", info(layer.cell).name,
                   " has no projection");
  LSTM_FUSED_CHECK(w_hh.dim == 2 && w_hh.size(0) % G == 0, "w_hh has shape ", describe(w_hh),
                   " but must be (", G, " * H, R)");
  size.H = w_hh.size(0) / G;
  size.K = w_hh.size(1);
  size.R = layer.projection ? size.K : size.H;
  LSTM_FUSED_CHECK(size.H >= 1 && size.R >= 1 && size.I >= 1, "I, H and R must be at least 1");
  const bool may_be_narrow = cell.described && !cell.operand;
  const bool heads = may_be_narrow && !layer.projection &&
                     (size.K == 0 || (size.H % size.K == 0 && size.K % kBlock == 0));
  LSTM_FUSED_CHECK(size.K == size.R || heads, "w_hh has shape ", describe(w_hh),
                   ": without a projection it must be (", G, " * H, H)",
                   may_be_narrow ? ", or (.., H / heads) with whole blocks of 16, or (.., 0)" : "");
  LSTM_FUSED_CHECK(!layer.projection || !cell.keeps_hidden, "cell ", cell.name,
                   " has no projection");
  size.x_is_preacts = cell.described && weights[0].dim == 2 && weights[0].size(1) == 0;
  LSTM_FUSED_CHECK(!size.x_is_preacts || (size.I == G * size.H && size.D == 1),
                   "without columns of w_ih, x must have ", G, " * H columns, and one direction");
  for (int d = 0; d < size.D; ++d) {
    const TensorView* w = weights.data() + d * each;
    for (size_t i = 0; i < each; ++i) check_like(w[i], given.x, "every weight");
    check_shape(w[0], {G * size.H, size.x_is_preacts ? 0 : size.I}, "w_ih");
    check_shape(w[1], {G * size.H, size.K}, "w_hh");
    if (layer.bias) {
      check_shape(w[2], {G * size.H}, "b_ih");
      check_shape(w[3], {G * size.H}, "b_hh");
    }
    const size_t w_hr = each - values - 1;
    if (layer.projection) check_shape(w[w_hr], {size.R, size.H}, "w_hr");
    Weights& found = layer.weights[d];
    found = {w[0].data, w[1].data, layer.bias ? w[2].data : nullptr,
             layer.bias ? w[3].data : nullptr, layer.projection ? w[w_hr].data : nullptr};
    const TensorView* value = w + each - values;
    if (cell.vectors > 0) {
      check_shape(*value, {cell.vectors, size.H}, "the vectors of a unit");
      found.vectors = (value++)->data;
    }
    if (cell.masks > 0) {
      const int64_t width = cell.masks * size.H;
      if (given.x.dim == 3)
        check_shape(*value, {given.x.size(0), given.x.size(1), width}, "masks");
      else
        check_shape(*value, {given.x.size(0), width}, "masks");
      found.masks = value->data;
    }
  }
}

// Panels of weights (params.h) in the place of matrices.
inline void describe_quantized_weights(Layer& layer, const LayerTensors& given) {
  const std::span<const TensorView> weights = given.weights;
  LayerSizes& size = layer.size;
  LSTM_FUSED_CHECK(layer.dtype == DType::kFloat32, "x must be float32 with quantized weights");
  LSTM_FUSED_CHECK(given.hidden_size >= 1 && given.proj_size >= 0 && size.I >= 1,
                   "I, hidden_size and proj_size must be positive");
  layer.projection = given.proj_size > 0;
  LSTM_FUSED_CHECK(!layer.projection || layer.has_cell_state(), "cell ", info(layer.cell).name,
                   " has no projection");
  size.H = given.hidden_size;
  size.R = layer.projection ? given.proj_size : size.H;
  size.K = size.R;
  LSTM_FUSED_CHECK(!info(layer.cell).described, "cell ", info(layer.cell).name,
                   " has no quantized weights");
  const bool int8 = !weights.empty() && weights[0].dtype == kUint8;
  layer.format = int8 ? WeightFormat::kInt8 : WeightFormat::kBFloat16;
  const size_t matrix = int8 ? 2 : 1, least = matrix * (layer.projection ? 3 : 2);
  const size_t each = weights.size() / size.D;
  LSTM_FUSED_CHECK(weights.size() % size.D == 0 && (each == least || each == least + 2),
                   "quantized weights must be ", least, " tensors for each direction, or ",
                   least + 2, " with biases, not ", weights.size(), " in all");
  layer.weights_per_direction = static_cast<int>(each);
  layer.bias = each > least;
  const int64_t G = info(layer.cell).gates, depth = int8 ? 4 : 2;
  const TensorView* next = weights.data();
  const auto panels = [&](int64_t gates, int64_t rows, int64_t K, const char* name,
                          const void*& scales) {
    const TensorView& w = *next++;
    const int64_t blocks = ceil_div(rows, kBlock);
    LSTM_FUSED_CHECK(w.device == given.x.device, name, " must be on the device of x");
    LSTM_FUSED_CHECK(w.dtype == (int8 ? kUint8 : static_cast<int>(DType::kBFloat16)), name,
                     " must be ", int8 ? "uint8" : "bfloat16", " as the first weight is");
    check_shape(w, {blocks, ceil_div(K, depth), gates, kBlock, depth}, name);
    if (int8) {
      const TensorView& s = *next++;
      LSTM_FUSED_CHECK(s.device == w.device && s.dtype == static_cast<int>(DType::kBFloat16),
                       "the scales of ", name, " must be bfloat16 and on its device");
      check_shape(s, {blocks, ceil_div(K, kQuantizationGroup), gates, kBlock}, "scales");
      scales = s.data;
    }
    return w.data;
  };
  const auto bias = [&](const char* name) {
    check_like(*next, given.x, name);
    check_shape(*next, {G * size.H}, name);
    return next++->data;
  };
  for (int d = 0; d < size.D; ++d) {
    Weights& w = layer.weights[d];
    w.w_ih = panels(G, size.H, size.I, "w_ih", w.s_ih);
    w.w_hh = panels(G, size.H, size.R, "w_hh", w.s_hh);
    if (layer.bias) w.b_ih = bias("b_ih");
    if (layer.bias) w.b_hh = bias("b_hh");
    if (layer.projection) w.w_hr = panels(1, size.R, size.H, "w_hr", w.s_hr);
  }
}

// A state, or its gradient, (D, rows, width).
inline void check_state(const TensorView& t, const TensorView& x, const Layer& layer, int64_t rows,
                        int64_t width, const char* name) {
  check_like(t, x, name);
  check_shape(t, {layer.size.D, rows, width}, name);
}

// Throws std::runtime_error (check.h) for tensors that do not fit each other.
inline Layer describe_layer(const LayerTensors& given) {
  Layer layer{};
  LSTM_FUSED_CHECK(given.cell >= 0 && given.cell < cell_count(), "unknown cell ", given.cell);
  LSTM_FUSED_CHECK(given.directions == 1 || given.directions == 2, "directions must be 1 or 2");
  LSTM_FUSED_CHECK(given.x.dtype != kOtherDType, "x must be float32, float64, bfloat16 or float16");
  layer.cell = static_cast<CellKind>(given.cell);
  layer.dtype = static_cast<DType>(given.x.dtype);
  layer.size.D = static_cast<int>(given.directions);
  layer.size.C = info(layer.cell).cells;
  describe_steps(layer, given);
  if (given.hidden_size != 0)
    describe_quantized_weights(layer, given);
  else
    describe_weights(layer, given);
  const TensorView& x = given.x;
  layer.x = {x.data, x.strides[0], x.strides[x.dim - 2]};
  const bool own = layer.has_cell_state();
  LSTM_FUSED_CHECK(given.state0.empty() || given.state0.size() == (own ? 2u : 1u),
                   "state0 must hold ", own ? "h0 and c0" : "h0", " or nothing");
  LayerSizes& size = layer.size;
  size.steps.resets = given.resets;
  size.cell_states = given.cell_states;
  LSTM_FUSED_CHECK(own || !given.cell_states, "cell ", info(layer.cell).name,
                   " has no cell states");
  if (!given.state0.empty()) {
    const TensorView& h0 = given.state0[0];
    size.reset_states = given.resets && h0.dim == 3 && h0.size(1) == 2 * size.steps.N;
    check_state(h0, x, layer, size.state_rows(), size.R, "h0");
    layer.h0 = h0.data;
    if (own) {
      check_state(given.state0[1], x, layer, size.state_rows(), size.cell_width(), "c0");
      layer.c0 = given.state0[1].data;
    }
  }
  return layer;
}

// Params with what every pass is given; the rest is zero.
template <class Params>
Params params_of(const Layer& layer) {
  Params params{};
  params.size = layer.size;
  params.x = layer.x;
  params.weights[0] = layer.weights[0];
  params.weights[1] = layer.weights[1];
  params.h0 = layer.h0;
  params.c0 = layer.c0;
  return params;
}

}  // namespace lstm_fused
