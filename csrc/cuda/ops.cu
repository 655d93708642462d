// The recurrence on a CUDA device as two operators, on torch's stable ABI: forward with the product
// of x and W_ih before it, and the walk back through time, whose products are left to
// lstm_fused/cuda_layer.py. Both plan, lay out what a pass works in, and launch.
#include <torch/csrc/stable/accelerator.h>

#include <mutex>

#include "../layer.h"
#include "../poison.h"
#include "blas.h"
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

using Shape = std::vector<int64_t>;

#if defined(LSTM_FUSED_EMULATION)
using Guard = DeviceGuard;
#else
// Torch's guard, which knows the devices that this process has not touched yet; the runtime in this
// library is told too.
class Guard {
 public:
  explicit Guard(int device) : guard_(device) { make_current(device); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};
#endif

void check(const char* error, const char* what) {
  STD_TORCH_CHECK(error == nullptr, "lstm_fused, ", what, ": ", error);
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

// Asked once for each device: the driver takes its time.
Device device_of(int index) {
  static std::mutex mutex;
  static std::vector<std::optional<Device>> known;
  const std::lock_guard lock(mutex);
  const size_t at = index < 0 ? 0 : index;
  if (known.size() <= at) known.resize(at + 1);
  if (!known[at]) {
    Device device{};
    const Guard guard(index);
    check(read_device(static_cast<int>(at), device), "device");
    known[at] = device;
  }
  return *known[at];
}

// The newest call of any thread: autograd has its own.
class LastRun {
 public:
  void set(std::string words) {
    const std::lock_guard lock(mutex_);
    words_ = std::move(words);
  }
  std::string get() {
    const std::lock_guard lock(mutex_);
    return words_;
  }

 private:
  std::mutex mutex_;
  std::string words_;
};

LastRun& last_run() {
  static LastRun last;
  return last;
}

const char* dtype_name(DType dtype) {
  constexpr const char* names[kDTypeCount] = {"float32", "float64", "bfloat16", "float16"};
  return names[static_cast<int>(dtype)];
}

int64_t bytes_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}
int64_t compute_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : 4;
}

PlanKind kind_named(const std::string& wanted) {
  for (int kind = 0; kind < kPlanKinds; ++kind)
    if (wanted == name(static_cast<PlanKind>(kind))) return static_cast<PlanKind>(kind);
  STD_TORCH_CHECK(false, "no such plan: ", wanted);
  return PlanKind::kStep;
}

// t's memory, of a copy if neither its rows nor its columns are contiguous.
Matrix matrix_of(const Tensor& t, Tensors& kept) {
  const int64_t rows = t.size(0), columns = t.size(1);
  // What lies `stride` apart holds `length` values; the stride of a single one may be anything.
  const auto runs = [](int64_t count, int64_t stride, int64_t length, int64_t inner) {
    return (length == 1 || inner == 1) && (count == 1 || stride >= length);
  };
  if (runs(rows, t.stride(0), columns, t.stride(1)))
    return {t.data_ptr(), rows, columns, rows == 1 ? columns : t.stride(0), false};
  if (runs(columns, t.stride(1), rows, t.stride(0)))
    return {t.data_ptr(), rows, columns, columns == 1 ? rows : t.stride(1), true};
  kept.push_back(torch::stable::contiguous(t));
  return {kept.back().data_ptr(), rows, columns, columns, false};
}

// a (n, k) b (k, m) on the device of `like`, accumulated and given in the compute dtype.
Tensor product(const Matrix& a, const Matrix& b, bool tf32, const Tensor& like) {
  const DType dtype = dtype_of(like, "x");
  Tensor out = allocate({a.rows, b.columns}, compute_dtype(dtype), like);
  STD_TORCH_CHECK(has_library(), "lstm_fused: torch came without cuBLAS of CUDA 12 or later");
  void* library = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&library));
  check(multiply(library, dtype, tf32, a, b, out.data_ptr()), "cuBLAS");
  return out;
}

// The same for Python, of tensors with any strides.
Tensor product_of(Tensor a, Tensor b, bool tf32) {
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0) && a.size(1) > 0,
                  "b has shape ", describe(b), ", which does not fit a's, ", describe(a));
  check_like(b, a, "b");
  const Guard guard(a.get_device_index());
  Tensors kept;
  return product(matrix_of(a, kept), matrix_of(b, kept), tf32, a);
}

// The gemm plan's, of what lies in a pass's memory.
class Products final : public Gemm {
 public:
  Products(const Tensor& x, bool tf32) : x_(x), tf32_(tf32) {}

