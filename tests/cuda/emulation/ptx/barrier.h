// csrc/cuda/ptx/barrier.h for the host.
#pragma once

#include "threads.h"

namespace lstm_fused::cuda {

inline void barrier_arrive(void* counter) {
  if (thread_index() == 0) fibers::add_to_counter(static_cast<unsigned long long*>(counter));
}
inline void barrier_wait(void* counter, unsigned long long target) {
  if (thread_index() == 0)
    fibers::wait_for_counter(static_cast<unsigned long long*>(counter), target);
  fibers::sync_block();
}

}  // namespace lstm_fused::cuda
