#include "stream.h"

#include <utility>

namespace lstm_fused {

Stream::Stream(std::vector<Layer> layers, const StreamStates& states, int threads)
    : layers_(std::move(layers)), states_(states), threads_(threads) {
  plan();
}

bool Stream::set_layers(std::vector<Layer> layers) {
  return exclusively([&] {
    std::swap(layers_, layers);
    try {
      plan();
    } catch (...) {
      std::swap(layers_, layers);
      throw;
    }
  });
}

void Stream::plan() {
  std::vector<Call> calls;
  const Isa isa = current_isa();
  size_t bytes = 0;
  for (const Layer& layer : layers_) {
    ForwardParams p = params_of<ForwardParams>(layer);
    p.h0 = states_.h;  // not null, as in every step
    p.c0 = states_.c;
    const Problem problem = problem_of(layer, false);
    calls.push_back({p, PlannedForward(problem, p, threads_)});
    bytes = std::max(bytes, calls.back().planned.scratch_bytes());
  }
  scratch_.of(bytes);
  calls_ = std::move(calls);
  isa_ = isa;
}

bool Stream::step(const void* x, int64_t stride_n, void* y) {
  return exclusively([&] {
    if (current_isa() != isa_) plan();
    run_layers(x, stride_n, y);
    current_ ^= 1;
    ++steps_;
  });
}

void Stream::run_layers(const void* x, int64_t stride_n, void* y) {
  const int64_t bytes = storage_bytes(layers_[0].dtype), L = static_cast<int64_t>(layers_.size());
  // Layer k's part of a copy of the states.
  const auto part = [&](void* states, int copy, int64_t k, int64_t width) {
    const int64_t at = (copy * L + k) * layers_[0].size.steps.N * width;
    return states ? static_cast<char*>(states) + at * bytes : nullptr;
  };
  for (int64_t k = 0; k < L; ++k) {
    ForwardParams& p = calls_[k].params;
    p.x = {x, 0, stride_n};
    p.h0 = part(states_.h, current_, k, p.size.R);
    p.c0 = part(states_.c, current_, k, p.size.H);
    p.h_n = part(states_.h, current_ ^ 1, k, p.size.R);
    p.c_n = part(states_.c, current_ ^ 1, k, p.size.H);
    p.y = k + 1 < L ? p.h_n : y;
    p.calls = steps_;
    calls_[k].planned.run(p, scratch_);
    x = p.y;
    stride_n = p.size.R;
  }
}

int64_t Stream::products() const {
  int64_t sum = 0;
  for (const Layer& layer : layers_) {
    const LayerSizes& s = layer.size;
    sum += s.steps.N * info(layer.cell).gates * s.H * (s.I + s.R);
  }
  return sum;
}

int stream_step(void* handle, const void* x, void* y) {
  try {
    Stream& stream = *static_cast<Stream*>(handle);
    return stream.step(x, stream.layer(0).size.I, y) ? 0 : 1;
  } catch (const std::bad_alloc&) {
    return 2;
  }
}

}  // namespace lstm_fused