  const void* multiply(const Product& p, int gates, int64_t s, int d, int64_t rows) override {
    const int64_t columns = p.in.bytes / x_.element_size();
    const Matrix b{p.in.at(s, d, 0), rows, columns, columns, false};
    const Matrix a{p.a[d], columns, gates * p.units, columns, true};
    results_[d] = product(b, a, tf32_, x_);
    return results_[d]->data_ptr();
  }

 private:
  const Tensor& x_;
  const bool tf32_;
  std::optional<Tensor> results_[2];
};

// A pass over a layer: its plan, and the memory it works in beside its tensors. That is one
// allocation, parts of which are asked for first and then lie where `at` says.
class Pass {
 public:
  Pass(const Layer& layer, const Tensor& x, bool tf32, const std::string& kind, bool backward)
      : layer_(layer), x_(x), size_(layer.size), guard_(x.get_device_index()) {
#if !defined(LSTM_FUSED_EMULATION)
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream_));
#endif
    tf32 = tf32 && layer.dtype == DType::kFloat32;
    const Device device = device_of(x.get_device_index());
    STD_TORCH_CHECK(supported(device),
                    "the fused kernels need compute capability 8.0 or later, not ", device.major,
                    ".", device.minor);
    const Steps& steps = size_.steps;
    const Problem problem{layer.dtype, steps.T, steps.N,          size_.H, size_.R,
                          size_.D,     gates(), layer.projection, tf32};
    // In a CUDA graph packed data's sizes cannot be copied to the device for the other plans.
    const bool stepwise = steps.sizes && is_capturing(stream_);
    if (kind.empty() || (stepwise && !in_steps(kind_named(kind)))) {
      plan_ = make_plan(problem, device, backward, stepwise);
    } else {
      const std::optional<Plan> forced = plan_as(kind_named(kind), problem, device, backward);
      plan_ = forced ? *forced : *plan_as(PlanKind::kStep, problem, device, backward);
    }
    const auto number = [](const char* key, int64_t value) {
      return std::string(" ") + key + "=" + std::to_string(value);
    };
    last_run().set(std::string("pass=") + (backward ? "backward" : "forward") +
                   " dtype=" + dtype_name(layer.dtype) + " kernel=" + name(plan_.kind) +
                   number("tile_rows", plan_.tile_rows) + number("unit_ctas", plan_.unit_ctas) +
                   number("row_groups", plan_.row_groups) + number("tf32", plan_.tf32));
  }

  int gates() const { return info(layer_.cell).gates; }
  bool tf32() const { return plan_.tf32; }
  bool persistent() const { return !in_steps(plan_.kind); }
  Memory memory() const { return info(layer_.cell).memory; }

  // Offsets of bytes that begin as zeros, if not `raw`: ask for those first.
  int64_t room(int64_t bytes, bool raw = false) {
    const int64_t at = total_;
    total_ += round_up(bytes, 256);
    if (!raw) zeros_ = total_;
    return at;
  }

  void allocate_rooms() {
    work_ = allocate({total_}, ScalarType::Byte, x_);
    base_ = static_cast<char*>(work_->data_ptr());
    check(fill_async(base_, 0, zeros_, stream_), "work memory");
    if (poisoning()) check(fill_async(base_ + zeros_, 0xff, total_ - zeros_, stream_), "poison");
  }

  char* at(int64_t room) const { return base_ + room; }

  // A tensor on x's device.
  Tensor empty(const Shape& shape, ScalarType dtype) const {
    Tensor t = allocate(shape, dtype, x_);
    const int64_t bytes = t.numel() * t.element_size();
    if (poisoning() && bytes) check(fill_async(t.data_ptr(), 0xff, bytes, stream_), "poison");
    return t;
  }
  Tensor empty(const Shape& shape) const { return empty(shape, x_.scalar_type()); }
  Tensor maybe(bool wanted, const Shape& shape) const { return empty(wanted ? shape : Shape{0}); }

  // What one step hands to the next, `values` of a row; halves: 2 if no launch lies between.
  struct Handed {
    int64_t room;
    Exchange exchange;
  };
  Handed exchange(int halves, int64_t row_bytes) {
    const int64_t rows = round_up(size_.steps.N, plan_.tile_rows);
    const int64_t half = size_.D * rows * row_bytes;
    return {room(halves * half), {nullptr, halves == 2 ? half : 0, rows, row_bytes}};
  }
  Exchange placed(const Handed& handed) const {
    Exchange e = handed.exchange;
    e.data = at(handed.room);
    return e;
  }

  // Weights (rows, columns) in rows of `padded` bytes, which begin as multiples of 16 do.
  struct Operand {
    const char* given;
    int64_t rows, bytes, padded, room;
  };
  Operand operand(const void* w, int64_t rows, int64_t columns) {
    const int64_t bytes = columns * bytes_of(layer_.dtype);
    const int64_t padded = row_bytes(layer_.dtype, columns);
    const bool as_it_is = bytes == padded && reinterpret_cast<uintptr_t>(w) % 16 == 0;
    return {static_cast<const char*>(w), rows, bytes, padded, as_it_is ? -1 : room(rows * padded)};
  }
  const char* placed(const Operand& w) const {
    if (w.room < 0) return w.given;
    copy_rows(at(w.room), w.padded, w.given, w.bytes, w.bytes, w.rows);
    return at(w.room);
  }

  void copy_rows(char* to, int64_t pitch, const void* from, int64_t from_pitch, int64_t bytes,
                 int64_t rows) const {
    check(copy_rows_async(to, pitch, from, from_pitch, bytes, rows, stream_), "copy");
  }

  // Counters for the CTAs of a grid to meet at.
  int64_t barrier_room() {
    const int64_t groups = plan_.kind == PlanKind::kGrid ? size_.D * plan_.row_groups : 0;
    return room(groups * kBarrierBytes);
  }
  // Packed data's sizes and offsets, (2, T + 1), for a persistent kernel.
  int64_t steps_room() {
    return room(persistent() && size_.steps.sizes ? 2 * (size_.steps.T + 1) * 8 : 0, true);
  }
  int64_t carry_room() {
    const bool carries = memory() != Memory::kNone;
    return room(carries ? size_.D * size_.steps.N * size_.H * compute_bytes(layer_.dtype) : 0,
                true);
  }

  // What both passes give to a kernel.
  RecurrenceParams params(const ForwardParams& given, int64_t barrier, int64_t steps,
                          int64_t carry) const {
    const Steps& host = size_.steps;
    RecurrenceParams p{};
    p.s_end = host.T;
    p.S = host.rows();
    p.N = host.N;
    p.H = size_.H;
    p.R = size_.R;
    p.D = size_.D;
    p.projection = layer_.projection;
    p.h0 = given.h0;
    p.c0 = given.c0;
    p.carry = at(carry);
    if (plan_.kind == PlanKind::kGrid) p.barrier = at(barrier);
    if (!persistent()) return p;
    p.steps = host;
    if (host.sizes) {
      std::vector<int64_t> both(2 * (host.T + 1));
      std::copy(host.sizes, host.sizes + host.T, both.begin());
      std::copy(host.offsets, host.offsets + host.T + 1, both.begin() + host.T + 1);
      check(upload_async(at(steps), both.data(), both.size() * 8, stream_), "batch_sizes");
      p.steps.sizes = reinterpret_cast<const int64_t*>(at(steps));
      p.steps.offsets = p.steps.sizes + host.T + 1;
    }
    return p;
  }

  void launch(const RecurrenceParams& p, const Product* second) const {
    Products products(x_, plan_.tf32);
    check(run_of(layer_.dtype, plan_.tf32)(layer_.cell, plan_, p, second, size_.steps, products,
                                           stream_),
          name(plan_.kind));
  }

 private:
  const Layer& layer_;
  const Tensor& x_;
  const LayerSizes& size_;
  const Guard guard_;
  void* stream_ = nullptr;
  Plan plan_{};
  int64_t total_ = 0, zeros_ = 0;
  std::optional<Tensor> work_;
  char* base_ = nullptr;
};

