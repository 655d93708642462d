// The recurrence on a CUDA device as two operators, on torch's stable ABI. Everything around it,
// allocation included, is lstm_fused/cuda.py's: these check what they are given and launch.
#include "../stable.h"
#include "kernels.h"
#include "primitives.h"

#if defined(LSTM_FUSED_EMULATION)
#define LSTM_FUSED_LIBRARY lstm_fused_emulation
#define LSTM_FUSED_KEY CPU
#else
#define LSTM_FUSED_LIBRARY lstm_fused_cuda
#define LSTM_FUSED_KEY CUDA
#endif

namespace lstm_fused::cuda {
namespace {

using Tensors = std::vector<Tensor>;
using MaybeTensor = std::optional<Tensor>;
using Shape = std::vector<int64_t>;

void* data(const Tensor& t, const Shape& shape, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
  check_shape(t, shape, name);
  return t.data_ptr();
}
void* data(const MaybeTensor& t, const Shape& shape, const char* name) {
  return t ? data(*t, shape, name) : nullptr;
}
// One for each direction, or none.
void* data(const Tensors& ts, size_t i, const Shape& shape, const char* name) {
  return i < ts.size() ? data(ts[i], shape, name) : nullptr;
}

Plan read_plan(const std::vector<int64_t>& v, bool backward) {
  STD_TORCH_CHECK(v.size() == 7 && v[0] >= 0 && v[0] < kPlanKinds, "no such plan");
  Plan plan{};
  plan.kind = static_cast<PlanKind>(v[0]);
  plan.backward = backward;
  plan.tf32 = v[1] != 0;
  plan.tile_rows = static_cast<int>(v[2]);
  plan.unit_tiles = static_cast<int>(v[3]);
  plan.unit_ctas = static_cast<int>(v[4]);
  plan.row_groups = static_cast<int>(v[5]);
  plan.shared_bytes = v[6];
  return plan;
}

Run* run_of(DType dtype, bool tf32) {
  switch (dtype) {
    case DType::kFloat32: return tf32 ? run_tf32 : run_float32;
    case DType::kFloat64: return run_float64;
    case DType::kBFloat16: return run_bfloat16;
    case DType::kFloat16: return run_float16;
  }
  return nullptr;
}

// Steps on the host, with offsets kept in `offsets`.
Steps read_steps(const MaybeTensor& sizes, int64_t rows, int64_t N, std::vector<int64_t>& offsets) {
  if (!sizes) return {rows / N, N, nullptr, nullptr};
  STD_TORCH_CHECK(
      sizes->is_cpu() && sizes->is_contiguous() && sizes->scalar_type() == ScalarType::Long,
      "batch_sizes must be contiguous int64 on the CPU");
  const int64_t* size = sizes->const_data_ptr<int64_t>();
  offsets.assign(1, 0);
  for (int64_t t = 0; t < sizes->numel(); ++t) {
    STD_TORCH_CHECK(size[t] > 0 && size[t] <= (t ? size[t - 1] : N),
                    "batch_sizes must be positive and must not grow");
    offsets.push_back(offsets.back() + size[t]);
  }
  STD_TORCH_CHECK(offsets.back() == rows && offsets.size() > 1 && size[0] == N,
                  "batch_sizes add up to ", offsets.back(), " but there are ", rows, " rows");
  return {sizes->numel(), N, size, offsets.data()};
}

// The same on the device: steps (2, T + 1), sizes and offsets.
Steps on_device(const Steps& host, const MaybeTensor& steps) {
  if (!host.sizes) return host;
  const int64_t* all = static_cast<const int64_t*>(data(steps, {2, host.T + 1}, "steps"));
  return {host.T, host.N, all, all ? all + host.T + 1 : nullptr};
}

// exchange: (halves, D, rows, columns).
Exchange read_exchange(const Tensor& t, int D, int64_t N, int tile_rows, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous() && t.dim() == 4 && t.size(1) == D && t.size(0) <= 2, name,
                  " has shape ", describe(t));
  STD_TORCH_CHECK(t.size(2) >= round_up(N, tile_rows), name, " has too few rows");
  const int64_t bytes = t.size(3) * t.element_size();
  STD_TORCH_CHECK(bytes % kKBytes == 0, name, " has rows of ", bytes, " bytes");
  return {static_cast<char*>(t.data_ptr()), t.size(0) == 2 ? D * t.size(2) * bytes : 0, t.size(2),
          bytes};
}

Product read_product(const Tensors& a, int64_t gates, int64_t units, const Exchange& in,
                     const Exchange& out, const char* name) {
  Product product{{nullptr, nullptr}, units, in, out};
  for (size_t d = 0; d < a.size(); ++d) {
    const int64_t columns = in.bytes / a[d].element_size();
    product.a[d] = static_cast<const char*>(data(a[d], {gates * units, columns}, name));
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(product.a[d]) % 16 == 0, name, " is not aligned");
  }
  return product;
}

