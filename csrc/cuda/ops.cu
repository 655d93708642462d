// The recurrence on a CUDA device as operators, on torch's stable ABI: forward with the product of
// x and W_ih before it; the walk back through time; and the product that lstm_fused/cuda_layer.py
// takes the other gradients with.
#include "pass.h"

#if defined(LSTM_FUSED_EMULATION)
#define LSTM_FUSED_LIBRARY lstm_fused_emulation
#define LSTM_FUSED_KEY CPU
#else
#define LSTM_FUSED_LIBRARY lstm_fused_cuda
#define LSTM_FUSED_KEY CUDA
#endif

namespace lstm_fused::cuda {
namespace {

// a (n, k) b (k, m) for Python, of any strides.
Tensor product_of(Tensor a, Tensor b, bool tf32) {
  LSTM_FUSED_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0) && a.size(1) > 0,
                   "b has shape ", describe(b), ", which does not fit a's, ", describe(a));
  check_like(b, a, "b");
  const Guard guard(a.get_device_index());
  Tensors kept;
  return product(matrix_of(a, kept), matrix_of(b, kept), tf32, a);
}

// x.W_ih of all steps, (S, D * G * H).
Tensor input_product(const Pass& pass, const Layer& layer, const Tensor& x) {
  const LayerSizes& s = layer.size;
  const int64_t height = pass.gates() * s.H;
  const Tensor rows = torch::stable::reshape(x, {s.steps.rows(), s.I});
  Tensors kept;
  const Matrix left = matrix_of(rows, kept);
  Matrix right{layer.weights[0].w_ih, s.I, height, s.I, true};
  if (s.D == 1) return product(left, right, pass.tf32(), x);
  const int64_t bytes = height * s.I * storage_bytes(layer.dtype);
  const Tensor both = pass.empty({2 * height, s.I});
  for (int d = 0; d < 2; ++d)
    pass.copy_rows(static_cast<char*>(both.data_ptr()) + d * bytes, bytes, layer.weights[d].w_ih,
                   bytes, bytes, 1);
  right.data = both.data_ptr();
  right.columns *= 2;
  return product(left, right, pass.tf32(), x);
}

