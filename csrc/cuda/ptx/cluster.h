// Thread-block clusters, from compute capability 9.0: their barrier and distributed shared memory.
#pragma once

#if defined(LSTM_FUSED_EMULATION)
#include "emulation/ptx/cluster.h"
#else

#include "../plan.h"
#include "threads.h"

namespace lstm_fused::cuda {

#if __CUDA_ARCH__ >= 900
inline constexpr bool kHasClusters = true;

LSTM_FUSED_DEVICE int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
LSTM_FUSED_DEVICE int cluster_size() {
  int size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// A barrier of all threads of all CTAs of the cluster, split into arrive and wait. It orders their
// accesses to each other's shared memory.
LSTM_FUSED_DEVICE void cluster_barrier_arrive() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}
LSTM_FUSED_DEVICE void cluster_barrier_wait() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// Copies 16 bytes of this CTA's shared memory to the same offset of another CTA's, through
// distributed shared memory.
LSTM_FUSED_DEVICE void copy_to_cta(void* local, int rank) {
  const uint4 v = *static_cast<const uint4*>(local);
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(remote)
      : "r"(shared_address(local)), "r"(rank));
  asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(remote), "r"(v.x),
               "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
#else
// Never executed: the plan uses clusters only where has_clusters.
inline constexpr bool kHasClusters = false;

LSTM_FUSED_DEVICE int cluster_rank() {
  return 0;
}
LSTM_FUSED_DEVICE int cluster_size() {
  return 1;
}
LSTM_FUSED_DEVICE void cluster_barrier_arrive() {
  __trap();
}
LSTM_FUSED_DEVICE void cluster_barrier_wait() {
  __trap();
}
LSTM_FUSED_DEVICE void copy_to_cta(void*, int) {
  __trap();
}
#endif

#if defined(__CUDA_ARCH__)
static_assert(kHasClusters == has_clusters(__CUDA_ARCH__ / 100),
              "the plan and these functions disagree on which GPUs have clusters");
#endif

}  // namespace lstm_fused::cuda
#endif