void launch(const Tensor& like, int64_t cell, const Plan& plan, const RecurrenceParams& params,
            const Product* second, const Steps& steps) {
  void* stream = nullptr;
#if !defined(LSTM_FUSED_EMULATION)
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
#endif
  const DeviceGuard guard(like.get_device_index());
  const char* error = run_of(dtype_of(like, "y"), plan.tf32)(static_cast<CellKind>(cell), plan,
                                                             params, second, steps, stream);
  STD_TORCH_CHECK(error == nullptr, "lstm_fused, ", name(plan.kind), " plan: ", error);
}

struct Sizes {
  int64_t S, N, H, R, D, gates, sums;
};

RecurrenceParams sized(const Sizes& z, const Steps& steps, bool projection) {
  RecurrenceParams p{};
  p.steps = steps;
  p.s_end = steps.T;
  p.S = z.S;
  p.N = z.N;
  p.H = z.H;
  p.R = z.R;
  p.D = static_cast<int>(z.D);
  p.projection = projection;
  return p;
}

void check_cell(int64_t cell) {
  STD_TORCH_CHECK(cell >= 0 && cell < kCellCount, "unknown cell ", cell);
}

void forward(Tensor pre, Tensors w_hh, Tensors bias, Tensors w_hr, Tensors state0,
             MaybeTensor batch_sizes, MaybeTensor steps, Tensor y, Tensor h_n, MaybeTensor c_n,
             MaybeTensor gates, MaybeTensor cells, Tensor carry, Tensors exchange,
             MaybeTensor barrier, int64_t cell, int64_t sums, std::vector<int64_t> planned) {
  check_cell(cell);
  STD_TORCH_CHECK(h_n.dim() == 3 && carry.dim() == 3 && y.dim() == 2, "h_n, carry and y");
  const Sizes z{y.size(0),   h_n.size(1),    carry.size(2), h_n.size(2),
                h_n.size(0), kGatesOf[cell], sums};
  const Plan plan = read_plan(planned, false);
  std::vector<int64_t> offsets;
  const Steps host = read_steps(batch_sizes, z.S, z.N, offsets);
  const bool projection = !w_hr.empty(), persistent = plan.kind != PlanKind::kStep;
  RecurrenceParams p = sized(z, persistent ? on_device(host, steps) : Steps{}, projection);
  p.s_end = host.T;
  p.pre = data(pre, {z.S, z.D, z.gates * z.H}, "pre");
  for (int64_t d = 0; d < z.D; ++d) {
    p.b_ih[d] = data(bias, 2 * d, {z.gates * z.H}, "b_ih");
    p.b_hh[d] = data(bias, 2 * d + 1, {z.gates * z.H}, "b_hh");
  }
  p.h0 = data(state0, 0, {z.D, z.N, z.R}, "h0");
  p.c0 = data(state0, 1, {z.D, z.N, z.H}, "c0");
  p.y = data(y, {z.S, z.D * z.R}, "y");
  p.h_n = data(h_n, {z.D, z.N, z.R}, "h_n");
  p.c_n = data(c_n, {z.D, z.N, z.H}, "c_n");
  p.gates = data(gates, {z.S, z.D, z.sums, z.H}, "gates");
  p.cells = data(cells, {z.S, z.D, z.H}, "cells");
  p.carry = data(carry, {z.D, z.N, z.H}, "carry");
  if (barrier) p.barrier = static_cast<unsigned long long*>(barrier->data_ptr());
  STD_TORCH_CHECK(exchange.size() == (projection ? 2u : 1u), "exchange");
  const Exchange h = read_exchange(exchange[0], p.D, z.N, plan.tile_rows, "h");
  const Exchange hidden =
      projection ? read_exchange(exchange[1], p.D, z.N, plan.tile_rows, "hidden") : h;
  p.product = read_product(w_hh, z.gates, z.H, h, hidden, "w_hh");
  const Product second = projection ? read_product(w_hr, 1, z.R, hidden, h, "w_hr") : Product{};
  launch(y, cell, plan, p, projection ? &second : nullptr, host);
}

