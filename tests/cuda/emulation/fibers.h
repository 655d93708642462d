// The emulation of a CUDA launch on the host: each CUDA thread is a fiber, and the fibers of a
// launch take turns on one OS thread.
//
// The barriers of a warp, a CTA, a cluster and a grid work as on a GPU. Asynchronous copies are
// performed by the wait that requires them, the latest time that is allowed. A launch in which no
// fiber can continue is reported as a deadlock. Under the thread sanitizer each fiber counts as a
// thread, and only barriers order the accesses of two fibers: the instructions of a warp do not,
// as on a GPU.
//
// The emulation does not show: the order in which other SMs see writes to memory (a missing fence,
// a stale L1 line), bank conflicts, speed, and whether a device accepts the launch.
#pragma once

#include <cstdint>
#include <functional>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// All functions but `launch` are called by the running fiber and concern it.
namespace lstm_fused::cuda::fibers {

int thread_index();
int thread_count();
dim3 block_index();
dim3 block_count();
int cluster_rank();
int cluster_size();
char* shared_memory(int rank);  // of the CTA of this rank in the fiber's cluster

void sync_block();
void sync_warp();
void cluster_barrier_arrive();
void cluster_barrier_wait();
void add_to_counter(unsigned long long* counter);
void wait_for_counter(unsigned long long* counter, unsigned long long target);

// An mbarrier: 8 bytes of shared memory. A phase ends when it was armed and as many bytes were
// counted as it was armed for.
void init_mbarrier(void* barrier);
void arm_mbarrier(void* barrier, int bytes);
void count_bytes(void* barrier, int bytes);  // minus those that have arrived
void wait_mbarrier(void* barrier, int parity);

void enqueue_copy(void* to, const void* from, bool valid);
void commit_copies();
void wait_copies(int pending);

// The operands of all 32 lanes for an instruction of a warp, 8 words each. Returns when every lane
// has called it.
using LaneWords = uint32_t[32][8];
const LaneWords& exchange_words(const uint32_t (&own)[8]);

// Runs the kernel in every thread of the grid. Returns null, or why the launch fails.
const char* launch(const std::function<void()>& kernel, dim3 grid, int threads,
                   int64_t shared_bytes, int cluster, bool cooperative);

}  // namespace lstm_fused::cuda::fibers
