// The scheduler of fibers.h. LSTM_FUSED_EMULATION_SEED=<n> runs the fibers in a random order.
// LSTM_FUSED_EMULATION_WITHOUT=block, cluster, counter or copies turns that kind of barrier off,
// for the tests that a missing one is detected.
#include "fibers.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <list>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "device.h"

// For the thread sanitizer this file is compiled without instrumentation, so that the scheduler's
// own accesses are not reported. Its memcpy and memset are calls, which the sanitizer intercepts.
#if defined(LSTM_FUSED_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

namespace lstm_fused::cuda::fibers {
namespace {

#if defined(LSTM_FUSED_TSAN)
void* tsan_create() {
  return __tsan_create_fiber(0);
}
void* tsan_current() {
  return __tsan_get_current_fiber();
}
// synchronize: what the fiber left did happens before what the fiber entered does.
void tsan_switch(void* fiber, bool synchronize) {
  __tsan_switch_to_fiber(fiber, synchronize ? 0 : __tsan_switch_to_fiber_no_sync);
}
void tsan_release(void* p) {
  __tsan_release(p);
}
void tsan_acquire(void* p) {
  __tsan_acquire(p);
}
#else
void* tsan_create() {
  return nullptr;
}
void* tsan_current() {
  return nullptr;
}
void tsan_switch(void*, bool) {}
void tsan_release(void*) {}
void tsan_acquire(void*) {}
#endif

constexpr size_t kStackBytes = 256 << 10;

// A reusable barrier. Consecutive generations synchronize through different addresses: an arrival
// at the next generation must not be ordered before a late return from this one.
struct Barrier {
  int expected = 0, arrived = 0;
  unsigned generation = 0;
  char addresses[2] = {};
};

struct Warp {
  Barrier barrier;
  uint32_t words[2][32][8];
};

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

struct Cluster;
struct Block {
  dim3 index;
  int rank;
  Cluster* cluster;
  std::unique_ptr<char[]> memory;
  char* shared;
  Barrier barrier;
  std::vector<Warp> warps;
};
struct Cluster {
  Barrier barrier;
  std::vector<Block> blocks;
};

struct Fiber {
  ucontext_t context;  // of its start
  bool started = false;
  void* jump_buffer[5];  // where it yielded
  Block* block;
  int thread;
  bool done = false;
  unsigned cluster_generation = 0;  // that it has arrived at
  char* cluster_address = nullptr;
  std::vector<std::vector<Copy>> groups{1};  // of copies; the last one is not committed yet
  void* tsan_fiber;
};

struct Grid {
  dim3 blocks;
  int threads;
  const std::function<void()>* kernel;
};

Grid grid;
Fiber* current;
void* scheduler[5];  // jump buffer
void* scheduler_tsan_fiber;
bool progress;  // whether a fiber has changed what another one may wait for
// Reused by all launches.
std::vector<char*> stacks;
std::vector<void*> tsan_fibers;

bool is_off(const char* kind) {
  static const char* off = std::getenv("LSTM_FUSED_EMULATION_WITHOUT");
  return off && std::string(off) == kind;
}

// The compiler's own longjmp: swapcontext would make a system call each time. noipa makes callers
// assume that the call changes every caller-saved register.
__attribute__((noipa, noreturn)) void jump(void** jump_buffer) {
  __builtin_longjmp(jump_buffer, 1);
}

__attribute__((noipa)) void yield() {
  Fiber* self = current;
  tsan_switch(scheduler_tsan_fiber, false);
  if (!__builtin_setjmp(self->jump_buffer)) jump(scheduler);
}

__attribute__((noipa)) void resume(Fiber* f, bool synchronize) {
  current = f;
  tsan_switch(f->tsan_fiber, synchronize);
  if (__builtin_setjmp(scheduler)) return;
  if (f->started) jump(f->jump_buffer);
  f->started = true;
  setcontext(&f->context);
}

// Returns the generation that is_waiting takes.
unsigned arrive(Barrier& b) {
  const unsigned generation = b.generation;
  if (++b.arrived == b.expected) {
    b.arrived = 0;
    ++b.generation;
  }
  progress = true;
  return generation;
}
bool is_waiting(const Barrier& b, unsigned generation) {
  return b.generation == generation;
}
char* address_of(Barrier& b) {
  return &b.addresses[b.generation & 1];
}

// synchronize: whether the barrier orders memory accesses.
void arrive_and_wait(Barrier& b, bool synchronize) {
  char* address = address_of(b);
  if (synchronize) tsan_release(address);
  const unsigned generation = arrive(b);
  while (is_waiting(b, generation)) yield();
  if (synchronize) tsan_acquire(address);
}

void finish() {
  current->done = true;
  progress = true;
}

void run_fiber() {
  (*grid.kernel)();
  finish();
  tsan_switch(scheduler_tsan_fiber, true);
  jump(scheduler);
}

char* stack(size_t i) {
  while (stacks.size() <= i) {
    void* p =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) std::abort();
    stacks.push_back(static_cast<char*>(p));
  }
  return stacks[i];
}

void prepare(Fiber& f, size_t i) {
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = stack(i);
  f.context.uc_stack.ss_size = kStackBytes;
  f.context.uc_link = nullptr;
  makecontext(&f.context, run_fiber, 0);
  while (tsan_fibers.size() <= i) tsan_fibers.push_back(tsan_create());
  f.tsan_fiber = tsan_fibers[i];
}

// Runs the fibers in turns until all are done. False if no fiber makes progress in a whole round.
bool run_all(std::vector<Fiber>& fibers) {
  static const char* seed = std::getenv("LSTM_FUSED_EMULATION_SEED");
  std::mt19937 random(seed ? static_cast<unsigned>(std::atoi(seed)) : 0);
  std::vector<Fiber*> left;
  for (Fiber& f : fibers) left.push_back(&f);
  scheduler_tsan_fiber = tsan_current();
  bool first = true;
  while (!left.empty()) {
    if (seed) std::shuffle(left.begin(), left.end(), random);
    progress = false;
    // All fibers see what the host wrote before the launch. A later switch synchronizes nothing.
    for (Fiber* f : left) resume(f, first);
    first = false;
    left.erase(std::remove_if(left.begin(), left.end(), [](Fiber* f) { return f->done; }),
               left.end());
    if (!progress) return false;
  }
  return true;
}

void allocate(Cluster& cluster, const std::vector<dim3>& indices, int64_t shared_bytes) {
  const int warps = grid.threads / 32;
  cluster.barrier.expected = static_cast<int>(indices.size()) * grid.threads;
  cluster.blocks.resize(indices.size());
  for (size_t i = 0; i < indices.size(); ++i) {
    Block& b = cluster.blocks[i];
    b.index = indices[i];
    b.rank = static_cast<int>(i);
    b.cluster = &cluster;
    b.memory.reset(new char[shared_bytes + 128]);
    b.shared = b.memory.get() + (128 - reinterpret_cast<uintptr_t>(b.memory.get()) % 128) % 128;
    std::memset(b.shared, 0xff, shared_bytes);
    b.barrier.expected = grid.threads;
    b.warps.resize(warps);
    for (Warp& w : b.warps) w.barrier.expected = 32;
  }
}

// Runs all blocks of these clusters concurrently.
bool run_clusters(std::list<Cluster>& clusters) {
  std::vector<Fiber> fibers;
  for (Cluster& c : clusters)
    for (Block& b : c.blocks)
      for (int t = 0; t < grid.threads; ++t) {
        fibers.emplace_back();
        fibers.back().block = &b;
        fibers.back().thread = t;
      }
  for (size_t i = 0; i < fibers.size(); ++i) prepare(fibers[i], i);
  return run_all(fibers);
}

Warp& own_warp() {
  return current->block->warps[current->thread / 32];
}

}  // namespace

