// Kernels with one planted fault each, which the emulation must report; and without any. Argument:
// the name of a fault, "none" for the same kernels without faults.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <vector>

#include "cuda/kernel_launch.h"
#include "cuda/ptx/async_copy.h"
#include "cuda/ptx/barrier.h"
#include "cuda/ptx/cluster.h"
#include "cuda/ptx/mma.h"
#include "memory.h"

namespace gpu = lstm_fused::cuda;

namespace {

constexpr int kThreads = 64, kClusterCtas = 2, kShared = 1024 + 16;

struct Params {
  const char* fault;
  char* memory;  // (kShared), with guards
};

bool has(const Params& p, const char* fault) {
  return std::strcmp(p.fault, fault) == 0;
}

LSTM_FUSED_KERNEL(kThreads, 1) accesses(const Params p) {
  char* shared = gpu::shared_memory();
  const int thread = gpu::thread_index();
  volatile char* const last = shared + kShared - 1;
  volatile char* const first = shared;
  if (thread == 0) {
    *last = 1;
    *first = 1;
    if (has(p, "write after shared memory")) last[1 + 127] = 1;
    if (has(p, "write just after shared memory")) last[1] = 1;
    if (has(p, "write before shared memory")) first[-1] = 1;
    if (has(p, "read after a tensor")) *first = static_cast<volatile char*>(p.memory)[kShared];
    if (has(p, "write before a tensor") && gpu::block_index().x == 0) p.memory[-1] = 1;
    volatile int* word = reinterpret_cast<int*>(shared + (has(p, "misaligned load") ? 2 : 4));
    *first = *word;
  }
  gpu::sync_block();
}

LSTM_FUSED_KERNEL(kThreads, 1) copies(const Params p) {
  if (has(p, "write before a copy has read") && gpu::block_index().x != 0) return;
  char* shared = gpu::shared_memory();
  const int at = gpu::thread_index() * 16;
  const char* from = p.memory + at + (has(p, "misaligned source of a copy") ? 4 : 0);
  char* to = shared + at + (has(p, "misaligned copy") ? 4 : 0);
  if (has(p, "copy to after shared memory")) to += kShared - 16;
  if (has(p, "copy from after a tensor")) from += kShared - 16;
  gpu::copy_async(to, from, true);
  gpu::commit_copies();
  const uint32_t* got = reinterpret_cast<const uint32_t*>(to);
  if (has(p, "read before a copy has arrived") && *got != 0)
    gpu::fibers::fail("not what is copied");
  if (has(p, "write before a copy has read")) *reinterpret_cast<uint32_t*>(p.memory + at) = 1;
  if (has(p, "copy pending at exit")) return;
  gpu::wait_copies<0>();
  if (*got != 0) gpu::fibers::fail("not what is copied");
  if (!has(p, "missing barrier of a CTA")) gpu::sync_block();
  const uint32_t* others = reinterpret_cast<const uint32_t*>(shared + (kThreads - 1) * 16 - at);
  if (*others != 0) gpu::fibers::fail("not what another thread has copied");
}

LSTM_FUSED_KERNEL(kThreads, 1) lanes(const Params p) {
  char* shared = gpu::shared_memory();
  const int lane = gpu::thread_index() % 32;
  uint32_t two[2], four[4];
  if (has(p, "different instructions") && lane == 7) {
    gpu::load_matrices(two, shared);
    gpu::load_matrices(four, shared);
  } else {
    gpu::load_matrices(four, shared + lane * 16 + (has(p, "misaligned ldmatrix") ? 8 : 0));
    gpu::load_matrices(two, shared + (has(p, "ldmatrix after shared memory") ? kShared : 0));
  }
  if (!has(p, "lane that skips an instruction") || lane != 7) gpu::sync_warp();
}

LSTM_FUSED_KERNEL(kThreads, 1) clusters(const Params p) {
  char* shared = gpu::shared_memory();
  const int thread = gpu::thread_index();
  if (has(p, "wait without arrive") && thread == 3) gpu::cluster_barrier_wait();
  gpu::cluster_barrier_arrive();
  if (has(p, "two arrivals") && thread == 3) gpu::cluster_barrier_arrive();
  gpu::cluster_barrier_wait();
  gpu::cluster_barrier_arrive();
  if (has(p, "exit between arrive and wait") && thread == 3) return;
  gpu::cluster_barrier_wait();
}

// Each CTA sends the other one 16 bytes from each thread.
LSTM_FUSED_KERNEL(kThreads, 1) stores(const Params p) {
  char* shared = gpu::shared_memory();
  char* barrier = shared + kShared - 16;
  const int other = 1 - gpu::cluster_rank(), thread = gpu::thread_index();
  const auto arm = [&] { gpu::arm_mbarrier(barrier, kThreads * 16); };
  if (thread == 0) {
    if (!has(p, "mbarrier that is not initialized")) gpu::init_mbarrier(barrier);
    arm();
    if (has(p, "mbarrier that is armed twice")) arm();
    gpu::fence_mbarrier_init();
  }
  gpu::cluster_barrier_arrive();
  gpu::cluster_barrier_wait();
  char* to = gpu::remote_address(shared + thread * 16, other);
  if (has(p, "misaligned store to another CTA")) to += 8;
  if (has(p, "store to no CTA")) to += 1 << 20;
  if (has(p, "store to a CTA that exits") && other == 1)
    for (int i = 0; i < 20; ++i) gpu::sync_block();  // until the other one has
  gpu::store_async(to, gpu::Bytes16{{1, 2, 3, 4}}, gpu::remote_address(barrier, other));
  if (has(p, "store to a CTA that exits")) return;
  if (has(p, "more bytes armed than stored") && thread == 0) {
    gpu::wait_mbarrier(barrier, 0);
    arm();
    gpu::wait_mbarrier(barrier, 1);
  }
  if (!has(p, "store that is not waited for")) gpu::wait_mbarrier(barrier, 0);
  const uint32_t got = reinterpret_cast<const uint32_t*>(shared + thread * 16)[1];
  if (got != 2) gpu::fibers::fail("not what was stored");
  gpu::cluster_barrier_arrive();
  gpu::cluster_barrier_wait();
}

// CTA 0 writes what CTA 1 reads.
LSTM_FUSED_KERNEL(kThreads, 1) exchanges(const Params p) {
  volatile int* const value = reinterpret_cast<int*>(p.memory);
  char* const counter = p.memory + 64;
  const bool writes = gpu::block_index().x == 0 && gpu::thread_index() == 0;
  if (has(p, "unordered writes") && gpu::thread_index() == 0) *value = 1;
  if (writes && !has(p, "read before the release")) *value = 1;
  gpu::sync_block();
  gpu::barrier_arrive(counter);
  if (writes && has(p, "read before the release")) *value = 1;
  if (has(p, "read without acquire"))
    for (int i = 0; i < 50; ++i) gpu::sync_block();  // until the other one has written
  else
    gpu::barrier_wait(counter, 2);
  if (gpu::block_index().x == 1 && *value != 1) gpu::fibers::fail("not what was written");
}

const char* launch(void (*kernel)(Params), const Params& p, int cluster, bool cooperative = false) {
  gpu::ConfiguredDevices configured;
  const gpu::LaunchConfig config{dim3(2), kThreads, kShared, cluster, cooperative, nullptr};
  return gpu::launch_kernel(kernel, config, p, configured);
}

}  // namespace

// Prints what the emulation says of it. Exits 1 where it says something.
int main(int, char** arguments) {
  std::vector<char, gpu::GuardedAllocator<char>> memory(kShared);
  const Params p{arguments[1], memory.data()};
  const char* error = launch(accesses, p, 0);
  if (!error) error = launch(copies, p, 0);
  if (!error) error = launch(lanes, p, 0);
  if (!error) error = launch(clusters, p, kClusterCtas);
  if (!error) error = launch(stores, p, kClusterCtas);
  std::fill(memory.begin(), memory.end(), 0);
  if (!error) error = launch(exchanges, p, 0, true);
  if (!error) error = gpu::damage_of_allocations();
  std::puts(error ? error : "no error");
  return error != nullptr;
}
