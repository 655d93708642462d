// The emulation of a CUDA launch on the host: each CUDA thread is a fiber, and the fibers of a
// launch take turns on one OS thread.
//
// The barriers of a warp, a CTA, a cluster and a grid work as on a GPU. With a seed, CTAs, warps
// and lanes take turns in a random order, and asynchronous copies and stores happen at any time
// that is allowed; without one in order, and as late as they may. Until then there is poison where
// they go to. Under the thread sanitizer each fiber counts as a thread, and only barriers order the
// accesses of two fibers: the instructions of a warp do not, as on a GPU.
//
// A launch fails, with a message that names the CTA and the thread, where
//   - no fiber can continue;
//   - a fiber accesses memory outside of shared memory or of a guarded tensor (memory.h), or at an
//     address that is not aligned as its type is; undefined arithmetic counts as well;
//   - a copy or ldmatrix is not aligned to 16 bytes or not within the CTA's shared memory;
//   - a CTA reads or overwrites what another one wrote, and has not acquired it (accesses.cpp);
//   - the lanes of a warp are at different instructions that need all of them;
//   - a thread arrives at the cluster's barrier twice or waits without having arrived;
//   - an mbarrier is not initialized, or is armed twice in a phase;
//   - a store goes to no CTA of the cluster, or to one that exits;
//   - a thread exits while a copy, a store to its CTA or its half of a barrier is pending.
//
// The emulation does not show: whether the device's fences are as strong as the barriers here, bank
// conflicts, speed, and whether a device accepts the launch.
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

// Ends the launch with an error.
[[noreturn]] void fail(const char* what);

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
void wait_mbarrier(void* barrier, int parity);
// Stores 16 bytes in the shared memory of a CTA of the cluster and counts them at an mbarrier
// there, at any time from now on until a thread waits for the phase.
void store_async(void* to, const void* bytes, void* barrier);

void enqueue_copy(void* to, const void* from, bool valid);
void commit_copies();
void wait_copies(int pending);

// Fails unless these bytes are of the CTA's shared memory and aligned to their number.
void check_shared(const void* p, int bytes);

// The operands of all 32 lanes for an instruction of a warp, 8 words each. Returns when every lane
// has called it.
using LaneWords = uint32_t[32][8];
const LaneWords& exchange_words(const char* instruction, const uint32_t (&own)[8]);

// Runs the kernel in every thread of the grid. Returns null, or why the launch fails.
const char* launch(const std::function<void()>& kernel, dim3 grid, int threads,
                   int64_t shared_bytes, int cluster, bool cooperative);

}  // namespace lstm_fused::cuda::fibers