int thread_index() {
  return current->thread;
}
int thread_count() {
  return grid.threads;
}
dim3 block_index() {
  return current->block->index;
}
dim3 block_count() {
  return grid.blocks;
}
int cluster_rank() {
  return current->block->rank;
}
int cluster_size() {
  return static_cast<int>(current->block->cluster->blocks.size());
}
char* shared_memory(int rank) {
  return current->block->cluster->blocks[rank].shared;
}

void sync_block() {
  if (!is_off("block")) arrive_and_wait(current->block->barrier, true);
}
void sync_warp() {
  arrive_and_wait(own_warp().barrier, true);
}
void cluster_barrier_arrive() {
  if (is_off("cluster")) return;
  Barrier& b = current->block->cluster->barrier;
  current->cluster_address = address_of(b);
  tsan_release(current->cluster_address);
  current->cluster_generation = arrive(b);
}
void cluster_barrier_wait() {
  if (is_off("cluster")) return;
  while (is_waiting(current->block->cluster->barrier, current->cluster_generation)) yield();
  tsan_acquire(current->cluster_address);
}

static void increment(unsigned long long* counter) {
  ++*counter;
  progress = true;
}
static bool is_below(const unsigned long long* counter, unsigned long long target) {
  return *counter < target;
}

void add_to_counter(unsigned long long* counter) {
  if (is_off("counter")) return;
  tsan_release(counter);
  increment(counter);
}
void wait_for_counter(unsigned long long* counter, unsigned long long target) {
  if (is_off("counter")) return;
  while (is_below(counter, target)) yield();
  tsan_acquire(counter);
}