Shape gates_shape(const Layer& layer) {
  const LayerSizes& s = layer.size;
  return {s.steps.rows(), s.D, info(layer.cell).sums, s.H};
}
Shape cells_shape(const Layer& layer) {
  if (info(layer.cell).memory == Memory::kNone) return {0};
  return {layer.size.steps.rows(), layer.size.D, layer.size.H};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(Tensor x, MaybeTensor batch_sizes,
                                                           Tensors state0, Tensors weights,
                                                           int64_t cell, int64_t directions,
                                                           bool training, bool tf32,
                                                           std::string kind) {
  Layer layer = read_layer(x, batch_sizes, weights, cell, directions);
  const LayerSizes& s = layer.size;
  const Steps& steps = s.steps;
  LSTM_FUSED_CHECK(steps.T > 0, "x must have at least one time step");
  const ForwardParams given = lstm_fused::given<ForwardParams>(layer, x, state0);
  Pass pass(layer, x, tf32, kind, false);
  const ScalarType compute = compute_dtype(layer.dtype);
  Tensor y = pass.empty(output_shape(layer, x));
  Tensor h_n = pass.empty({s.D, steps.N, s.R});
  Tensor c_n = pass.maybe(has_cell_state(layer), {s.D, steps.N, s.H});
  Tensor cells = pass.empty(training ? cells_shape(layer) : Shape{0}, compute);
  if (steps.N == 0)
    return {y, h_n, c_n, pass.empty(training ? gates_shape(layer) : Shape{0}, compute), cells};

  const Tensor pre = input_product(pass, layer, x);
  // Each unit's sums are read before its gates are written.
  const bool in_place = info(layer.cell).sums == pass.gates();
  Tensor gates = !training  ? pass.empty({0}, compute)
                 : in_place ? torch::stable::view(pre, gates_shape(layer))
                            : pass.empty(gates_shape(layer), compute);

  const int64_t width = row_bytes(layer.dtype, s.R);
  const auto h = pass.exchange(2, width);
  const auto hidden = layer.projection ? pass.exchange(1, row_bytes(layer.dtype, s.H)) : h;
  std::vector<Pass::Operand> w_hh, w_hr;
  for (int d = 0; d < s.D; ++d) {
    w_hh.push_back(pass.operand(layer.weights[d].w_hh, pass.gates() * s.H, s.R));
    if (layer.projection) w_hr.push_back(pass.operand(layer.weights[d].w_hr, s.R, s.H));
  }
  pass.allocate_rooms();

  RecurrenceParams p = pass.params(given);
  p.pre = pre.data_ptr();
  p.y = y.data_ptr();
  p.h_n = h_n.data_ptr();
  if (has_cell_state(layer)) p.c_n = c_n.data_ptr();
  if (training) p.gates = gates.data_ptr();
  if (training && pass.memory() != Memory::kNone) p.cells = cells.data_ptr();
  p.product = {{}, s.H, pass.placed(h), pass.placed(hidden)};
  Product second{{}, s.R, p.product.out, p.product.in};
  for (int d = 0; d < s.D; ++d) {
    p.b_ih[d] = layer.weights[d].b_ih;
    p.b_hh[d] = layer.weights[d].b_hh;
    p.product.a[d] = pass.placed(w_hh[d]);
    if (layer.projection) second.a[d] = pass.placed(w_hr[d]);
    const int64_t bytes = s.R * storage_bytes(layer.dtype);
    // Both halves: a row of packed data may begin at any step.
    for (int half = 0; given.h0 && half < (steps.sizes ? 2 : 1); ++half)
      pass.copy_rows(p.product.in.at(half, d, 0), width,
                     static_cast<const char*>(given.h0) + d * steps.N * bytes, bytes, bytes,
                     steps.N);
  }
  pass.launch(p, layer.projection ? &second : nullptr);
  return {y, h_n, c_n, gates, cells};
}

// One a direction, contiguous and 16-byte aligned.
const char* turned_weights(const Tensors& w, int d, const Tensor& x, const Shape& shape,
                           const char* name) {
  LSTM_FUSED_CHECK(static_cast<size_t>(d) < w.size(), name, " must hold one for each direction");
  check_like(w[d], x, name);
  check_shape(w[d], shape, name);
  const void* data = w[d].data_ptr();
  LSTM_FUSED_CHECK(w[d].is_contiguous() && reinterpret_cast<uintptr_t>(data) % 16 == 0, name,
                   " must be contiguous and aligned");
  return static_cast<const char*>(data);
}

// w_hh_t: (R, G, H) and w_hr_t (H, R) for each direction, the last dimension padded by zeros to
// whole products. Returns the gradients of all sums and of the initial states; with a projection h
// before it and the gradient of h after it, of packed data h of every step before; else nothing.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor x, MaybeTensor batch_sizes, Tensors state0, Tensors weights, Tensors w_hh_t,
    Tensors w_hr_t, Tensor y, Tensor gates, Tensor cells, MaybeTensor dy, MaybeTensor dh_n,
    MaybeTensor dc_n, int64_t cell, int64_t directions, bool dh0_too, bool dc0_too, bool tf32,
    std::string kind) {
  Layer layer = read_layer(x, batch_sizes, weights, cell, directions);
  const LayerSizes& s = layer.size;
  const int64_t N = s.steps.N, S = s.steps.rows();
  LSTM_FUSED_CHECK(N > 0, "there must be a row");
  LSTM_FUSED_CHECK(has_cell_state(layer) || (!dc0_too && !dc_n), "cell ", info(layer.cell).name,
                   " has no c0 or c_n to have a gradient");
  const ForwardParams given = lstm_fused::given<ForwardParams>(layer, x, state0);
  check_like(y, x, "y");
  check_shape(y, output_shape(layer, x), "y");
  check_saved(gates, x, layer, gates_shape(layer), "gates");
  check_saved(cells, x, layer, cells_shape(layer), "cells");
  Pass pass(layer, x, tf32, kind, true);
  Tensor d_gates = pass.empty(gates_shape(layer));
  Tensor dh0 = pass.maybe(dh0_too, {s.D, N, s.R});
  Tensor dc0 = pass.maybe(dc0_too, {s.D, N, s.H});
  Tensor hidden = pass.maybe(layer.projection, {S, s.D, s.H});
  Tensor d_hidden = pass.maybe(layer.projection, {S, s.D, s.R});
  Tensor before = pass.maybe(batch_sizes.has_value(), {S, s.D, s.R});

  const int64_t hidden_row = row_bytes(layer.dtype, s.H), width = row_bytes(layer.dtype, s.R);
  const auto of_gates = pass.exchange(2, pass.gates() * hidden_row);
  const auto of_h = layer.projection ? pass.exchange(1, width) : of_gates;
  pass.allocate_rooms();

  RecurrenceParams p = pass.params(given);
  // A step past the end where the initial state's gradients are wanted.
  p.s_end += dh0_too || dc0_too;
  p.gates = gates.data_ptr();
  if (pass.memory() != Memory::kNone) p.cells = cells.data_ptr();
  read_gradients(layer, x, dy, dh_n, dc_n, p);
  p.d_gates = d_gates.data_ptr();
  if (batch_sizes) {
    p.h = layer.keep(y).data_ptr();
    p.before = before.data_ptr();
  }
  if (dh0_too) p.dh0 = dh0.data_ptr();
  if (dc0_too) p.dc0 = dc0.data_ptr();
  const int64_t each = hidden_row / storage_bytes(layer.dtype);
  p.product = {{}, layer.projection ? s.R : s.H, pass.placed(of_gates), pass.placed(of_h)};
  Product second{{}, s.H, p.product.out, p.product.in};
  for (int d = 0; d < s.D; ++d) {
    p.product.a[d] = turned_weights(w_hh_t, d, x, {s.R, pass.gates() * each}, "w_hh_t");
    if (layer.projection)
      second.a[d] =
          turned_weights(w_hr_t, d, x, {s.H, width / storage_bytes(layer.dtype)}, "w_hr_t");
  }
  if (layer.projection) {
    p.hidden = hidden.data_ptr();
    p.d_hidden = d_hidden.data_ptr();
  }
  pass.launch(p, layer.projection ? &second : nullptr);
  return {d_gates, dh0, dc0, hidden, d_hidden, before};
}

