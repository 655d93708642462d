// What the files of the emulation share behind fibers.h.
//
// For the thread sanitizer they are compiled without instrumentation, so that their own accesses
// are not reported. Their memcpy and memset are calls, which the sanitizer intercepts.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "fibers.h"
#include "memory.h"

#if defined(LSTM_FUSED_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

namespace lstm_fused::cuda::fibers {

#if defined(LSTM_FUSED_TSAN)
inline void* tsan_create() {
  return __tsan_create_fiber(0);
}
inline void tsan_destroy(void* fiber) {
  __tsan_destroy_fiber(fiber);
}
inline void* tsan_current() {
  return __tsan_get_current_fiber();
}
// synchronize: what the fiber left did happens before what the fiber entered does.
inline void tsan_switch(void* fiber, bool synchronize) {
  __tsan_switch_to_fiber(fiber, synchronize ? 0 : __tsan_switch_to_fiber_no_sync);
}
inline void tsan_release(void* p) {
  __tsan_release(p);
}
inline void tsan_acquire(void* p) {
  __tsan_acquire(p);
}
#else
inline void* tsan_create() {
  return nullptr;
}
inline void tsan_destroy(void*) {}
inline void* tsan_current() {
  return nullptr;
}
inline void tsan_switch(void*, bool) {}
inline void tsan_release(void*) {}
inline void tsan_acquire(void*) {}
#endif

// A reusable barrier. Consecutive generations synchronize through different addresses: an arrival
// at the next generation must not be ordered before a late return from this one.
struct Barrier {
  int expected = 0, arrived = 0;
  unsigned generation = 0;
  char addresses[2] = {};
};

struct Warp {
  Barrier barrier;
  const char* instruction;  // that the lanes which have arrived are at
  uint32_t words[2][32][8];
};

constexpr size_t kVectorBytes = 16;
struct Copy {
  void* to;
  const void* from;
  enum { kLate, kRead, kDone } state;
  char bytes[kVectorBytes];  // once read
};

// By st.async, under way to another CTA.
struct Store {
  char *to, *barrier;  // in its shared memory
  char bytes[kVectorBytes];
};

// What a CTA has seen of each CTA that it can synchronize with, and what its own writes belong to
// now: accesses.cpp.
using Epochs = std::vector<uint32_t>;

struct Cluster;
struct Block {
  dim3 index;
  uint32_t number, first;  // in the launch; of the first CTA in `epochs`
  Epochs epochs;           // empty where it synchronizes with no other
  int rank;
  Cluster* cluster;
  std::unique_ptr<GuardedMemory> memory;
  char* shared;
  bool exiting = false;       // whether a thread has exited
  std::vector<Store> stores;  // that have not arrived
  Barrier barrier;
  std::vector<Warp> warps;
};
struct Cluster {
  Barrier barrier;
  Epochs epochs;  // released at its barrier
  std::vector<Block> blocks;
};

inline constexpr size_t kStackBytes = 256 << 10;

struct Fiber {
  ucontext_t context;  // of its start
  char* stack = nullptr;
  bool started = false;
  void* jump_buffer[5];  // where it yielded
  void* tsan_fiber = nullptr;

  Block* block;
  int thread;
  bool done;
  const Barrier* waits_for;  // until it is past this generation; or null
  unsigned generation;
  bool arrived_at_cluster;
  unsigned cluster_generation;  // that it has arrived at
  char* cluster_address;
  std::vector<Copy> copies;    // not waited for
  std::vector<size_t> groups;  // that are committed: the end of each in `copies`
};

struct Grid {
  dim3 blocks;
  int threads;
  int64_t shared_bytes;
  const std::function<void()>* kernel;
};

// xorshift64*. Returns zeros without a seed.
struct Random {
  uint64_t state = 0;
  explicit Random(uint64_t seed) : state(seed * 0x9e3779b97f4a7c15u) {}
  bool is_on() const { return state != 0; }
  uint32_t operator()() {
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return static_cast<uint32_t>(state * 0x2545f4914f6cdd1du >> 32);
  }
  size_t below(size_t n) { return (*this)() % n; }
  bool one_in(int n) { return is_on() && below(n) == 0; }
  template <class T>
  void shuffle(std::vector<T>& v) {
    if (!is_on()) return;
    for (size_t i = v.size(); i > 1; --i) std::swap(v[i - 1], v[below(i)]);
  }
};

extern Grid grid;
extern Random random;
extern Fiber* current;  // null while the scheduler runs
extern void* scheduler_tsan_fiber;
extern bool progress;  // whether a fiber has changed what another one may wait for

// Whether LSTM_FUSED_EMULATION_WITHOUT turns this kind of barrier off.
bool is_off(const char* kind);

// Lets the other fibers run.
void yield();

// The running fiber's stack and its CTA's shared memory, which no other CTA accesses.
struct OwnMemory {
  uintptr_t stack, shared;
  size_t shared_bytes;
};
extern OwnMemory own_memory;

// Before a fiber accesses memory, its own or global.
void on_access(const void* p, size_t bytes, bool writes);
void begin_launch();
// At a barrier, whose epochs are given: publishes the CTA's writes, and sees those of others.
void release(Epochs& to);
void acquire(const Epochs& from);
Epochs& epochs_of(const void* counter);

bool is_waiting(const Barrier& b, unsigned generation);

// For the sanitizer what this scope does is the scheduler's: its data are of several fibers.
struct AsScheduler {
  AsScheduler() { tsan_switch(scheduler_tsan_fiber, false); }
  ~AsScheduler() { tsan_switch(current->tsan_fiber, false); }
};

}  // namespace lstm_fused::cuda::fibers
