// csrc/cuda/kernel_launch.h for the host.
#pragma once

#include "fibers.h"

namespace lstm_fused::cuda {

struct LaunchConfig {
  dim3 grid;
  int threads;
  int64_t shared_bytes;
  int cluster;
  bool cooperative;
  void* stream;
};

struct ConfiguredDevices {};

template <class Params>
const char* launch_kernel(void (*kernel)(Params), const LaunchConfig& launch, const Params& params,
                          ConfiguredDevices&) {
  return fibers::launch([&] { kernel(params); }, launch.grid, launch.threads, launch.shared_bytes,
                        launch.cluster, launch.cooperative);
}

}  // namespace lstm_fused::cuda
