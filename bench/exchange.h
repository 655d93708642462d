// What CTAs do between two time steps and nothing else, by the kernels' own functions: write what a
// step computes, send it, store what no other CTA waits for, and wait. Each checks that it got what
// this very step wrote.
#pragma once

#include <cstdint>

#include "cuda/exchange.h"
#include "cuda/kernel_launch.h"
#include "cuda/ptx/async_copy.h"

namespace lstm_fused::cuda {

struct ExchangeParams {
  int steps;
  int bytes;     // grid: that a CTA reads in each step; cluster: that it sends to each other CTA
  char* buffer;  // grid: (groups, 2, CTAs, kWritten), owned by the caller
  unsigned long long* counters;  // (groups), zero at the start, owned by the caller
  float* stored;                 // (CTAs of all groups, kStoredSteps, kStored, threads), written
  int* wrong;  // (CTAs of all groups, threads), written: values that were not this step's
};

constexpr int kExchangeThreads = 256;
constexpr int kWritten = 512;     // bytes a CTA of a grid writes: 16 units of 16 rows in 16 bits
constexpr int kExchangeRows = 8;  // in which a CTA of a cluster sends them
constexpr int kStored = 6;        // of a unit: four gates, the cell state and h
constexpr int kStoredSteps = 8;   // after which the same memory is written again
using ExchangeValue = uint16_t;

LSTM_FUSED_DEVICE int cta_of_all() {
  return block_index().y * block_count().x + block_index().x;
}
LSTM_FUSED_DEVICE int& wrong_of(const ExchangeParams& p) {
  return p.wrong[cta_of_all() * thread_count() + thread_index()];
}
LSTM_FUSED_DEVICE bool is_wrong(const char* value, int step) {
  return *reinterpret_cast<const ExchangeValue*>(value) != step + 1;
}
LSTM_FUSED_DEVICE void write(char* to, int step) {
  *reinterpret_cast<ExchangeValue*>(to) = static_cast<ExchangeValue>(step + 1);
}

// What a step stores between sending and waiting.
LSTM_FUSED_DEVICE void store_results(const ExchangeParams& p, int step) {
  float* to =
      p.stored + (cta_of_all() * kStoredSteps + step % kStoredSteps) * (kStored * thread_count());
  for (int i = 0; i < kStored; ++i) to[i * thread_count() + thread_index()] = step;
}

// Grid: (CTAs that share a barrier, independent groups). Shared memory: (bytes).
LSTM_FUSED_KERNEL(kExchangeThreads, 1)
grid_exchange(const LSTM_FUSED_CONSTANT ExchangeParams p) {
  const int ctas = block_count().x, self = block_index().x, group = block_index().y;
  const int round = ctas * kWritten, each = sizeof(ExchangeValue);
  const GridExchange exchange{reinterpret_cast<char*>(p.counters + group), 0};
  char* shared = shared_memory();
  int wrong = 0;
  for (int s = 0; s < p.steps; ++s) {
    char* buffer = p.buffer + (group * 2 + (s & 1)) * round;
    if (p.bytes)
      for (int i = thread_index() * each; i < kWritten; i += thread_count() * each)
        write(buffer + self * kWritten + i, s);
    exchange.send(s);
    store_results(p, s);
    exchange.wait(s);
    if (!p.bytes) continue;
    // From the next CTA's part on, around the buffer where it is shorter than that.
    for (int i = thread_index() * 16; i < p.bytes; i += thread_count() * 16)
      copy_async(shared + i, buffer + ((self + 1) * kWritten + i) % round, true);
    commit_copies();
    wait_copies<0>();
    sync_block();
    if (thread_index() * 16 < p.bytes) wrong += is_wrong(shared + thread_index() * 16, s);
    sync_block();  // the next step's copies overwrite what was read
  }
  wrong_of(p) = wrong;
}

// Bytes of a row of a cluster's buffer, of the buffer, and of a CTA's shared memory, where the
// barriers are last.
constexpr int cluster_row(int ctas, int bytes) {
  return ctas * (bytes / kExchangeRows);
}
constexpr int cluster_buffer(int ctas, int bytes) {
  return kExchangeRows * (cluster_row(ctas, bytes) + kPadBytes);
}
constexpr int cluster_shared(int ctas, int bytes) {
  return 2 * (cluster_buffer(ctas, bytes) + kMbarrierBytes);
}

// Grid: one cluster. Shared memory: cluster_shared. bytes: a multiple of kExchangeRows vectors.
LSTM_FUSED_KERNEL(kExchangeThreads, 1)
cluster_exchange(const LSTM_FUSED_CONSTANT ExchangeParams p) {
  using Exchange = ClusterExchange<ExchangeValue, kExchangeRows, 1>;
  const int ctas = cluster_size(), self = cluster_rank(), own = p.bytes / kExchangeRows;
  const int row = cluster_row(ctas, p.bytes), buffer_bytes = cluster_buffer(ctas, p.bytes);
  const int lane = thread_index() % Exchange::kLanes, first = thread_index() / Exchange::kLanes;
  const Exchange exchange(2 * buffer_bytes, row, own, ctas);
  char* shared = shared_memory();
  int wrong = 0;
  cluster_barrier_arrive();
  cluster_barrier_wait();
  for (int s = 0; s < p.steps; ++s) {
    // Where a vector of a CTA's columns is.
    const auto at = [&](int i, int cta) {
      return (s & 1) * buffer_bytes + i * 16 / own * (row + kPadBytes) + cta * own + i * 16 % own;
    };
    sync_block();  // as after a step's product, which has read the other buffer
    for (int i = first; i * 16 < p.bytes; i += thread_count() / Exchange::kLanes) {
      write(shared + at(i, self) + lane * sizeof(ExchangeValue), s);
      sync_warp();
      exchange.send(at(i, self), s & 1);
    }
    store_results(p, s);
    exchange.wait(s & 1, s);
    for (int i = first; i * 16 < p.bytes; i += thread_count() / Exchange::kLanes)
      wrong += is_wrong(shared + at(i, (self + 1) % ctas) + lane * sizeof(ExchangeValue), s);
  }
  wrong_of(p) = wrong;
  // No CTA exits while another may store there.
  cluster_barrier_arrive();
  cluster_barrier_wait();
}

}  // namespace lstm_fused::cuda