// x.W_ih of all steps, (S, D * G * H).
Tensor input_product(const Pass& pass, const Layer& layer, const Tensor& x) {
  const LayerSizes& s = layer.size;
  const int64_t height = pass.gates() * s.H;
  const Tensor rows = torch::stable::reshape(x, {s.steps.rows(), s.I});
  Tensors kept;
  const Matrix left = matrix_of(rows, kept);
  Matrix right{layer.weights[0].w_ih, s.I, height, s.I, true};
  if (s.D == 1) return product(left, right, pass.tf32(), x);
  const int64_t bytes = height * s.I * bytes_of(layer.dtype);
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
  STD_TORCH_CHECK(steps.T > 0, "x must have at least one time step");
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
  const int64_t barrier = pass.barrier_room(), on_device = pass.steps_room();
  const int64_t carry = pass.carry_room();
  pass.allocate_rooms();

  RecurrenceParams p = pass.params(given, barrier, on_device, carry);
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
    const int64_t bytes = s.R * bytes_of(layer.dtype);
    // Both halves: a row of packed data may begin at any step.
    for (int half = 0; given.h0 && half < (steps.sizes ? 2 : 1); ++half)
      pass.copy_rows(p.product.in.at(half, d, 0), width,
                     static_cast<const char*>(given.h0) + d * steps.N * bytes, bytes, bytes,
                     steps.N);
  }
  pass.launch(p, layer.projection ? &second : nullptr);
  return {y, h_n, c_n, gates, cells};
}

