// csrc/cuda/ptx/cluster.h for the host.
#pragma once

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
  fibers::send(local, rank);
}

}  // namespace lstm_fused::cuda
