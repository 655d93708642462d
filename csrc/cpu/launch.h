// From a problem to a kernel that ran: plans, scratch memory, the call. No torch here, so that
// the operators (torch/operators.cpp) and the fast path for inference (torch/inference.cpp) share
// it.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "../layer.h"
#include "../poison.h"
#include "kernels.h"
#include "scratch.h"

namespace lstm_fused {

// Sizes of the call for the plan.
Problem problem_of(const Layer& layer, bool training);

// Plans and runs a pass, on one thread if the OpenMP runtime grants no more. params.scratch is set
// for the call. Throws std::bad_alloc.
void launch(const Problem& problem, ForwardParams& params);
void launch(const Problem& problem, BackwardParams& params);
void launch(const Problem& problem, TangentParams& params);  // float32 and float64

// A forward pass that is planned once and runs many times, with other pointers each time. It does
// not look at what else the machine does.
class PlannedForward {
 public:
  // params: as in the calls to come, of which only sizes and whether a pointer is null matter.
  PlannedForward(const Problem& problem, const ForwardParams& params, int threads);

  // Bytes of scratch memory.
  size_t scratch_bytes() const { return std::max(own_.bytes, single_.bytes); }

  // As launch, with scratch memory of the caller. It allocates nothing and throws nothing.
  void run(ForwardParams& params, Scratch& scratch) const;

 private:
  struct Planned {
    Plan plan;
    const Kernel* kernel;
    size_t bytes;
  };
  static Planned planned(const Problem& problem, const ForwardParams& params, int threads);

  Planned own_, single_;  // single_: where the OpenMP runtime grants one thread only
};

// Several calls of one problem: each by one thread where there are enough of them, else one after
// the other by all threads.
void launch_each(const Problem& problem, std::vector<ForwardParams>& calls);
void launch_each(const Problem& problem, std::vector<BackwardParams>& calls);
void launch_each(const Problem& problem, std::vector<TangentParams>& calls);

// What ran last on this thread.
enum class Pass : int { kForward, kBackward, kTangent };
struct Run {
  Pass pass;
  std::optional<Plan> plan;  // none before any call
};
const Run& last_run();

// What a call on at most so many threads would be planned for now. Where LSTM_FUSED_FIXED_PLANS is
// 1, every thread is taken to have a core of its own, so that plans depend on the call alone.
Machine machine_for(int threads);

// The ISA of coming calls: the forced one, or the best this machine has. Both throw
// std::runtime_error for a name that is unknown or that this machine cannot run, which
// LSTM_FUSED_ISA may hold too.
Isa current_isa();
void force_isa(const std::string& name);  // empty: the best one again

}  // namespace lstm_fused