// (major, minor, SMs, shared bytes of a block, CTAs of a cluster, clusters of that size at once).
std::vector<int64_t> device_properties(int64_t index) {
  const Device d = device_of(static_cast<int>(index));
  return {d.major, d.minor, d.sms, d.shared_bytes, d.cluster_ctas, d.clusters};
}

std::string describe_last_run() {
  return last_run().get();
}

}  // namespace
}  // namespace lstm_fused::cuda

STABLE_TORCH_LIBRARY(LSTM_FUSED_LIBRARY, m) {
  m.def(
      "forward(Tensor x, Tensor? batch_sizes, Tensor[] state0, Tensor[] weights, int cell, "
      "int directions, bool training, bool tf32, str kind) "
      "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)");
  m.def(
      "backward(Tensor x, Tensor? batch_sizes, Tensor[] state0, Tensor[] weights, "
      "Tensor[] w_hh_t, Tensor[] w_hr_t, Tensor y, Tensor gates, Tensor cells, Tensor? dy, "
      "Tensor? dh_n, Tensor? dc_n, int cell, int directions, bool dh0_too, bool dc0_too, bool "
      "tf32, str kind) "
      "-> (Tensor d_gates, Tensor dh0, Tensor dc0, Tensor hidden, Tensor d_hidden, Tensor before)");
  m.def("product(Tensor a, Tensor b, bool tf32) -> Tensor");
  m.def("device_properties(int index) -> int[]");
  m.def("last_run() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(LSTM_FUSED_LIBRARY, LSTM_FUSED_KEY, m) {
  m.impl("forward", TORCH_BOX(&lstm_fused::cuda::forward));
  m.impl("backward", TORCH_BOX(&lstm_fused::cuda::backward));
  m.impl("product", TORCH_BOX(&lstm_fused::cuda::product_of));
}

STABLE_TORCH_LIBRARY_IMPL(LSTM_FUSED_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("device_properties", TORCH_BOX(&lstm_fused::cuda::device_properties));
  m.impl("last_run", TORCH_BOX(&lstm_fused::cuda::describe_last_run));
}