void check_saved(const Tensor& t, const Tensor& x, DType dtype, const Shape& shape,
                 const char* name) {
  STD_TORCH_CHECK(same_device(t, x) && t.is_contiguous() && t.scalar_type() == compute_dtype(dtype),
                  name, " must be as saved by recurrent_forward in training");
  check_shape(t, shape, name);
}

// One a direction, contiguous and 16-byte aligned.
const char* turned_weights(const Tensors& w, int d, const Tensor& x, const Shape& shape,
                           const char* name) {
  STD_TORCH_CHECK(static_cast<size_t>(d) < w.size(), name, " must hold one for each direction");
  check_like(w[d], x, name);
  check_shape(w[d], shape, name);
  const void* data = w[d].data_ptr();
  STD_TORCH_CHECK(w[d].is_contiguous() && reinterpret_cast<uintptr_t>(data) % 16 == 0, name,
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
  STD_TORCH_CHECK(N > 0, "there must be a row");
  STD_TORCH_CHECK(has_cell_state(layer) || (!dc0_too && !dc_n), "cell ", info(layer.cell).name,
                  " has no c0 or c_n to have a gradient");
  const ForwardParams given = lstm_fused::given<ForwardParams>(layer, x, state0);
  check_like(y, x, "y");
  check_shape(y, output_shape(layer, x), "y");
  check_saved(gates, x, layer.dtype, gates_shape(layer), "gates");
  check_saved(cells, x, layer.dtype, cells_shape(layer), "cells");
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
  const int64_t barrier = pass.barrier_room(), on_device = pass.steps_room();
  const int64_t carry = pass.carry_room();
  pass.allocate_rooms();

  RecurrenceParams p = pass.params(given, barrier, on_device, carry);
  // A step past the end where the initial state's gradients are wanted.
  p.s_end += dh0_too || dc0_too;
  p.gates = gates.data_ptr();
  if (pass.memory() != Memory::kNone) p.cells = cells.data_ptr();
  const auto shaped = [&](const MaybeTensor& t, Shape shape, const char* name) -> const void* {
    if (!t) return nullptr;
    check_like(*t, x, name);
    check_shape(*t, shape, name);
    return layer.keep(*t).data_ptr();
  };
  p.dy = shaped(dy, output_shape(layer, x), "dy");
  p.dh_n = shaped(dh_n, {s.D, N, s.R}, "dh_n");
  p.dc_n = shaped(dc_n, {s.D, N, s.H}, "dc_n");
  p.d_gates = d_gates.data_ptr();
  if (batch_sizes) {
    p.h = layer.keep(y).data_ptr();
    p.before = before.data_ptr();
  }
  if (dh0_too) p.dh0 = dh0.data_ptr();
  if (dc0_too) p.dc0 = dc0.data_ptr();
  const int64_t each = hidden_row / bytes_of(layer.dtype);
  p.product = {{}, layer.projection ? s.R : s.H, pass.placed(of_gates), pass.placed(of_h)};
  Product second{{}, s.H, p.product.out, p.product.in};
  for (int d = 0; d < s.D; ++d) {
    p.product.a[d] = turned_weights(w_hh_t, d, x, {s.R, pass.gates() * each}, "w_hh_t");
    if (layer.projection)
      second.a[d] = turned_weights(w_hr_t, d, x, {s.H, width / bytes_of(layer.dtype)}, "w_hr_t");
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
      "Tensor[] w_hh_t, Tensor[] w_hr_t, Tensor y, Tensor gates, Tensor cells, Tensor? dy, Tensor? "
      "dh_n, "
      "Tensor? dc_n, int cell, int directions, bool dh0_too, bool dc0_too, bool tf32, str kind) "
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
