#include "launch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

#include "checkpoints.h"
#include "load.h"
#include "team.h"
#include "topology.h"

namespace lstm_fused {
namespace {

thread_local Run last;

thread_local Scratch scratch;

Isa checked_isa(const std::string& wanted, const std::string& where) {
  std::string known;
  for (int i = 0; i < kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    known += std::string(i ? ", " : "") + name(isa);
    if (wanted != name(isa)) continue;
    if (runs(isa)) return isa;
    throw std::runtime_error(where + " is '" + wanted + "', which this machine cannot run");
  }
  throw std::runtime_error(where + " is '" + wanted + "' but must be one of " + known);
}

Isa isa_of_environment() {
  const char* wanted = std::getenv("LSTM_FUSED_ISA");
  return wanted && *wanted ? checked_isa(wanted, "LSTM_FUSED_ISA") : best_isa();
}

std::atomic<int> forced_isa{-1};

bool fixed_plans() {
  static const bool fixed = [] {
    const char* set = std::getenv("LSTM_FUSED_FIXED_PLANS");
    return set && std::strcmp(set, "1") == 0;
  }();
  return fixed;
}

LoadEstimate load;

// Tells the estimate what a call lost to other programs.
class CallWatch {
 public:
  explicit CallWatch(const Plan& plan)
      : threads_(fixed_plans() ? 0 : plan.threads), clocked_(plan.nanoseconds > kClocked) {
    observe_team(threads_ > 1 && clocked_);
    if (threads_ > 1) begin_ = nanoseconds_now();
  }
  void note() const {
    if (threads_ == 0) return;
    if (threads_ == 1) return load.note(1, 0, {}, 0);
    const int64_t now = nanoseconds_now(), taken = now - begin_;
    const TeamLoss short_loss = taken > 2 * kLateness ? TeamLoss{taken, 1} : TeamLoss{};
    load.note(threads_, taken, clocked_ ? observed_loss() : short_loss, now);
  }

 private:
  // Reading the CPU time of a thread twice costs nearly a microsecond. A shorter call that lost a
  // time slice is known by its length.
  static constexpr int64_t kClocked = 100'000;

