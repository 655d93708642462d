// One launch of a kernel: plain, cooperative or in clusters.
#pragma once

#if defined(LSTM_FUSED_EMULATION)
#include "emulation/kernel_launch.h"
#else

#include <atomic>

#include "runtime.h"

namespace lstm_fused::cuda {

struct LaunchConfig {
  dim3 grid;
  int threads;
  int64_t shared_bytes;
  int cluster;       // CTAs of a cluster along x, 0 for no clusters
  bool cooperative;  // all CTAs must be resident at once
  void* stream;
};

// On which devices the attributes of one kernel are set already, a bit for each.
struct ConfiguredDevices {
  std::atomic<uint64_t> bits{0};
};

// Allows a kernel all shared memory of an SM, and clusters of more than 8 CTAs.
inline const char* configure(const void* function, ConfiguredDevices& configured, bool clusters) {
  int device = 0, bytes = 0;
  if (const char* error = error_of(cudaGetDevice(&device))) return error;
  const uint64_t bit = uint64_t{1} << (device & 63);
  if (device < 64 && configured.bits.load(std::memory_order_acquire) & bit) return nullptr;
  if (const char* error =
          error_of(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)))
    return error;
  if (const char* error = error_of(
          cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)))
    return error;
  if (clusters)
    if (const char* error = error_of(
            cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1)))
      return error;
  configured.bits.fetch_or(bit, std::memory_order_release);
  return nullptr;
}

// configured: of this kernel alone, with static storage. Returns null, or the error's text.
template <class Params>
const char* launch_kernel(void (*kernel)(Params), const LaunchConfig& launch, const Params& params,
                          ConfiguredDevices& configured) {
  const void* function = reinterpret_cast<const void*>(kernel);
  if (const char* error = configure(function, configured, launch.cluster > 0)) return error;
  cudaLaunchAttribute attributes[2] = {};
  int count = 0;
  if (launch.cluster) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = launch.cluster;
    attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  if (launch.cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count].val.cooperative = 1;
    ++count;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = launch.grid;
  config.blockDim = dim3(launch.threads);
  config.dynamicSmemBytes = static_cast<size_t>(launch.shared_bytes);
  config.stream = static_cast<cudaStream_t>(launch.stream);
  config.attrs = attributes;
  config.numAttrs = count;
  void* arguments[] = {const_cast<Params*>(&params)};
  return error_of(cudaLaunchKernelExC(&config, function, arguments));
}

}  // namespace lstm_fused::cuda
#endif
