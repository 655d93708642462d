// A module's step for real time: planned once, with memory of its own, so that a step allocates
// nothing. Neither torch nor Python is here: a thread that knows neither of them runs steps, too.
#pragma once

#include <atomic>
#include <vector>

#include "launch.h"

namespace lstm_fused {

// The states of all layers, twice: a step reads one copy and writes the other. Owned by the caller,
// in the layers' dtype.
struct StreamStates {
  void* h;  // (2, L, N, R)
  void* c;  // (2, L, N, H), or null without a cell state
};

class Stream {
 public:
  // The layers of one direction, as described for a step, T = 1, of N rows without states. What
  // they point to must outlive the stream or its next call of set_layers. threads: at most so many.
  Stream(std::vector<Layer> layers, const StreamStates& states, int threads);

  // Both return false, having done nothing, while another thread runs a step.

  // Other weights of the same sizes; the states stay.
  bool set_layers(std::vector<Layer> layers);

  // x (N, I), with stride_n elements from row to row; y (N, R), contiguous. They overlap neither
  // each other nor the states.
  bool step(const void* x, int64_t stride_n, void* y);

  // Which copy of the states the next step reads, 0 or 1.
  int current() const { return current_; }
  const Layer& layer(size_t k) const { return layers_[k]; }
  size_t count() const { return layers_.size(); }
  // Multiply-adds of a step.
  int64_t products() const;

 private:
  struct Call {
    ForwardParams params;
    PlannedForward planned;
  };

  // Runs f unless the stream is in use.
  template <class F>
  bool exclusively(const F& f) {
    if (busy_.test_and_set(std::memory_order_acquire)) return false;
    struct Done {
      std::atomic_flag& busy;
      ~Done() { busy.clear(std::memory_order_release); }
    } done{busy_};
    f();
    return true;
  }

  void plan();
  void run_layers(const void* x, int64_t stride_n, void* y);

  std::vector<Layer> layers_;
  const StreamStates states_;
  const int threads_;
  std::vector<Call> calls_;  // of each layer
  Isa isa_;                  // that they are planned for
  Scratch scratch_;
  int current_ = 0;
  int64_t steps_ = 0;
  std::atomic_flag busy_;
};

// A step for callers from C: handle is a Stream's address, x (N, I) and y (N, R) are contiguous.
// Returns 0, or another number where nothing was computed: 1 if another thread runs a step, 2 if
// there is no memory left to plan for another ISA.
extern "C" using StreamStep = int(void* handle, const void* x, void* y);
StreamStep stream_step;

}  // namespace lstm_fused
