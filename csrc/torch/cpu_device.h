// The CPU as the operators' bodies (operators.h) know a device.
#pragma once

#include <cstring>

#include "../cpu/launch.h"
#include "operators.h"

namespace lstm_fused {

struct Cpu {
  static constexpr SavedLayouts kSaved = kCpuSaved;
  static constexpr bool kNeedsOutput = false, kNeedsUniformRows = false, kCheckpoints = true;

  static void forward(std::vector<Layer>& layers, std::vector<ForwardParams>& params, const Tensor&,
                      bool training) {
    launch_each(problem_of(layers[0], training), params);
  }
  static void backward(std::vector<Layer>& layers, std::vector<BackwardParams>& params,
                       const Tensor&) {
    launch_each(problem_of(layers[0], true), params);
  }
  static void fill(void* data, int byte, int64_t bytes, const Tensor&) {
    std::memset(data, byte, bytes);
  }
  static void move(void* to, const void* from, int64_t bytes, const Tensor&) {
    std::memmove(to, from, bytes);
  }
};

}  // namespace lstm_fused
