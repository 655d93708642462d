// What CTAs do between two time steps and nothing else, by the kernels' own primitives: a barrier,
// and the exchange of what a step computes. Each checks that it got what this very step wrote.
#pragma once

#include <cstdint>

#include "cuda/kernel_launch.h"
#include "cuda/ptx/async_copy.h"
#include "cuda/ptx/barrier.h"
#include "cuda/ptx/cluster.h"

namespace lstm_fused::cuda {

struct ExchangeParams {
  int steps;
  int bytes;     // grid: that a CTA reads in each step; cluster: that it sends to each other CTA
  char* buffer;  // grid: (groups, 2, CTAs, kWritten), owned by the caller
  unsigned long long* counters;  // (groups), zero at the start, owned by the caller
  int* wrong;  // (CTAs of all groups, threads), written: words that were not this step's
};

constexpr int kExchangeThreads = 256;
constexpr int kWritten = 512;  // bytes a CTA of a grid writes: 16 units of 16 rows in 16 bits

// The barriers at the end of a step, as the kernels have them.
LSTM_FUSED_DEVICE void grid_barrier(unsigned long long* counter, unsigned long long target) {
  sync_block();
  barrier_arrive(counter);
  barrier_wait(counter, target);
}
LSTM_FUSED_DEVICE void cluster_barrier() {
  cluster_barrier_arrive();
  cluster_barrier_wait();
}

LSTM_FUSED_DEVICE void write_piece(char* to, int step) {
  for (int i = 0; i < 4; ++i) reinterpret_cast<volatile int*>(to)[i] = step + 1;
}
LSTM_FUSED_DEVICE int is_wrong(const char* piece, int step) {
  return *reinterpret_cast<const volatile int*>(piece) != step + 1;
}
LSTM_FUSED_DEVICE int& wrong_of(const ExchangeParams& p) {
  const int cta = block_index().y * block_count().x + block_index().x;
  return p.wrong[cta * thread_count() + thread_index()];
}

// Grid: (CTAs that share a barrier, independent groups). Shared memory: (bytes).
LSTM_FUSED_KERNEL(kExchangeThreads, 1)
grid_exchange(const LSTM_FUSED_CONSTANT ExchangeParams p) {
  const int ctas = block_count().x, self = block_index().x, group = block_index().y;
  const int round = ctas * kWritten;
  char* shared = shared_memory();
  int wrong = 0;
  for (int s = 0; s < p.steps; ++s) {
    char* half = p.buffer + (group * 2 + (s & 1)) * round;
    const int at = thread_index() * 16;
    if (p.bytes && at < kWritten) write_piece(half + self * kWritten + at, s);
    grid_barrier(p.counters + group, static_cast<unsigned long long>(ctas) * (s + 1));
    if (!p.bytes) continue;
    // From the next CTA's piece on, around the buffer where it is shorter than that.
    for (int i = at; i < p.bytes; i += thread_count() * 16)
      copy_async(shared + i, half + ((self + 1) * kWritten + i) % round, true);
    commit_copies();
    wait_copies<0>();
    sync_block();
    wrong += at < p.bytes && is_wrong(shared + at, s);
  }
  wrong_of(p) = wrong;
}

// Grid: one cluster. Shared memory: (2, CTAs, bytes).
LSTM_FUSED_KERNEL(kExchangeThreads, 1)
cluster_exchange(const LSTM_FUSED_CONSTANT ExchangeParams p) {
  const int ctas = cluster_size(), self = cluster_rank(), pieces = p.bytes / 16;
  int wrong = 0;
  cluster_barrier();
  for (int s = 0; s < p.steps; ++s) {
    char* half = shared_memory() + (s & 1) * ctas * p.bytes;
    if (pieces) {
      for (int i = thread_index(); i < pieces; i += thread_count())
        write_piece(half + self * p.bytes + i * 16, s);
      sync_block();
      for (int i = thread_index(); i < pieces * (ctas - 1); i += thread_count())
        copy_to_cta(half + self * p.bytes + i % pieces * 16, i / pieces + (i / pieces >= self));
    }
    cluster_barrier();
    if (pieces)
      wrong += is_wrong(half + (self + 1) % ctas * p.bytes + thread_index() % pieces * 16, s);
  }
  wrong_of(p) = wrong;
}

}  // namespace lstm_fused::cuda