namespace {
struct Mbarrier {
  int32_t bytes;  // that are to come
  uint16_t armed, phase;
};
static_assert(sizeof(Mbarrier) == 8);
void end_phase(Mbarrier& b) {
  if (b.armed && b.bytes == 0) {
    b.armed = 0;
    ++b.phase;
  }
  progress = true;
}
}  // namespace

void init_mbarrier(void* barrier) {
  *static_cast<Mbarrier*>(barrier) = {};
}
void arm_mbarrier(void* barrier, int bytes) {
  Mbarrier& b = *static_cast<Mbarrier*>(barrier);
  if (b.armed && !is_off("cluster")) std::abort();  // twice in a phase
  tsan_release(barrier);
  b.armed = 1;
  b.bytes += bytes;
  end_phase(b);
}
void count_bytes(void* barrier, int bytes) {
  Mbarrier& b = *static_cast<Mbarrier*>(barrier);
  tsan_release(barrier);
  b.bytes += bytes;
  end_phase(b);
}
void wait_mbarrier(void* barrier, int parity) {
  if (is_off("cluster")) return;
  const Mbarrier& b = *static_cast<const Mbarrier*>(barrier);
  while ((b.phase & 1) == parity) yield();
  tsan_acquire(barrier);
}

void enqueue_copy(void* to, const void* from, bool valid) {
  current->groups.back().push_back({to, from, valid});
}
void commit_copies() {
  current->groups.emplace_back();
}
// Takes the oldest committed group, if there are more than `pending`.
static bool take_group(int pending, std::vector<Copy>& group) {
  auto& groups = current->groups;
  if (static_cast<int>(groups.size()) - 1 <= pending) return false;
  group = std::move(groups.front());
  groups.erase(groups.begin());
  return true;
}
void wait_copies(int pending) {
  if (is_off("copies")) return;
  std::vector<Copy> group;
  while (take_group(pending, group))
    for (const Copy& c : group)
      if (c.valid)
        std::memcpy(c.to, c.from, 16);
      else
        std::memset(c.to, 0, 16);
}

static uint32_t (&store_words(const uint32_t (&own)[8]))[32][8] {
  Warp& warp = own_warp();
  auto& words = warp.words[warp.barrier.generation & 1];
  for (int i = 0; i < 8; ++i) words[current->thread % 32][i] = own[i];
  return words;
}
const LaneWords& exchange_words(const uint32_t (&own)[8]) {
  LaneWords& words = store_words(own);
  arrive_and_wait(own_warp().barrier, false);
  return words;
}

const char* launch(const std::function<void()>& kernel, dim3 blocks, int threads,
                   int64_t shared_bytes, int cluster, bool cooperative) {
  Device device{};
  read_device(0, device);
  const int64_t count = int64_t{blocks.x} * blocks.y * blocks.z;
  if (shared_bytes > device.shared_bytes) return "more shared memory than the device has";
  if (cooperative && count > device.sms) return "too many blocks to be resident at once";
  if (cluster > device.cluster_ctas) return "too large a cluster";
  if (cluster && blocks.x % cluster) return "the grid is no multiple of the cluster";
  if (threads > 1024 || threads % 32) return "a block cannot have this number of threads";
  grid = {blocks, threads, &kernel};
  std::vector<dim3> indices;
  std::list<Cluster> clusters;
  for (unsigned z = 0; z < blocks.z; ++z)
    for (unsigned y = 0; y < blocks.y; ++y)
      for (unsigned x = 0; x < blocks.x; ++x) {
        indices.emplace_back(x, y, z);
        if (static_cast<int>(indices.size()) < std::max(cluster, 1)) continue;
        clusters.emplace_back();
        allocate(clusters.back(), indices, shared_bytes);
        indices.clear();
        if (cooperative) continue;
        if (!run_clusters(clusters)) return "deadlock";
        clusters.clear();
      }
  if (cooperative && !run_clusters(clusters)) return "deadlock";
  return nullptr;
}

}  // namespace lstm_fused::cuda::fibers
