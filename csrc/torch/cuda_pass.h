// A pass over a layer on a CUDA device: its plan, its workspace, the kernels' parameters.
#pragma once

#include "../layer.h"
#include "cuda_settings.h"
#include "cuda_workspace.h"

namespace lstm_fused::cuda {

// x as a matrix (S, I); operators.h sees to it that all rows are one stride apart.
inline Matrix input_of(const Layer& layer) {
  const LayerSizes& s = layer.size;
  const int64_t rows = s.steps.rows();
  const int64_t stride = s.steps.sizes || s.steps.N > 1 ? layer.x.stride_n : layer.x.stride_t;
  return {layer.x.data, rows, s.I, rows == 1 ? s.I : stride, false};
}

class Pass {
 public:
  // in_parts: whether some steps are launched at a time.
  Pass(const Layer& layer, const Tensor& x, bool backward, bool in_parts = false)
      : layer_(layer),
        x_(x),
        size_(layer.size),
        guard_(x.get_device_index()),
        stream_(stream_of(x)) {
    LSTM_FUSED_CHECK(!layer.size.steps.starts, "batch_sizes has shape (1, ", layer.size.steps.N + 1,
                     "), cu_seqlens of documents, but on a CUDA device it must be the (T,) of "
                     "packed data");
    LSTM_FUSED_CHECK(static_cast<int>(layer.cell) < kCellCount, "cell ", cell().name,
                     " has no CUDA kernels");
    plan_ = choose_plan(backward, in_parts);
    last_run().set({layer.dtype, plan_});
  }

  const CellInfo& cell() const { return info(layer_.cell); }
  int gates() const { return cell().gates; }
  // Those whose rows of w_hh multiply the hidden state: the last one may multiply an operand.
  int hidden_gates() const { return cell().gates - cell().operand; }
  // Whether a step has a second product.
  bool has_two_products() const { return layer_.projection || cell().operand; }
  bool tf32() const { return plan_.tf32; }
  // Whether steps have a product with w_hh.
  bool recurs() const { return size_.K > 0; }
  void* stream() const { return stream_; }

  // A tensor on x's device.
  Tensor empty(const Shape& shape, ScalarType dtype) const {
    Tensor t = lstm_fused::allocate(shape, dtype, x_);
    const int64_t bytes = t.numel() * t.element_size();
    if (poisoning() && bytes) check(fill_async(t.data_ptr(), 0xff, bytes, stream_), "poison");
    return t;
  }
  Tensor empty(const Shape& shape) const { return empty(shape, x_.scalar_type()); }

  // A buffer that one step writes and the next reads, a row for each of the batch; buffers: 2 if no
  // launch lies between writing and reading (double buffering).
  struct ExchangeSlot {
    Workspace::Slot slot;
    Exchange exchange;
  };
  ExchangeSlot reserve_exchange(int buffers, int64_t row_bytes) {
    const int64_t rows = round_up(size_.steps.N, plan_.tile_rows);
    const int64_t one = size_.D * rows * row_bytes;
    return {workspace_.reserve_zeros(buffers * one),
            {nullptr, buffers == 2 ? one : 0, rows, row_bytes}};
  }
  Exchange resolve(const ExchangeSlot& reserved) const {
    Exchange e = reserved.exchange;
    e.data = workspace_.at(reserved.slot);
    return e;
  }

  // Weights (rows, columns) whose rows begin at multiples of 16 bytes: in place, or a padded
  // copy.
  struct OperandSlot {
    const char* given;
    int64_t rows, bytes, padded;
    Workspace::Slot slot;  // -1: no copy
  };
  OperandSlot reserve_operand(const void* w, int64_t rows, int64_t columns) {
    const int64_t bytes = columns * storage_bytes(layer_.dtype);
    const int64_t padded = row_bytes(layer_.dtype, columns);
    const bool usable = bytes == padded && reinterpret_cast<uintptr_t>(w) % 16 == 0;
    return {static_cast<const char*>(w), rows, bytes, padded,
            usable ? -1 : workspace_.reserve_zeros(rows * padded)};
  }
  const char* resolve(const OperandSlot& w) const {
    if (w.slot < 0) return w.given;
    copy_rows(workspace_.at(w.slot), w.padded, w.given, w.bytes, w.bytes, w.rows);
    return workspace_.at(w.slot);
  }

  // Sums in the compute dtype for every row, `width` wide, which start as zeros.
  Workspace::Slot reserve_sums(int64_t width) {
    const int64_t values = size_.D * size_.steps.N * width;
    return workspace_.reserve_zeros(values * compute_bytes(layer_.dtype));
  }
  void* resolve_sums(Workspace::Slot slot) const { return workspace_.at(slot); }