void backward(Tensors w_hh_t, Tensors w_hr_t, Tensors state0, MaybeTensor batch_sizes,
              MaybeTensor steps, Tensor gates, MaybeTensor cells, MaybeTensor dy, MaybeTensor dh_n,
              MaybeTensor dc_n, Tensor d_gates, MaybeTensor hidden, MaybeTensor d_hidden,
              MaybeTensor dh0, MaybeTensor dc0, Tensor carry, Tensors exchange, MaybeTensor barrier,
              int64_t R, int64_t cell, std::vector<int64_t> planned) {
  check_cell(cell);
  STD_TORCH_CHECK(d_gates.dim() == 4 && carry.dim() == 3, "d_gates and carry");
  const Sizes z{d_gates.size(0), carry.size(1),  carry.size(2),  R,
                carry.size(0),   kGatesOf[cell], d_gates.size(2)};
  const Plan plan = read_plan(planned, true);
  std::vector<int64_t> offsets;
  const Steps host = read_steps(batch_sizes, z.S, z.N, offsets);
  const bool projection = !w_hr_t.empty(), persistent = plan.kind != PlanKind::kStep;
  RecurrenceParams p = sized(z, persistent ? on_device(host, steps) : Steps{}, projection);
  // A step past the end where the initial state's gradients are wanted.
  p.s_end = host.T + (dh0 || dc0 ? 1 : 0);
  p.h0 = data(state0, 0, {z.D, z.N, z.R}, "h0");
  p.c0 = data(state0, 1, {z.D, z.N, z.H}, "c0");
  p.gates = data(gates, {z.S, z.D, z.sums, z.H}, "gates");
  p.cells = data(cells, {z.S, z.D, z.H}, "cells");
  p.dy = data(dy, {z.S, z.D * z.R}, "dy");
  p.dh_n = data(dh_n, {z.D, z.N, z.R}, "dh_n");
  p.dc_n = data(dc_n, {z.D, z.N, z.H}, "dc_n");
  p.d_gates = data(d_gates, {z.S, z.D, z.sums, z.H}, "d_gates");
  p.hidden = data(hidden, {z.S, z.D, z.H}, "hidden");
  p.d_hidden = data(d_hidden, {z.S, z.D, z.R}, "d_hidden");
  p.dh0 = data(dh0, {z.D, z.N, z.R}, "dh0");
  p.dc0 = data(dc0, {z.D, z.N, z.H}, "dc0");
  p.carry = data(carry, {z.D, z.N, z.H}, "carry");
  if (barrier) p.barrier = static_cast<unsigned long long*>(barrier->data_ptr());
  STD_TORCH_CHECK(exchange.size() == (projection ? 2u : 1u), "exchange");
  const Exchange dg = read_exchange(exchange[0], p.D, z.N, plan.tile_rows, "d_gates' exchange");
  if (!projection) {
    p.product = read_product(w_hh_t, 1, z.H, dg, dg, "w_hh_t");
    return launch(d_gates, cell, plan, p, nullptr, host);
  }
  STD_TORCH_CHECK(hidden && d_hidden, "a projection needs hidden and d_hidden");
  const Exchange dh = read_exchange(exchange[1], p.D, z.N, plan.tile_rows, "d_h's exchange");
  p.product = read_product(w_hh_t, 1, z.R, dg, dh, "w_hh_t");
  const Product second = read_product(w_hr_t, 1, z.H, dh, dg, "w_hr_t");
  launch(d_gates, cell, plan, p, &second, host);
}

// (major, minor, SMs, shared bytes of a block, CTAs of a cluster).
std::vector<int64_t> device_properties(int64_t index) {
  Device device{};
  const DeviceGuard guard(static_cast<int>(index));
  const char* error = read_device(static_cast<int>(index), device);
  STD_TORCH_CHECK(error == nullptr, "device ", index, ": ", error);
  return {device.major, device.minor, device.sms, device.shared_bytes, device.cluster_ctas};
}

}  // namespace
}  // namespace lstm_fused::cuda

STABLE_TORCH_LIBRARY(LSTM_FUSED_LIBRARY, m) {
  m.def(
      "forward(Tensor pre, Tensor[] w_hh, Tensor[] bias, Tensor[] w_hr, Tensor[] state0, "
      "Tensor? batch_sizes, Tensor? steps, Tensor y, Tensor h_n, Tensor? c_n, Tensor? gates, "
      "Tensor? cells, Tensor carry, Tensor[] exchange, Tensor? barrier, int cell, int sums, "
      "int[] plan) -> ()");
  m.def(
      "backward(Tensor[] w_hh_t, Tensor[] w_hr_t, Tensor[] state0, Tensor? batch_sizes, "
      "Tensor? steps, Tensor gates, Tensor? cells, Tensor? dy, Tensor? dh_n, Tensor? dc_n, "
      "Tensor d_gates, Tensor? hidden, Tensor? d_hidden, Tensor? dh0, Tensor? dc0, Tensor carry, "
      "Tensor[] exchange, Tensor? barrier, int R, int cell, int[] plan) -> ()");
  m.def("device_properties(int index) -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(LSTM_FUSED_LIBRARY, LSTM_FUSED_KEY, m) {
  m.impl("forward", TORCH_BOX(&lstm_fused::cuda::forward));
  m.impl("backward", TORCH_BOX(&lstm_fused::cuda::backward));
}

STABLE_TORCH_LIBRARY_IMPL(LSTM_FUSED_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("device_properties", TORCH_BOX(&lstm_fused::cuda::device_properties));
}
