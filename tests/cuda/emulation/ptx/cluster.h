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

using RemoteAddress = char*;
struct alignas(16) Bytes16 {
  uint32_t words[4];
};

inline RemoteAddress remote_address(const void* local, int rank) {
  return fibers::shared_memory(rank) + (static_cast<const char*>(local) - shared_memory());
}
inline void store_async(RemoteAddress to, const Bytes16& v, RemoteAddress barrier) {
  fibers::store_async(to, &v, barrier);
}
inline void init_mbarrier(void* barrier) {
  fibers::init_mbarrier(barrier);
}
inline void fence_mbarrier_init() {}
inline void arm_mbarrier(void* barrier, int bytes) {
  fibers::arm_mbarrier(barrier, bytes);
}
inline void wait_mbarrier(void* barrier, int parity) {
  fibers::wait_mbarrier(barrier, parity);
}

}  // namespace lstm_fused::cuda
