// csrc/cuda/ptx/cluster.h for the host.
#pragma once

#include <cstring>

#include "threads.h"

namespace lstm_fused::cuda {

inline constexpr bool kHasClusters = true;

inline int cluster_rank() {
  return fibers::cluster_rank();
}
inline int cluster_size() {
  return fibers::cluster_size();
}
inline void cluster_barrier_arrive() {
  fibers::cluster_barrier_arrive();
}
inline void cluster_barrier_wait() {
  fibers::cluster_barrier_wait();
}
inline void copy_to_cta(void* local, int rank) {
  const int64_t offset = static_cast<char*>(local) - shared_memory();
  std::memcpy(fibers::shared_memory(rank) + offset, local, 16);
}

}  // namespace lstm_fused::cuda
