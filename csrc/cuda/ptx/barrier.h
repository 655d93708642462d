// A barrier between CTAs of one cooperative launch, through a counter in global memory.
#pragma once

#if defined(LSTM_FUSED_EMULATION)
#include "emulation/ptx/barrier.h"
#else

#include "threads.h"

namespace lstm_fused::cuda {

// Split arrive / wait. The counter (64 bits) starts at zero and only grows, so that it never has to
// be reset and arrivals at one barrier cannot be mistaken for those at another. Whatever any thread
// of a CTA wrote before the sync_block that precedes barrier_arrive is visible to all threads of
// every CTA that returns from barrier_wait: loads that follow bypass or miss L1.
LSTM_FUSED_DEVICE void barrier_arrive(void* counter) {
  if (threadIdx.x == 0)
    asm volatile("red.release.gpu.global.add.u64 [%0], 1;" ::"l"(counter) : "memory");
}

// Waits until `target` CTAs have arrived since the counter was zero. The loop polls with relaxed
// loads and ends with one acquire fence: an acquire in each iteration would invalidate L1 each
// time.
LSTM_FUSED_DEVICE void barrier_wait(void* counter, unsigned long long target) {
  if (threadIdx.x == 0) {
    unsigned long long seen;
    do {
      asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(seen) : "l"(counter) : "memory");
    } while (seen < target);
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
  }
  __syncthreads();
}

}  // namespace lstm_fused::cuda
#endif
