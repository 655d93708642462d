// Thread-block clusters, from compute capability 9.0: their barrier, distributed shared memory, and
// mbarriers, which count what arrives there.
#pragma once

#if defined(LSTM_FUSED_EMULATION)
#include "emulation/ptx/cluster.h"
#else

#include "../plan.h"
#include "threads.h"

namespace lstm_fused::cuda {

using RemoteAddress = uint32_t;  // of a byte of any CTA's shared memory
struct alignas(16) Bytes16 {
  uint32_t words[4];
};

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
// accesses to each other's shared memory, by a fence of all memory: too slow for every step.
LSTM_FUSED_DEVICE void cluster_barrier_arrive() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}
LSTM_FUSED_DEVICE void cluster_barrier_wait() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// The address of what another CTA has at the same offset of its shared memory. Offsets can be added
// to it.
LSTM_FUSED_DEVICE RemoteAddress remote_address(const void* local, int rank) {
  RemoteAddress remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(remote)
      : "r"(shared_address(local)), "r"(rank));
  return remote;
}

// Stores 16 bytes in another CTA's shared memory and counts them at a barrier there, without
// waiting for either.
LSTM_FUSED_DEVICE void store_async(RemoteAddress to, const Bytes16& v, RemoteAddress barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(to),
      "r"(v.words[0]), "r"(v.words[1]), "r"(v.words[2]), "r"(v.words[3]), "r"(barrier)
      : "memory");
}

// An mbarrier, 8 bytes of shared memory, has phases. One ends when a thread has armed it and as
// many bytes have arrived as it was armed for: earlier or later, in any order.
LSTM_FUSED_DEVICE void init_mbarrier(void* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}
// Before the cluster's barrier, after which other CTAs may store.
LSTM_FUSED_DEVICE void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
LSTM_FUSED_DEVICE void arm_mbarrier(void* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// Waits for the end of a phase, of which the first has parity 0 and the next one 1. What was stored
// in it is visible then. An acquire would invalidate L1, where shared memory is not: from CUDA 12.8
// on there is a fence for shared memory alone.
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1208
#define LSTM_FUSED_WAIT "relaxed"
#define LSTM_FUSED_FENCE "fence.acquire.sync_restrict::shared::cluster.cluster;"
#else
#define LSTM_FUSED_WAIT "acquire"
#define LSTM_FUSED_FENCE ""
#endif
LSTM_FUSED_DEVICE void wait_mbarrier(void* barrier, int parity) {
  int ended;
  do {
    asm volatile(
        "{\n.reg .pred ended;\n"
        "mbarrier.try_wait.parity." LSTM_FUSED_WAIT
        ".cluster.shared::cta.b64 ended, [%1], %2;\n"
        "selp.b32 %0, 1, 0, ended;\n}"
        : "=r"(ended)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!ended);
  asm volatile(LSTM_FUSED_FENCE ::: "memory");
}
#undef LSTM_FUSED_WAIT
#undef LSTM_FUSED_FENCE
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
LSTM_FUSED_DEVICE RemoteAddress remote_address(const void*, int) {
  return 0;
}
LSTM_FUSED_DEVICE void store_async(RemoteAddress, const Bytes16&, RemoteAddress) {
  __trap();
}
LSTM_FUSED_DEVICE void init_mbarrier(void*) {
  __trap();
}
LSTM_FUSED_DEVICE void fence_mbarrier_init() {
  __trap();
}
LSTM_FUSED_DEVICE void arm_mbarrier(void*, int) {
  __trap();
}
LSTM_FUSED_DEVICE void wait_mbarrier(void*, int) {
  __trap();
}
#endif

#if defined(__CUDA_ARCH__)
static_assert(kHasClusters == has_clusters(__CUDA_ARCH__ / 100),
              "the plan and these functions disagree on which GPUs have clusters");
#endif

}  // namespace lstm_fused::cuda
#endif
