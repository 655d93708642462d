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

// Waits until `target` CTAs have arrived since the counter was zero. Each poll is an acquire, which
// invalidates L1: nothing that the CTA reads again is there. A relaxed poll would need a fence
// behind it, which waits for this thread's own stores.
LSTM_FUSED_DEVICE void barrier_wait(void* counter, unsigned long long target) {
  if (threadIdx.x == 0) {
    unsigned long long seen;
    do {
      asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(seen) : "l"(counter) : "memory");
    } while (seen < target);
  }
  __syncthreads();
}

}  // namespace lstm_fused::cuda
#endif
