// The properties of a device that a plan depends on, from the CUDA runtime.
#pragma once

#if defined(LSTM_FUSED_EMULATION)
#include "emulation/device.h"
#else

#include "plan.h"
#include "runtime.h"

namespace lstm_fused::cuda {

static __global__ void empty_kernel() {}

// How many clusters of `ctas` CTAs can be active at once, if each CTA takes all shared memory of
// its SM. A cluster's SMs must lie in one GPC, so a device may have none of 16 CTAs.
inline int max_active_clusters(int ctas, int shared_bytes) {
  const void* function = reinterpret_cast<const void*>(empty_kernel);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = ctas;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(ctas);
  config.blockDim = dim3(max_threads(PlanKind::kCluster, kMaxUnitTiles));
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  const bool answered =
      cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes) ==
          cudaSuccess &&
      cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) ==
          cudaSuccess &&
      cudaOccupancyMaxActiveClusters(&clusters, function, &config) == cudaSuccess;
  if (!answered) clear_error();
  return answered ? clusters : 0;
}

// The device must be the current one. Fails where the driver is older than the CUDA runtime, and
// where nothing was compiled for the device; layers run through torch there.
inline const char* read_device(int index, Device& device) {
  const auto handled = [](cudaError_t error) {
    if (error != cudaSuccess) clear_error();
    return error_of(error);
  };
  const auto read = [&](cudaDeviceAttr attribute, int& value) {
    return handled(cudaDeviceGetAttribute(&value, attribute, index));
  };
  if (const char* error = read(cudaDevAttrComputeCapabilityMajor, device.major)) return error;
  if (const char* error = read(cudaDevAttrComputeCapabilityMinor, device.minor)) return error;
  if (const char* error = read(cudaDevAttrMultiProcessorCount, device.sms)) return error;
  if (const char* error = read(cudaDevAttrMaxSharedMemoryPerBlockOptin, device.shared_bytes))
    return error;
  if (supported(device)) {
    cudaFuncAttributes attributes;
    const void* function = reinterpret_cast<const void*>(empty_kernel);
    if (const char* error = handled(cudaFuncGetAttributes(&attributes, function))) return error;
  }
  device.cluster_ctas = kMaxClusterCtas;
  device.clusters = 0;
  while (device.cluster_ctas > 1) {
    if (has_clusters(device.major))
      device.clusters = max_active_clusters(device.cluster_ctas, device.shared_bytes);
    if (device.clusters > 0) break;
    device.cluster_ctas /= 2;
  }
  return nullptr;
}

}  // namespace lstm_fused::cuda
#endif