  const int threads_;
  const bool clocked_;
  int64_t begin_ = 0;
};

template <class Params, class MakePlan, class Bytes, class Call>
void launch_pass(const Problem& problem, Params& params, Pass pass, MakePlan make_plan, Bytes bytes,
                 Call call) {
  for (int threads = usable_threads();; threads = 1) {
    const Plan plan = make_plan(problem, machine_for(threads));
    const Kernel& kernel = kernel_for(plan.isa, problem.cell, problem.dtype);
    params.unit = kernel.unit;
    params.scratch = scratch.of(static_cast<size_t>((kernel.*bytes)(params, plan)) + 64);
    const CallWatch watch(plan);
    const bool ran = (kernel.*call)(params, plan);
    scratch.done();
    if (!ran) continue;
    watch.note();
    last = {pass, plan};
    return;
  }
}

void launch_from_checkpoints(const Problem& problem, const BackwardParams& params) {
  for (int threads = usable_threads();; threads = 1) {
    const Machine machine = machine_for(threads);
    const Plan forward = plan_forward(problem, machine), backward = plan_backward(problem, machine);
    const bool ran = backward_from_checkpoints(problem, forward, backward, params, scratch);
    scratch.done();
    if (!ran) continue;
    last = {Pass::kBackward, backward};
    return;
  }
}

}  // namespace

Problem problem_of(const Layer& layer, bool training) {
  const LayerSizes& size = layer.size;
  const Steps& steps = size.steps;
  const bool packed = steps.sizes != nullptr;
  const int64_t hidden_inputs = layer.projection ? size.R : size.K;
  return {layer.cell, layer.dtype,      steps.T,  steps.N, size.I, size.H,      hidden_inputs,
          size.D,     layer.projection, training, false,   packed, layer.format};
}

void launch(const Problem& problem, ForwardParams& params) {
  static thread_local int64_t calls = 0;
  params.calls = calls++;
  launch_pass(problem, params, Pass::kForward, plan_forward, &Kernel::forward_scratch,
              &Kernel::forward);
}

void launch(const Problem& problem, BackwardParams& params) {
  if (params.checkpoints) return launch_from_checkpoints(problem, params);
  launch_pass(problem, params, Pass::kBackward, plan_backward, &Kernel::backward_scratch,
              &Kernel::backward);
}

void launch(const Problem& problem, TangentParams& params) {
  launch_pass(problem, params, Pass::kTangent, plan_forward, &Kernel::tangent_scratch,
              &Kernel::tangent);
}

PlannedForward::PlannedForward(const Problem& problem, const ForwardParams& params, int threads)
    : own_(planned(problem, params, threads)), single_(planned(problem, params, 1)) {}

PlannedForward::Planned PlannedForward::planned(const Problem& problem, const ForwardParams& params,
                                                int threads) {
  const Plan plan = plan_forward(problem, machine_for(threads));
  const Kernel& kernel = kernel_for(plan.isa, problem.cell, problem.dtype);
  ForwardParams sized = params;
  sized.unit = kernel.unit;
  return {plan, &kernel, static_cast<size_t>(kernel.forward_scratch(sized, plan)) + 64};
}

void PlannedForward::run(ForwardParams& params, Scratch& scratch) const {
  const Planned* planned = own_.plan.threads > usable_threads() ? &single_ : &own_;
  params.unit = planned->kernel->unit;
  params.scratch = scratch.of(planned->bytes);
  if (!planned->kernel->forward(params, planned->plan)) {
    planned = &single_;
    planned->kernel->forward(params, planned->plan);
  }
  last = {Pass::kForward, planned->plan};
}

namespace {

template <class Params>
struct Calls {
  const Problem& problem;
  std::vector<Params>& each;
  int threads;
  std::atomic<bool> out_of_memory{false};

  void run(int worker) {
    try {
      for (size_t i = worker; i < each.size(); i += threads) launch(problem, each[i]);
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
  }
};

template <class Params>
void launch_all(const Problem& problem, std::vector<Params>& each) {
  const int threads = usable_threads();
  Calls<Params> calls{problem, each, threads};
  const bool enough = threads > 1 && each.size() >= static_cast<size_t>(threads);
  if (!enough ||
      !run_team(threads, [](void* c, int i) { static_cast<Calls<Params>*>(c)->run(i); }, &calls)) {
    for (Params& params : each) launch(problem, params);
  }
  if (calls.out_of_memory) throw std::bad_alloc();
}

}  // namespace

void launch_each(const Problem& problem, std::vector<ForwardParams>& calls) {
  launch_all(problem, calls);
}

void launch_each(const Problem& problem, std::vector<BackwardParams>& calls) {
  launch_all(problem, calls);
}

void launch_each(const Problem& problem, std::vector<TangentParams>& calls) {
  launch_all(problem, calls);
}

Machine machine_for(int threads) {
  Machine machine{current_isa(), threads};
  if (fixed_plans()) return machine;
  machine.topology = topology();
  if (load.limits(threads)) {
    const int64_t now = nanoseconds_now();
    if (load.tries(threads, now) && idle_cpus("") < load.undisturbed(threads, now))
      load.put_off(now);
    const int undisturbed = load.undisturbed(threads, now);
    machine.undisturbed = undisturbed < threads ? undisturbed : 0;
  }
  return machine;
}

const Run& last_run() {
  return last;
}

Isa current_isa() {
  static const Isa automatic = isa_of_environment();
  const int forced = forced_isa.load(std::memory_order_relaxed);
  return forced >= 0 ? static_cast<Isa>(forced) : automatic;
}

void force_isa(const std::string& wanted) {
  forced_isa.store(wanted.empty() ? -1 : static_cast<int>(checked_isa(wanted, "isa")));
}

}  // namespace lstm_fused
