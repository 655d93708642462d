// The GPU architectures that the kernels are compiled for.
#pragma once

#include "plan.h"

namespace lstm_fused::cuda {

struct Architecture {
  const char* target;  // for nvcc, as TORCH_CUDA_ARCH_LIST names it
  const char* gpu;     // the largest one, whose properties follow
  Device device;
};

// A row each, oldest first. setup.py reads the targets here, and tests/cuda/test_cuda_plan.py plans
// for the devices. Their properties are from the CUDA programming guide's table of compute
// capabilities and from data sheets. How many clusters are active at once no sheet says: guesses.
inline constexpr Architecture kArchitectures[] = {
    {"8.0", "A100", {8, 0, 108, 163 << 10, 1, 0}},
    {"8.6", "A10", {8, 6, 72, 99 << 10, 1, 0}},
    {"8.9", "L40S", {8, 9, 142, 99 << 10, 1, 0}},
    {"9.0a", "H200", {9, 0, 132, 227 << 10, 16, 8}},
    {"10.0", "B200", {10, 0, 148, 227 << 10, 16, 8}},
    {"12.0+PTX", "RTX 5090", {12, 0, 170, 99 << 10, 8, 20}},
};

constexpr bool architectures_are_consistent() {
  for (const Architecture& a : kArchitectures)
    if (has_clusters(a.device.major) != (a.device.cluster_ctas > 1)) return false;
  return true;
}
static_assert(architectures_are_consistent(), "the plan and the table disagree on clusters");

}  // namespace lstm_fused::cuda
