// How B gets from one step to the next between CTAs. The kernels call send(s) when a step's part of
// the next B is written, and wait(s) before they use the whole of it.
#pragma once

#include "params.h"
#include "plan.h"
#include "ptx/barrier.h"
#include "ptx/cluster.h"
#include "ptx/threads.h"

namespace lstm_fused::cuda {

// Between the CTAs of a row group, which write B to global memory and read it from L2.
struct GridExchange {
  char* const counter;
  const int begin;  // the first step

  LSTM_FUSED_DEVICE void send(int) const {
    sync_block();
    barrier_arrive(counter);
  }
  LSTM_FUSED_DEVICE void wait(int s) const {
    barrier_wait(counter, static_cast<unsigned long long>(block_count().x) * (s - begin + 1));
  }
};

// Between the CTAs of a cluster. Each CTA sends its columns of the next B to the others through
// distributed shared memory, with stores that count their bytes at an mbarrier of the receiver: one
// of each buffer, armed two steps ahead. Nothing else needs a barrier: a CTA that has the whole of
// a step's B knows that all others have read the buffer that it writes next, since they have sent
// what they computed from it. kOut: runs of columns that a CTA has in a row of B. CTAs that have
// none take no part.
template <class S, int kRows, int kOut>
struct ClusterExchange {
  static constexpr int kLanes = 16 / static_cast<int>(sizeof(S));  // whose columns are a vector
  static constexpr int kTargets = kMaxClusterCtas / kLanes;

  const int barriers;              // where in shared memory the two are
  const int received;              // bytes of each step from the others
  const int others;                // CTAs to send to; this lane has every kLanes-th of them
  RemoteAddress memory[kTargets];  // their shared memory

  // row_bytes: of B. from, own: first byte of this CTA's columns of a run, and how many. ctas: that
  // have columns. All threads call this, and then the cluster's barrier.
  LSTM_FUSED_DEVICE ClusterExchange(int barriers_at, int row_bytes, int own, int ctas)
      : barriers(barriers_at), received(kRows * (row_bytes - kOut * own)), others(ctas - 1) {
    const int self = cluster_rank();
    LSTM_FUSED_UNROLL
    for (int t = 0; t < kTargets; ++t) {
      const int other = target(t);
      memory[t] = remote_address(shared_memory(), other < others ? other + (other >= self) : self);
    }
    if (thread_index() != 0) return;
    for (int i = 0; i < 2; ++i) init_mbarrier(barrier(i));
    for (int i = 0; i < 2; ++i) arm_mbarrier(barrier(i), received);
    fence_mbarrier_init();
  }

  LSTM_FUSED_DEVICE char* barrier(int buffer) const {
    return shared_memory() + barriers + buffer * kMbarrierBytes;
  }
  LSTM_FUSED_DEVICE int target(int t) const { return thread_index() % kLanes + t * kLanes; }

  // Sends 16 bytes of this CTA's shared memory, in a buffer of B, to the same place of the others'.
  // The lanes of the vector call this together.
  LSTM_FUSED_DEVICE void send(int at, int buffer) const {
    const Bytes16 vector = *reinterpret_cast<const Bytes16*>(shared_memory() + at);
    LSTM_FUSED_UNROLL
    for (int t = 0; t < kTargets; ++t)
      if (target(t) < others)
        store_async(memory[t] + at, vector, memory[t] + barriers + buffer * kMbarrierBytes);
  }

  // Waits for all parts of a buffer, this CTA's own too. count: of the waits before, for either
  // buffer.
  LSTM_FUSED_DEVICE void wait(int buffer, int count) const {
    wait_mbarrier(barrier(buffer), count >> 1 & 1);
    if (thread_index() == 0) arm_mbarrier(barrier(buffer), received);
    sync_block();
  }
};

}  // namespace lstm_fused::cuda
