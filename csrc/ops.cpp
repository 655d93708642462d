// The operators: schemas, checks, allocation, and the call of the planned kernel. Arithmetic is
// below (cpu/), autograd and fakes above (lstm_fused/ops.py).
#include "stable.h"

namespace lstm_fused {
namespace {

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
  Tensors kept;
  std::vector<int64_t> offsets;

  const Tensor& keep(const Tensor& t) {
    kept.push_back(as_contiguous(t));
    return kept.back();
  }
};

void read_steps(Layer& layer, const Tensor& x, const MaybeTensor& batch_sizes) {
  LayerSizes& size = layer.size;
  if (!batch_sizes) {
    STD_TORCH_CHECK(x.dim() == 3, "x has shape ", describe(x), " but must be (T, N, I)");
    size.steps = {x.size(0), x.size(1), nullptr, nullptr};
    size.I = x.size(2);
    return;
  }
  STD_TORCH_CHECK(x.dim() == 2, "packed x has shape ", describe(x), " but must be (S, I)");
  STD_TORCH_CHECK(batch_sizes->dim() == 1 && batch_sizes->is_cpu() &&
                      batch_sizes->scalar_type() == ScalarType::Long,
                  "batch_sizes must be a 1-D int64 tensor on the CPU");
  const int64_t T = batch_sizes->numel();
  STD_TORCH_CHECK(T > 0, "batch_sizes must not be empty");
  const Tensor& sizes = layer.keep(*batch_sizes);
  const int64_t* data = sizes.const_data_ptr<int64_t>();
  layer.offsets.assign(T + 1, 0);
  for (int64_t t = 0; t < T; ++t) {
    STD_TORCH_CHECK(data[t] > 0 && (t == 0 || data[t] <= data[t - 1]),
                    "batch_sizes must be positive and must not grow");
    layer.offsets[t + 1] = layer.offsets[t] + data[t];
  }
  STD_TORCH_CHECK(layer.offsets[T] == x.size(0), "batch_sizes add up to ", layer.offsets[T],
                  " but x has ", x.size(0), " rows");
  size.steps = {T, data[0], data, layer.offsets.data()};
  size.I = x.size(1);
}

void read_weights(Layer& layer, const Tensor& x, const Tensors& weights) {
  const size_t each = weights.size() / layer.size.D;
  STD_TORCH_CHECK(weights.size() % layer.size.D == 0 && each >= 2 && each <= 5,
                  "weights must hold 2 to 5 tensors for each direction, not ", weights.size(),
                  " in all");
  layer.bias = each >= 4;
  layer.projection = each % 2 == 1;
  LayerSizes& size = layer.size;
  const int G = info(layer.cell).gates;
  STD_TORCH_CHECK(!layer.projection || info(layer.cell).memory == Memory::kCell, "cell ",
                  info(layer.cell).name, " has no projection");
  STD_TORCH_CHECK(weights[1].dim() == 2 && weights[1].size(0) % G == 0, "w_hh has shape ",
                  describe(weights[1]), " but must be (", G, " * H, R)");
  size.H = weights[1].size(0) / G;
  size.R = weights[1].size(1);
  STD_TORCH_CHECK(size.H >= 1 && size.R >= 1 && size.I >= 1, "I, H and R must be at least 1");
  STD_TORCH_CHECK(layer.projection || size.R == size.H, "w_hh has shape ", describe(weights[1]),
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

Layer read_layer(const Tensor& x, const MaybeTensor& batch_sizes, const Tensors& weights,
                 int64_t cell, int64_t directions) {
  Layer layer{};
  STD_TORCH_CHECK(cell >= 0 && cell < kCellCount, "unknown cell ", cell);
  STD_TORCH_CHECK(directions == 1 || directions == 2, "directions must be 1 or 2");
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

const void* read_state(Layer& layer, const Tensor& x, const Tensors& state, size_t i, int64_t width,
                       const char* name) {
  if (state.empty()) return nullptr;
  check_like(state[i], x, name);
  check_shape(state[i], {layer.size.D, layer.size.steps.N, width}, name);
  return layer.keep(state[i]).const_data_ptr();
}

bool has_cell_state(const Layer& layer) {
  return info(layer.cell).memory == Memory::kCell;
}

// Params with what forward and backward are both given.
template <class Params>
Params given(Layer& layer, const Tensor& x, const Tensors& state0) {
  const bool own = has_cell_state(layer);
  STD_TORCH_CHECK(state0.empty() || state0.size() == (own ? 2 : 1), "state0 must hold ",
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

Problem problem_of(const Layer& layer, bool training) {
  return problem_of(layer.cell, layer.dtype, layer.size, layer.projection, training);
}

// Shapes of what is saved for backward: values of the sums, and what the cell carries.
std::vector<int64_t> gates_shape(const Layer& layer) {
  const LayerSizes& s = layer.size;
  return {s.D, s.blocks(), s.steps.rows(), info(layer.cell).sums, kBlock};
}
std::vector<int64_t> cells_shape(const Layer& layer) {
  if (info(layer.cell).memory == Memory::kNone) return {0};
  const LayerSizes& s = layer.size;
  return {s.D, s.blocks(), s.steps.rows(), kBlock};
}

// That of x, with D * R for I.
std::vector<int64_t> output_shape(const Layer& layer, const Tensor& x) {
  std::vector<int64_t> shape = shape_of(x);
  shape.back() = layer.size.D * layer.size.R;
  return shape;
}

void check_saved(const Tensor& t, const Layer& layer, std::vector<int64_t> shape,
                 const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous() && t.scalar_type() == compute_dtype(layer.dtype),
                  name, " must be as saved by recurrent_forward in training");
  check_shape(t, shape, name);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> recurrent_forward(
    Tensor x, MaybeTensor batch_sizes, Tensors state0, Tensors weights, int64_t cell,
    int64_t directions, bool training) {
  Layer layer = read_layer(x, batch_sizes, weights, cell, directions);
  const LayerSizes& s = layer.size;
  ForwardParams params = given<ForwardParams>(layer, x, state0);
  const ScalarType dtype = x.scalar_type();
  Tensor y = empty(output_shape(layer, x), dtype);
  Tensor h_n = empty({s.D, s.steps.N, s.R}, dtype);
  const auto maybe = [](bool wanted, std::vector<int64_t> shape, ScalarType type) {
    return empty(wanted ? shape : std::vector<int64_t>{0}, type);
  };
  Tensor c_n = maybe(has_cell_state(layer), {s.D, s.steps.N, s.H}, dtype);
  Tensor gates = maybe(training, gates_shape(layer), compute_dtype(layer.dtype));
  Tensor cells = maybe(training, cells_shape(layer), compute_dtype(layer.dtype));
  params.y = y.data_ptr();
  params.h_n = h_n.data_ptr();
  params.c_n = c_n.data_ptr();
  params.gates = training ? gates.data_ptr() : nullptr;
  params.cells = training ? cells.data_ptr() : nullptr;
  STD_TORCH_CHECK(s.steps.T > 0, "x must have at least one time step");
  if (s.steps.N > 0) launch(problem_of(layer, training), params);
  return {y, h_n, c_n, gates, cells};
}

const void* read_gradient(Layer& layer, const MaybeTensor& gradient, const Tensor& like,
                          const char* name) {
  if (!gradient) return nullptr;
  check_like(*gradient, like, name);
  check_shape(*gradient, shape_of(like), name);
  return layer.keep(*gradient).const_data_ptr();
}

std::tuple<Tensor, Tensor, Tensor, Tensors> recurrent_backward(
    Tensor x, MaybeTensor batch_sizes, Tensors state0, Tensors weights, Tensor y, Tensor gates,
    Tensor cells, MaybeTensor dy, MaybeTensor dh_n, MaybeTensor dc_n, int64_t cell,
    int64_t directions, std::vector<bool> mask) {
  Layer layer = read_layer(x, batch_sizes, weights, cell, directions);
  const LayerSizes& s = layer.size;
  STD_TORCH_CHECK(mask.size() == 3 + weights.size(),
                  "mask must have one entry each for x, h0, c0 and every weight");
  STD_TORCH_CHECK(has_cell_state(layer) || (!mask[2] && !dc_n), "cell ", info(layer.cell).name,
                  " has no c0 or c_n to have a gradient");
  check_like(y, x, "y");
  check_shape(y, output_shape(layer, x), "y");
  check_saved(gates, layer, gates_shape(layer), "gates");
  check_saved(cells, layer, cells_shape(layer), "cells");
  BackwardParams params = given<BackwardParams>(layer, x, state0);
  params.y = layer.keep(y).const_data_ptr();
  params.gates = gates.const_data_ptr();
  params.cells = cells.const_data_ptr();
  const ScalarType dtype = x.scalar_type();
  const auto wanted = [&](bool want, std::vector<int64_t> shape) {
    return empty(want ? shape : std::vector<int64_t>{0}, dtype);
  };
  const auto data = [](const Tensor& t, bool want) { return want ? t.data_ptr() : nullptr; };
  Tensor dx = wanted(mask[0], shape_of(x));
  Tensor dh0 = wanted(mask[1], {s.D, s.steps.N, s.R});
  Tensor dc0 = wanted(mask[2], {s.D, s.steps.N, s.H});
  params.dx = data(dx, mask[0]);
  params.dh0 = data(dh0, mask[1]);
  params.dc0 = data(dc0, mask[2]);
  params.dy = read_gradient(layer, dy, y, "dy");
  // Shapes of the final states' gradients are those of dh0 and dc0.
  if (dh_n) params.dh_n = read_state(layer, x, {*dh_n}, 0, s.R, "dh_n");
  if (dc_n) params.dc_n = read_state(layer, x, {*dc_n}, 0, s.H, "dc_n");
  Tensors dweights;
  const size_t each = weights.size() / s.D;
  for (size_t i = 0; i < weights.size(); ++i) {
    dweights.push_back(wanted(mask[3 + i], shape_of(weights[i])));
    WeightGradients& g = params.dweights[i / each];
    void** slots[] = {&g.w_ih, &g.w_hh, &g.b_ih, &g.b_hh, &g.w_hr};
    const size_t at = i % each;
    const bool is_projection = layer.projection && at == each - 1;
    *slots[is_projection ? 4 : at] = data(dweights[i], mask[3 + i]);
  }
  if (s.steps.N > 0) {
    launch(problem_of(layer, true), params);
  } else {
    for (size_t i = 0; i < dweights.size(); ++i)
      if (mask[3 + i]) torch::stable::zero_(dweights[i]);
  }
  return {dx, dh0, dc0, dweights};
}

// "key=value" words describing the last call on this thread; empty before the first.
std::string describe_last_run() {
  const Run& last = last_run();
  if (!last.happened) return "";
  const Plan& p = last.plan;
  const auto number = [](const char* key, int64_t value) {
    return std::string(" ") + key + "=" + std::to_string(value);
  };
  return std::string("pass=") + (last.backward ? "backward" : "forward") +
         " kernel=" + name(p.kernel) + " isa=" + name(p.isa) + " dtype=" + name(p.dtype) +
         number("threads", p.threads) + number("direction_groups", p.direction_groups) +
         number("row_groups", p.row_groups) + number("unit_groups", p.unit_groups) +
         number("tile_rows", p.tile_rows) + number("tile_cols", p.tile_cols) +
         number("hoist_steps", p.hoist_steps);
}

void force_isa_by_name(std::string name) {
  force_isa(name);
}

std::string available_isas() {
  std::string names;
  for (int i = 0; i < kIsaCount; ++i)
    if (runs(static_cast<Isa>(i))) names += (i ? " " : "") + std::string(name(static_cast<Isa>(i)));
  return names;
}

std::string active_isa() {
  return name(current_isa());
}

}  // namespace
}  // namespace lstm_fused

STABLE_TORCH_LIBRARY(lstm_fused, m) {
  m.def(
      "recurrent_forward(Tensor x, Tensor? batch_sizes, Tensor[] state0, Tensor[] weights, int "
      "cell, "
      "int directions, bool training) "
      "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)");
  m.def(
      "recurrent_backward(Tensor x, Tensor? batch_sizes, Tensor[] state0, Tensor[] weights, Tensor "
      "y, "
      "Tensor gates, Tensor cells, Tensor? dy, Tensor? dh_n, Tensor? dc_n, int cell, int "
      "directions, "
      "bool[] mask) -> (Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dweights)");
  m.def("force_isa(str isa) -> ()");
  m.def("active_isa() -> str");
  m.def("available_isas() -> str");
  m.def("last_run() -> str");
  m.def("poisoning() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(lstm_fused, CPU, m) {
  m.impl("recurrent_forward", TORCH_BOX(&lstm_fused::recurrent_forward));
  m.impl("recurrent_backward", TORCH_BOX(&lstm_fused::recurrent_backward));
}

STABLE_TORCH_LIBRARY_IMPL(lstm_fused, CompositeExplicitAutograd, m) {
  m.impl("force_isa", TORCH_BOX(&lstm_fused::force_isa_by_name));
  m.impl("active_isa", TORCH_BOX(&lstm_fused::active_isa));
  m.impl("available_isas", TORCH_BOX(&lstm_fused::available_isas));
  m.impl("last_run", TORCH_BOX(&lstm_fused::describe_last_run));
  m.impl("poisoning", TORCH_BOX(&lstm_fused::poisoning));
}
