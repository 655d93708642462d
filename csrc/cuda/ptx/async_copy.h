// Asynchronous copies from global to shared memory: cp.async and its groups.
#pragma once

#if defined(LSTM_FUSED_EMULATION)
#include "emulation/ptx/async_copy.h"
#else

#include "threads.h"

namespace lstm_fused::cuda {

// Copies 16 bytes, or writes 16 zero bytes if !valid. The result is visible to the CTA after
// wait_copies and sync_block. cp.async.cg bypasses L1, which is not coherent: other SMs may have
// written the source during this launch.
LSTM_FUSED_DEVICE void copy_async(void* to, const void* from, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(bytes)
               : "memory");
}

// Closes this thread's current group of copies.
LSTM_FUSED_DEVICE void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's groups, the newest ones, are incomplete.
template <int kPending>
LSTM_FUSED_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace lstm_fused::cuda
#endif
