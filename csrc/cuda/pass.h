// A pass over a layer on a CUDA device: its plan, the memory it works in, and the products that
// cuBLAS takes. What the operators have in common.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <mutex>

#include "../layer.h"
#include "../poison.h"
#include "blas.h"
#include "device.h"
#include "kernels.h"
#include "runtime.h"

namespace lstm_fused::cuda {

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

inline void check(const char* error, const char* what) {
  LSTM_FUSED_CHECK(error == nullptr, "lstm_fused, ", what, ": ", error);
}

inline Run* run_of(DType dtype, bool tf32) {
  switch (dtype) {
    case DType::kFloat32: return tf32 ? run_tf32 : run_float32;
    case DType::kFloat64: return run_float64;
    case DType::kBFloat16: return run_bfloat16;
    case DType::kFloat16: return run_float16;
  }
  return nullptr;
}

// Asked once for each device: the driver takes its time.
inline Device device_of(int index) {
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

inline LastRun& last_run() {
  static LastRun last;
  return last;
}

inline PlanKind kind_named(const std::string& wanted) {
  for (int kind = 0; kind < kPlanKinds; ++kind)
    if (wanted == name(static_cast<PlanKind>(kind))) return static_cast<PlanKind>(kind);
  refuse("no such plan: ", wanted);
}

// t's memory, of a copy if neither its rows nor its columns are contiguous.
inline Matrix matrix_of(const Tensor& t, Tensors& kept) {
  const int64_t rows = t.size(0), columns = t.size(1);
  // What lies `stride` apart holds `length` values; the stride of a single one may be anything.
  const auto runs = [](int64_t count, int64_t stride, int64_t length, int64_t inner) {
    return (length == 1 || inner == 1) && (count == 1 || stride >= length);
  };
  if (runs(rows, t.stride(0), columns, t.stride(1)))
    return {t.data_ptr(), rows, columns, rows == 1 ? columns : t.stride(0), false};
  if (runs(columns, t.stride(1), rows, t.stride(0)))
    return {t.data_ptr(), rows, columns, columns == 1 ? rows : t.stride(1), true};
  kept.push_back(as_contiguous(t));
  return {kept.back().data_ptr(), rows, columns, columns, false};
}

// a (n, k) b (k, m) on the device of `like`, accumulated and given in the compute dtype.
inline Tensor product(const Matrix& a, const Matrix& b, bool tf32, const Tensor& like) {
  const DType dtype = dtype_of(like, "x");
  Tensor out = allocate({a.rows, b.columns}, compute_dtype(dtype), like);
  LSTM_FUSED_CHECK(has_cublas(), "lstm_fused: torch came without cuBLAS of CUDA 12 or later");
  void* library = nullptr;
  LSTM_FUSED_CHECK(torch_get_current_cuda_blas_handle(&library) == TORCH_SUCCESS,
                   "torch has no cuBLAS handle for this device");
  check(multiply(library, dtype, tf32, a, b, out.data_ptr()), "cuBLAS");
  return out;
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
    LSTM_FUSED_CHECK(
        aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream_) == TORCH_SUCCESS,
        "torch has no current stream for device ", x.get_device_index());
#endif
    tf32 = tf32 && layer.dtype == DType::kFloat32;
    const Device device = device_of(x.get_device_index());
    LSTM_FUSED_CHECK(supported(device),
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
                   " dtype=" + lstm_fused::name(layer.dtype) + " kernel=" + name(plan_.kind) +
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

  // What was asked for, and what every pass works in.
  void allocate_rooms() {
    const Steps& steps = size_.steps;
    // Counters for the CTAs of a grid to meet at.
    const int64_t groups = plan_.kind == PlanKind::kGrid ? size_.D * plan_.row_groups : 0;
    barrier_ = room(groups * kBarrierBytes);
    // Packed data's sizes and offsets, (2, T + 1), for a persistent kernel.
    steps_ = room(persistent() && steps.sizes ? 2 * (steps.T + 1) * 8 : 0, true);
    const int64_t states = memory() != Memory::kNone ? size_.D * steps.N * size_.H : 0;
    carry_ = room(states * compute_bytes(layer_.dtype), true);
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

  // What one step hands to the next, a row for each of the batch; halves: 2 if no launch lies
  // between.
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
    const int64_t bytes = columns * storage_bytes(layer_.dtype);
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

  // What both passes give to a kernel.
  RecurrenceParams params(const ForwardParams& given) const {
    const Steps& host = size_.steps;
    RecurrenceParams p{};
    p.s_end = host.T;
    p.N = host.N;
    p.H = size_.H;
    p.R = size_.R;
    p.D = size_.D;
    p.projection = layer_.projection;
    p.h0 = given.h0;
    p.c0 = given.c0;
    p.carry = at(carry_);
    if (plan_.kind == PlanKind::kGrid) p.barrier = at(barrier_);
    if (!persistent()) return p;
    p.steps = host;
    if (host.sizes) {
      std::vector<int64_t> both(2 * (host.T + 1));
      std::copy(host.sizes, host.sizes + host.T, both.begin());
      std::copy(host.offsets, host.offsets + host.T + 1, both.begin() + host.T + 1);
      check(upload_async(at(steps_), both.data(), both.size() * 8, stream_), "batch_sizes");
      p.steps.sizes = reinterpret_cast<const int64_t*>(at(steps_));
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
  int64_t barrier_ = 0, steps_ = 0, carry_ = 0;  // rooms
  std::optional<Tensor> work_;
  char* base_ = nullptr;
};

}  // namespace lstm_fused::cuda
