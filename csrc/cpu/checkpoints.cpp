#include "checkpoints.h"

#include <algorithm>
#include <type_traits>

#include "arena.h"

namespace lstm_fused {
namespace {

template <class T>
T* forward_by(T* data, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return data ? static_cast<Byte*>(data) + bytes : nullptr;
}

class Checkpoints {
 public:
  Checkpoints(const Problem& problem, const Plan& forward, const Plan& backward,
              const BackwardParams& params, Scratch& scratch)
      : problem_(problem),
        plans_{forward, backward},
        kernels_{&kernel_for(forward.isa, problem.cell, problem.dtype),
                 &kernel_for(backward.isa, problem.cell, problem.dtype)},
        p_(params),
        scratch_(scratch),
        size_(params.size),
        stored_(storage_bytes(problem.dtype)),
        computed_(compute_bytes(problem.dtype)) {}

  bool run() {
    const int64_t every = p_.checkpoint_every, count = ceil_div(size_.steps.T, every);
    static thread_local Scratch kept;
    {
      Arena counted(nullptr);
      reserve(counted);
      Arena arena(kept.of(static_cast<size_t>(counted.used())));
      reserve(arena);
    }
    bool ran = true;
    for (int d = 0; d < size_.D && ran; ++d)
      for (int64_t i = 0; i < count && ran; ++i)
        ran = run_part(d, d == 0 ? count - 1 - i : i, i, count);
    kept.done();
    return ran;
  }

 private:
  void reserve(Arena& arena) {
    const int64_t rows = std::min(p_.checkpoint_every, size_.steps.T) * size_.steps.N;
    const int64_t lanes = size_.D * size_.blocks() * rows * kBlock;
    const int64_t states = size_.D * size_.steps.N;
    const CellInfo& cell = info(problem_.cell);
    const int64_t carried = cell.carried() * size_.H;
    const auto take = [&](int64_t bytes) -> void* { return arena.take<char>(bytes); };
    gates_ = take(lanes * cell.preacts * computed_);
    saved_states_ = cell.saved() == 0 ? nullptr : take(lanes * cell.saved() * computed_);
    y_ = take(rows * size_.D * size_.R * stored_);
    h_n_ = take(states * size_.R * stored_);
    c_n_ = cell.cells > 0 ? take(states * size_.cell_width() * stored_) : nullptr;
    for (void*& ends : between_) ends = take(states * (size_.R + carried) * computed_);
    BackwardParams params = p_;
    params.lasting = &params;  // asked for: there is none yet
    params.unit = kernels_[1]->unit;
    lasting_ = take(kernels_[1]->backward_lasting(params, plans_[1]));
  }

  // Steps [part * every, (part + 1) * every), the i-th part of `count` in direction d.
  bool run_part(int d, int64_t part, int64_t i, int64_t count) {
    const Steps& all = size_.steps;
    const int64_t every = p_.checkpoint_every, begin = part * every;
    const int64_t end = std::min(begin + every, all.T), row = begin * all.N;
    BackwardParams p = p_;
    p.checkpoints = nullptr;
    p.unit = kernels_[1]->unit;
    const int64_t mask_bytes = info(problem_.cell).masks * size_.H * stored_;
    for (Weights& w : p.weights) w.masks = forward_by(w.masks, row * mask_bytes);
    p.size.only = d + 1;
    p.size.steps.T = end - begin;
    p.size.steps.resets = all.resets ? all.resets + row : nullptr;
    p.size.steps.continues = end < all.T;
    p.x.data = forward_by(p.x.data, begin * p.x.stride_t * stored_);
    const int64_t before = d == 0 ? part - 1 : part;  // the checkpoint where the part begins
    if (before >= 0 && before < count - 1)
      p.resume = forward_by(p_.checkpoints,
                            before * size_.D * all.N * size_.checkpoint_width() * computed_);
    ForwardParams f{};
    f.size = p.size;
    f.size.cell_states = false;
    f.x = p.x;
    f.h0 = p.h0;
    f.c0 = p.c0;
    f.weights[0] = p.weights[0];
    f.weights[1] = p.weights[1];
    f.unit = kernels_[0]->unit;
    f.resume = p.resume;
    f.y = y_;
    f.h_n = h_n_;
    f.c_n = c_n_;
    f.gates = gates_;
    f.saved_states = saved_states_;
    if (!call(f, 0, &Kernel::forward_scratch, &Kernel::forward)) return false;
    p.y = forward_by(p.y, row * size_.y_width() * stored_);
    p.dy = forward_by(p.dy, row * size_.y_width() * stored_);
    p.dx = forward_by(p.dx, row * size_.I * stored_);
    p.d_preacts =
        forward_by(p.d_preacts, row * size_.D * info(problem_.cell).preacts * size_.H * computed_);
    p.gates = gates_;
    p.saved_states = saved_states_;
    p.lasting = lasting_;
    p.continued = i > 0;
    p.unfinished = i < count - 1;
    p.d_after = p.continued ? between_[i % 2] : nullptr;
    p.d_before = p.unfinished ? between_[(i + 1) % 2] : nullptr;
    p.add_dx = d > 0;
    return call(p, 1, &Kernel::backward_scratch, &Kernel::backward);
  }

  template <class Params, class Bytes, class Run>
  bool call(Params& params, int pass, Bytes bytes, Run run) {
    const Kernel& kernel = *kernels_[pass];
    params.scratch = scratch_.of(static_cast<size_t>((kernel.*bytes)(params, plans_[pass])) + 64);
    return (kernel.*run)(params, plans_[pass]);
  }

  const Problem& problem_;
  const Plan plans_[2];  // of the forward pass, of the backward pass
  const Kernel* const kernels_[2];
  const BackwardParams& p_;
  Scratch& scratch_;
  const LayerSizes& size_;
  const int64_t stored_, computed_;  // bytes of a value
  // One part's, as in ForwardParams; then the gradients of the states at its two ends.
  void *gates_, *saved_states_, *y_, *h_n_, *c_n_, *between_[2], *lasting_;
};

}  // namespace

bool backward_from_checkpoints(const Problem& problem, const Plan& forward, const Plan& backward,
                               const BackwardParams& params, Scratch& scratch) {
  return Checkpoints(problem, forward, backward, params, scratch).run();
}

}  // namespace lstm_fused
