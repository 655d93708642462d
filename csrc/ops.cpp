// The operators: schemas, checks, allocation, and the call of the planned kernel. Arithmetic is
// below (cpu/), autograd and fakes above (lstm_fused/ops.py).
#include <cstring>

#include "launch.h"
#include "layer.h"

namespace lstm_fused {
namespace {

Tensor empty(const std::vector<int64_t>& shape, const Tensor& like, ScalarType dtype) {
  Tensor t = allocate(shape, dtype, like);
  if (poisoning() && t.numel() > 0) std::memset(t.data_ptr(), 0xff, t.numel() * t.element_size());
  return t;
}

Problem problem_of(const Layer& layer, bool training) {
  return problem_of(layer.cell, layer.dtype, layer.size, layer.projection, training);
}

// Shapes of what is saved for backward: values of the sums, and what the cell carries.
std::vector<int64_t> gates_shape(const Layer& layer) {
  const LayerSizes& s = layer.size;
  return {s.D, s.blocks(), layer.rows, info(layer.cell).sums, kBlock};
}
std::vector<int64_t> cells_shape(const Layer& layer) {
  if (info(layer.cell).memory == Memory::kNone) return {0};
  const LayerSizes& s = layer.size;
  return {s.D, s.blocks(), layer.rows, kBlock};
}

// Zeros for the rows of t (layer.rows, ...) that belong to no step.
void clear_padding(const Tensor& t, const Layer& layer) {
  const int64_t padding = layer.rows - layer.size.steps.rows();
  if (padding == 0) return;
  const int64_t row = t.numel() / layer.rows * t.element_size();
  std::memset(static_cast<char*>(t.data_ptr()) + layer.size.steps.rows() * row, 0, padding * row);
}

// Where padding follows packed data, kernels write what they save without it, block after block.
// The tensor has room for it: each block of rows is put where the tensor's shape says it is.
void spread_blocks(const Tensor& t, const Layer& layer) {
  const int64_t rows = layer.size.steps.rows();
  if (rows == layer.rows || t.numel() == 0) return;
  const int64_t blocks = layer.size.D * layer.size.blocks();
  const int64_t row = t.numel() / (blocks * layer.rows) * t.element_size();
  char* data = static_cast<char*>(t.data_ptr());
  for (int64_t block = blocks; block-- > 0;) {
    char* to = data + block * layer.rows * row;
    std::memmove(to, data + block * rows * row, rows * row);
    std::memset(to + rows * row, 0, (layer.rows - rows) * row);
  }
}

// And back again, in a copy.
const Tensor& without_padding(Layer& layer, const Tensor& t) {
  const int64_t rows = layer.size.steps.rows();
  if (rows == layer.rows || t.numel() == 0) return layer.keep(t);
  const int64_t blocks = layer.size.D * layer.size.blocks();
  const int64_t row = t.numel() / (blocks * layer.rows) * t.element_size();
  layer.kept.push_back(allocate(shape_of(t), t.scalar_type(), t));
  char* to = static_cast<char*>(layer.kept.back().data_ptr());
  const char* from = static_cast<const char*>(t.const_data_ptr());
  for (int64_t block = 0; block < blocks; ++block)
    std::memcpy(to + block * rows * row, from + block * layer.rows * row, rows * row);
  return layer.kept.back();
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensors, Tensor>;

// A result of this shape for each model, or an empty tensor if it is not wanted.
Tensor result(bool wanted, const Models& models, const std::vector<int64_t>& shape,
              const Tensor& like, ScalarType dtype) {
  return empty(wanted ? models.shape(shape) : std::vector<int64_t>{0}, like, dtype);
}

Forward allocate_forward(const Layer& layer, const Models& models, const Tensor& x,
                         const std::vector<int64_t>& y_shape, bool training) {
  const LayerSizes& s = layer.size;
  const ScalarType dtype = x.scalar_type(), compute = compute_dtype(layer.dtype);
  return {result(true, models, y_shape, x, dtype),
          result(true, models, {s.D, s.steps.N, s.R}, x, dtype),
          result(has_cell_state(layer), models, {s.D, s.steps.N, s.H}, x, dtype),
          result(training, models, gates_shape(layer), x, compute),
          result(training && info(layer.cell).memory != Memory::kNone, models, cells_shape(layer),
                 x, compute)};
}

Forward recurrent_forward(Tensor x, MaybeTensor batch_sizes, Tensors state0, Tensors weights,
                          int64_t cell, int64_t directions, bool training) {
  const Models models(x, weights);
  LSTM_FUSED_CHECK(models.count() > 0, "there must be at least one model");
  std::vector<Layer> layers;
  std::vector<ForwardParams> calls;
  layers.reserve(models.count());
  Forward out;
  for (int64_t m = 0; m < models.count(); ++m) {
    const Tensor x_m = models.of(x, m, "x");
    layers.push_back(
        read_layer(x_m, batch_sizes, models.of(weights, m, "every weight"), cell, directions));
    Layer& layer = layers.back();
    calls.push_back(given<ForwardParams>(layer, x_m, models.of(state0, m, "state0")));
    if (m == 0) out = allocate_forward(layer, models, x, output_shape(layer, x_m), training);
    ForwardParams& p = calls.back();
    const auto data = [&](const Tensor& t) { return models.of_result(t, m).data_ptr(); };
    p.y = data(std::get<0>(out));
    p.h_n = data(std::get<1>(out));
    p.c_n = data(std::get<2>(out));
    p.gates = training ? data(std::get<3>(out)) : nullptr;
    p.cells = training ? data(std::get<4>(out)) : nullptr;
  }
  const Steps& steps = layers[0].size.steps;
  LSTM_FUSED_CHECK(steps.T > 0 || batch_sizes, "x must have at least one time step");
  if (steps.N > 0) launch_each(problem_of(layers[0], training), calls);
  for (int64_t m = 0; m < models.count(); ++m) {
    clear_padding(models.of_result(std::get<0>(out), m), layers[0]);
    spread_blocks(models.of_result(std::get<3>(out), m), layers[0]);
    spread_blocks(models.of_result(std::get<4>(out), m), layers[0]);
  }
  return out;
}

// dweights[i] is the gradient of weight i % each of direction i / each.
void* WeightGradients::* gradient_slot(size_t i, size_t each, bool projection) {
  void* WeightGradients::* const slots[] = {&WeightGradients::w_ih, &WeightGradients::w_hh,
                                            &WeightGradients::b_ih, &WeightGradients::b_hh};
  return projection && i == each - 1 ? &WeightGradients::w_hr : slots[i];
}

Backward allocate_backward(const Layer& layer, const Models& models, const Tensor& x,
                           const Tensors& weights, const std::vector<bool>& mask) {
  const LayerSizes& s = layer.size;
  const ScalarType dtype = x.scalar_type();
  const auto like = [&](bool want, const Tensor& t) {
    return empty(want ? shape_of(t) : std::vector<int64_t>{0}, x, dtype);
  };
  Tensors dweights;
  for (size_t i = 0; i < weights.size(); ++i) dweights.push_back(like(mask[3 + i], weights[i]));
  return {like(mask[0], x), result(mask[1], models, {s.D, s.steps.N, s.R}, x, dtype),
          result(mask[2], models, {s.D, s.steps.N, s.H}, x, dtype), dweights,
          result(mask.back(), models, {layer.rows, s.D, info(layer.cell).sums, s.H}, x,
                 compute_dtype(layer.dtype))};
}

void check_mask(const std::vector<bool>& mask, size_t weights, const Layer& layer,
                const MaybeTensor& dc_n) {
  LSTM_FUSED_CHECK(mask.size() == 4 + weights,
                   "mask must have one entry each for x, h0, c0, every weight and the "
                   "pre-activations");
  LSTM_FUSED_CHECK(has_cell_state(layer) || (!mask[2] && !dc_n), "cell ", info(layer.cell).name,
                   " has no c0 or c_n to have a gradient");
}

// y as backward wants it: only the gradient of w_hh reads it, with a projection.
void read_output(Layer& layer, const Tensor& x, const MaybeTensor& y, bool wanted,
                 BackwardParams& params) {
  if (!wanted || !layer.projection) return;
  LSTM_FUSED_CHECK(y.has_value(), "with a projection, the gradient of w_hh needs y");
  check_like(*y, x, "y");
  check_shape(*y, output_shape(layer, x), "y");
  params.y = layer.keep(*y).const_data_ptr();
}

// What forward saved of model m, checked.
const void* saved_values(const Models& models, const Tensor& t, int64_t m, const Tensor& x,
                         Layer& layer, const std::vector<int64_t>& shape, const char* name) {
  const Tensor t_m = shape.size() > 1 ? models.of(t, m, name) : t;
  check_saved(t_m, x, layer, shape, name);
  return without_padding(layer, t_m).const_data_ptr();
}

Backward recurrent_backward(Tensor x, MaybeTensor batch_sizes, Tensors state0, Tensors weights,
                            MaybeTensor y, Tensor gates, Tensor cells, MaybeTensor dy,
                            MaybeTensor dh_n, MaybeTensor dc_n, int64_t cell, int64_t directions,
                            std::vector<bool> mask) {
  const Models models(x, weights);
  LSTM_FUSED_CHECK(models.count() > 0, "there must be at least one model");
  std::vector<Layer> layers;
  std::vector<BackwardParams> calls;
  layers.reserve(models.count());
  Backward out;
  for (int64_t m = 0; m < models.count(); ++m) {
    const Tensor x_m = models.of(x, m, "x");
    const Tensors weights_m = models.of(weights, m, "every weight");
    layers.push_back(read_layer(x_m, batch_sizes, weights_m, cell, directions));
    Layer& layer = layers.back();
    check_mask(mask, weights.size(), layer, dc_n);
    calls.push_back(given<BackwardParams>(layer, x_m, models.of(state0, m, "state0")));
    BackwardParams& p = calls.back();
    p.gates = saved_values(models, gates, m, x, layer, gates_shape(layer), "gates");
    p.cells = saved_values(models, cells, m, x, layer, cells_shape(layer), "cells");
    bool any_hh = false;
    const size_t each = weights.size() / layer.size.D;
    for (int d = 0; d < layer.size.D; ++d) any_hh = any_hh || mask[3 + d * each + 1];
    read_output(layer, x_m, models.of(y, m, "y"), any_hh, p);
    read_gradients(layer, x_m, models.of(dy, m, "dy"), models.of(dh_n, m, "dh_n"),
                   models.of(dc_n, m, "dc_n"), p);
    if (m == 0) out = allocate_backward(layer, models, x, weights, mask);
    const auto data = [&](const Tensor& t, bool want) {
      return want ? models.of_result(t, m).data_ptr() : nullptr;
    };
    auto& [dx, dh0, dc0, dweights, d_preacts] = out;
    p.dx = data(dx, mask[0]);
    p.dh0 = data(dh0, mask[1]);
    p.dc0 = data(dc0, mask[2]);
    for (size_t i = 0; i < weights.size(); ++i)
      p.dweights[i / each].*gradient_slot(i % each, each, layer.projection) =
          data(dweights[i], mask[3 + i]);
    p.d_preacts = data(d_preacts, mask.back());
  }
  if (layers[0].size.steps.N > 0) {
    launch_each(problem_of(layers[0], true), calls);
  } else {
    Tensors& dweights = std::get<3>(out);
    for (size_t i = 0; i < dweights.size(); ++i)
      if (mask[3 + i]) torch::stable::zero_(dweights[i]);
  }
  for (int64_t m = 0; m < models.count(); ++m) {
    if (mask[0]) clear_padding(models.of_result(std::get<0>(out), m), layers[0]);
    if (mask.back()) clear_padding(models.of_result(std::get<4>(out), m), layers[0]);
  }
  return out;
}

using Tangents = std::tuple<Tensor, Tensor, Tensor>;

// Tangents of y, h_n and c_n. x, state0 and the biases among weights are tangents, w_ih and w_hh
// the values; primal_c0: the initial state the cell carries, if any; preacts (S, D, P, H), in the
// compute dtype: what is to be added to the tangents of the pre-activations.
Tangents recurrent_tangent(Tensor x, MaybeTensor batch_sizes, Tensors state0, Tensors weights,
                           MaybeTensor primal_c0, Tensor gates, Tensor cells, MaybeTensor preacts,
                           int64_t cell, int64_t directions) {
  const Models models(x, weights);
  LSTM_FUSED_CHECK(models.count() > 0, "there must be at least one model");
  std::vector<Layer> layers;
  std::vector<TangentParams> calls;
  layers.reserve(models.count());
  Forward out;
  for (int64_t m = 0; m < models.count(); ++m) {
    const Tensor x_m = models.of(x, m, "x");
    layers.push_back(
        read_layer(x_m, batch_sizes, models.of(weights, m, "every weight"), cell, directions));
    Layer& layer = layers.back();
    LSTM_FUSED_CHECK(storage_bytes(layer.dtype) >= 4 && !layer.projection,
                     "tangents are of float32 or float64, without a projection");
    calls.push_back(given<TangentParams>(layer, x_m, models.of(state0, m, "state0")));
    if (m == 0) out = allocate_forward(layer, models, x, output_shape(layer, x_m), false);
    TangentParams& p = calls.back();
    const auto data = [&](const Tensor& t) { return models.of_result(t, m).data_ptr(); };
    p.y = data(std::get<0>(out));
    p.h_n = data(std::get<1>(out));
    p.c_n = data(std::get<2>(out));
    p.saved_gates = saved_values(models, gates, m, x, layer, gates_shape(layer), "gates");
    p.saved_cells = saved_values(models, cells, m, x, layer, cells_shape(layer), "cells");
    if (primal_c0)
      p.primal_c0 = read_state(layer, x_m, {models.of(*primal_c0, m, "primal_c0")}, 0, layer.size.H,
                               "primal_c0");
    if (preacts) {
      const Tensor t = models.of(*preacts, m, "preacts");
      const LayerSizes& s = layer.size;
      check_saved(t, x, layer, {layer.rows, s.D, info(layer.cell).sums, s.H}, "preacts");
      p.preacts = t.const_data_ptr();
    }
  }
  Problem problem = problem_of(layers[0], false);
  problem.tangents = true;
  if (layers[0].size.steps.N > 0) launch_each(problem, calls);
  for (int64_t m = 0; m < models.count(); ++m)
    clear_padding(models.of_result(std::get<0>(out), m), layers[0]);
  return {std::get<0>(out), std::get<1>(out), std::get<2>(out)};
}

// "key=value" words describing the last call on this thread; empty before the first.
std::string describe_last_run() {
  const Run& last = last_run();
  if (!last.pass) return "";
  const Plan& p = last.plan;
  const auto number = [](const char* key, int64_t value) {
    return std::string(" ") + key + "=" + std::to_string(value);
  };
  return std::string("pass=") + last.pass + " kernel=" + name(p.kernel) + " isa=" + name(p.isa) +
         " dtype=" + name(p.dtype) + number("threads", p.threads) +
         number("direction_groups", p.direction_groups) + number("row_groups", p.row_groups) +
         number("unit_groups", p.unit_groups) + number("tile_rows", p.tile_rows) +
         number("tile_cols", p.tile_cols) + number("hoist_steps", p.hoist_steps);
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
      "recurrent_backward(Tensor x, Tensor? batch_sizes, Tensor[] state0, Tensor[] weights, "
      "Tensor? y, "
      "Tensor gates, Tensor cells, Tensor? dy, Tensor? dh_n, Tensor? dc_n, int cell, int "
      "directions, "
      "bool[] mask) -> (Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dweights, Tensor d_preacts)");
  m.def(
      "recurrent_tangent(Tensor x, Tensor? batch_sizes, Tensor[] state0, Tensor[] weights, "
      "Tensor? primal_c0, Tensor gates, Tensor cells, Tensor? preacts, int cell, int directions) "
      "-> (Tensor y, Tensor h_n, Tensor c_n)");
  m.def("force_isa(str isa) -> ()");
  m.def("active_isa() -> str");
  m.def("available_isas() -> str");
  m.def("last_run() -> str");
  m.def("poisoning() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(lstm_fused, CPU, m) {
  m.impl("recurrent_forward", TORCH_BOX(&lstm_fused::recurrent_forward));
  m.impl("recurrent_backward", TORCH_BOX(&lstm_fused::recurrent_backward));
  m.impl("recurrent_tangent", TORCH_BOX(&lstm_fused::recurrent_tangent));
}

STABLE_TORCH_LIBRARY_IMPL(lstm_fused, CompositeExplicitAutograd, m) {
  m.impl("force_isa", TORCH_BOX(&lstm_fused::force_isa_by_name));
  m.impl("active_isa", TORCH_BOX(&lstm_fused::active_isa));
  m.impl("available_isas", TORCH_BOX(&lstm_fused::available_isas));
  m.impl("last_run", TORCH_BOX(&lstm_fused::describe_last_run));
  m.impl("poisoning", TORCH_BOX(&lstm_fused::poisoning));
}