  // Makes the workspace, with what every pass needs beside what was reserved.
  void allocate() {
    const Steps& steps = size_.steps;
    const int64_t groups = plan_.kind == PlanKind::kGrid ? size_.D * plan_.row_groups : 0;
    barrier_ = workspace_.reserve_zeros(groups * kBarrierBytes);
    // Packed data's sizes and offsets, (2, T + 1), for a launch of several steps.
    steps_ = workspace_.reserve(has_one_launch() && steps.sizes ? 2 * (steps.T + 1) * 8 : 0);
    const int64_t bytes = compute_bytes(layer_.dtype);
    const int64_t states = size_.D * steps.N * cell().carried() * size_.H;
    carry_ = workspace_.reserve(states * bytes);
    const int64_t units = size_.D * steps.N * size_.H;
    between_ = workspace_.reserve(cell().operand ? units * cell().preacts * bytes : 0);
    workspace_.allocate(x_, stream_);
  }

  void copy_rows(void* to, int64_t pitch, const void* from, int64_t from_pitch, int64_t bytes,
                 int64_t rows) const {
    check(copy_rows_async(to, pitch, from, from_pitch, bytes, rows, stream_), "copy");
  }

  // What both passes give to a kernel.
  RecurrenceParams params() const {
    const Steps& host = size_.steps;
    RecurrenceParams p{};
    p.s_end = host.T;
    p.N = host.N;
    p.H = size_.H;
    p.R = size_.R;
    p.D = size_.D;
    p.projection = layer_.projection;
    p.cell_states = size_.cell_states;
    p.y_width = size_.y_width();
    p.state_rows = size_.state_rows();
    p.resets = host.resets;
    p.h0 = layer_.h0;
    p.c0 = layer_.c0;
    for (int d = 0; d < size_.D; ++d) {
      p.vectors[d] = layer_.weights[d].vectors;
      p.masks[d] = layer_.weights[d].masks;
    }
    p.carry = workspace_.at(carry_);
    p.between = workspace_.at(between_);
    if (plan_.kind == PlanKind::kGrid) p.barrier = workspace_.at(barrier_);
    if (!has_one_launch()) return p;
    p.steps = host;
    if (host.sizes) {
      std::vector<int64_t> both(2 * (host.T + 1));
      std::copy(host.sizes, host.sizes + host.T, both.begin());
      std::copy(host.offsets, host.offsets + host.T + 1, both.begin() + host.T + 1);
      check(upload_async(workspace_.at(steps_), both.data(), both.size() * 8, stream_),
            "batch_sizes");
      p.steps.sizes = reinterpret_cast<const int64_t*>(workspace_.at(steps_));
      p.steps.offsets = p.steps.sizes + host.T + 1;
    }
    return p;
  }

  void launch(const RecurrenceParams& p, const Product* second) {
    if (launched_ && plan_.kind == PlanKind::kGrid)
      check(fill_async(p.barrier, 0, size_.D * plan_.row_groups * kBarrierBytes, stream_),
            "barrier");
    launched_ = true;
    StepProducts products(layer_.dtype, plan_.tf32, x_);
    Launcher* const launch = launcher_of(layer_.cell, arithmetic_of(layer_.dtype, plan_.tf32));
    check(launch(plan_, p, second, size_.steps, products, stream_), name(plan_.kind));
  }

 private:
  // Whether all steps are one launch: of a persistent plan, or of a cell whose units see nothing of
  // each other's steps. A CUDA graph cannot copy packed data's sizes to the device.
  bool has_one_launch() const {
    if (!is_stepwise(plan_.kind)) return true;
    return !recurs() && cell().groups == 0 && !(size_.steps.sizes && is_capturing(stream_));
  }

  Plan choose_plan(bool backward, bool in_parts) const {
    const Device device = device_of(x_.get_device_index());
    LSTM_FUSED_CHECK(supported(device),
                     "the fused kernels need compute capability 8.0 or later, not ", device.major,
                     ".", device.minor);
    const bool tf32 = layer_.dtype == DType::kFloat32 && tf32_allowed();
    const Steps& steps = size_.steps;
    const Problem problem{layer_.dtype, steps.T,          steps.N,          size_.H,
                          size_.R,      size_.D,          gates(),          layer_.projection,
                          tf32,         cell().described, cell().groups > 0};
    // A CUDA graph cannot copy packed data's sizes to the device, as persistent plans need them.
    const bool stepwise = steps.sizes && is_capturing(stream_);
    const std::optional<PlanKind> kind = forced_kind().get();
    const Plan plan = !kind || (stepwise && !is_stepwise(*kind))
                          ? make_plan(problem, device, backward, stepwise)
                          : forced_plan(*kind, problem, device, backward);
    // What a cluster exchanges is in its shared memory, where the next launch does not find it. A
    // forward pass begins from a checkpoint.
    if (plan.kind == PlanKind::kCluster && backward && in_parts)
      return forced_plan(PlanKind::kGrid, problem, device, backward);
    return plan;
  }

  const Layer& layer_;
  const Tensor& x_;
  const LayerSizes& size_;
  const Guard guard_;
  void* const stream_;
  Plan plan_{};
  bool launched_ = false;
  Workspace workspace_;
  Workspace::Slot barrier_ = 0, steps_ = 0, carry_ = 0, between_ = 0;
};

}  // namespace lstm_fused::cuda
