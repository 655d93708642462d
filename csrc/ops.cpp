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
  return {s.D, s.blocks(), s.steps.rows(), info(layer.cell).sums, kBlock};
}
std::vector<int64_t> cells_shape(const Layer& layer) {
  if (info(layer.cell).memory == Memory::kNone) return {0};
  const LayerSizes& s = layer.size;
  return {s.D, s.blocks(), s.steps.rows(), kBlock};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> recurrent_forward(
    Tensor x, MaybeTensor batch_sizes, Tensors state0, Tensors weights, int64_t cell,
    int64_t directions, bool training) {
  Layer layer = read_layer(x, batch_sizes, weights, cell, directions);
  const LayerSizes& s = layer.size;
  ForwardParams params = given<ForwardParams>(layer, x, state0);
  const ScalarType dtype = x.scalar_type();
  Tensor y = empty(output_shape(layer, x), x, dtype);
  Tensor h_n = empty({s.D, s.steps.N, s.R}, x, dtype);
  const auto maybe = [&](bool wanted, std::vector<int64_t> shape, ScalarType type) {
    return empty(wanted ? shape : std::vector<int64_t>{0}, x, type);
  };
  Tensor c_n = maybe(has_cell_state(layer), {s.D, s.steps.N, s.H}, dtype);
  Tensor gates = maybe(training, gates_shape(layer), compute_dtype(layer.dtype));
  Tensor cells = maybe(training, cells_shape(layer), compute_dtype(layer.dtype));
  params.y = y.data_ptr();
  params.h_n = h_n.data_ptr();
  params.c_n = c_n.data_ptr();
  params.gates = training ? gates.data_ptr() : nullptr;
  params.cells = training ? cells.data_ptr() : nullptr;
  LSTM_FUSED_CHECK(s.steps.T > 0, "x must have at least one time step");
  if (s.steps.N > 0) launch(problem_of(layer, training), params);
  return {y, h_n, c_n, gates, cells};
}

std::tuple<Tensor, Tensor, Tensor, Tensors> recurrent_backward(
    Tensor x, MaybeTensor batch_sizes, Tensors state0, Tensors weights, Tensor y, Tensor gates,
    Tensor cells, MaybeTensor dy, MaybeTensor dh_n, MaybeTensor dc_n, int64_t cell,
    int64_t directions, std::vector<bool> mask) {
  Layer layer = read_layer(x, batch_sizes, weights, cell, directions);
  const LayerSizes& s = layer.size;
  LSTM_FUSED_CHECK(mask.size() == 3 + weights.size(),
                   "mask must have one entry each for x, h0, c0 and every weight");
  LSTM_FUSED_CHECK(has_cell_state(layer) || (!mask[2] && !dc_n), "cell ", info(layer.cell).name,
                   " has no c0 or c_n to have a gradient");
  check_like(y, x, "y");
  check_shape(y, output_shape(layer, x), "y");
  check_saved(gates, x, layer, gates_shape(layer), "gates");
  check_saved(cells, x, layer, cells_shape(layer), "cells");
  BackwardParams params = given<BackwardParams>(layer, x, state0);
  params.y = layer.keep(y).const_data_ptr();
  params.gates = gates.const_data_ptr();
  params.cells = cells.const_data_ptr();
  const ScalarType dtype = x.scalar_type();
  const auto wanted = [&](bool want, std::vector<int64_t> shape) {
    return empty(want ? shape : std::vector<int64_t>{0}, x, dtype);
  };
  const auto data = [](const Tensor& t, bool want) { return want ? t.data_ptr() : nullptr; };
  Tensor dx = wanted(mask[0], shape_of(x));
  Tensor dh0 = wanted(mask[1], {s.D, s.steps.N, s.R});
  Tensor dc0 = wanted(mask[2], {s.D, s.steps.N, s.H});
  params.dx = data(dx, mask[0]);
  params.dh0 = data(dh0, mask[1]);
  params.dc0 = data(dc0, mask[2]);
  read_gradients(layer, x, y, dy, dh_n, dc_n, params);
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
