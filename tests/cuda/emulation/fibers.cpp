// The scheduler of fibers.h. LSTM_FUSED_EMULATION_SEED=<n> makes it random, 0 does not.
// LSTM_FUSED_EMULATION_WITHOUT=block, cluster, counter or copies turns that kind of barrier off,
// for the tests that a missing one is detected.
#include "fibers.h"

#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "device.h"
#include "memory.h"

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
void tsan_destroy(void* fiber) {
  __tsan_destroy_fiber(fiber);
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
void tsan_destroy(void*) {}
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

struct Cluster;
struct Block {
  dim3 index;
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
  std::vector<Block> blocks;
};

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

unsigned initial_seed() {
  const char* seed = std::getenv("LSTM_FUSED_EMULATION_SEED");
  return seed ? static_cast<unsigned>(std::atoi(seed)) : 0;
}

Grid grid;
Random random(initial_seed());
Fiber* current;      // null while the scheduler runs
void* scheduler[5];  // jump buffer
void* scheduler_tsan_fiber;
bool progress;  // whether a fiber has changed what another one may wait for
bool failed;
char message[200];         // of the failure
std::deque<Fiber> fibers;  // reused by all launches

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
  if (__builtin_setjmp(scheduler)) {
    current = nullptr;
    return;
  }
  if (f->started) jump(f->jump_buffer);
  f->started = true;
  setcontext(&f->context);
}

// For the sanitizer what this scope does is the scheduler's: its data are of several fibers.
struct AsScheduler {
  AsScheduler() { tsan_switch(scheduler_tsan_fiber, false); }
  ~AsScheduler() { tsan_switch(current->tsan_fiber, false); }
};

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
// The scheduler does not resume the fiber before.
void wait_until_past(const Barrier& b, unsigned generation) {
  while (is_waiting(b, generation)) {
    current->waits_for = &b;
    current->generation = generation;
    yield();
  }
  current->waits_for = nullptr;
}
char* address_of(Barrier& b) {
  return &b.addresses[b.generation & 1];
}

// synchronize: whether the barrier orders memory accesses.
void arrive_and_wait(Barrier& b, bool synchronize) {
  char* address = address_of(b);
  if (synchronize) tsan_release(address);
  wait_until_past(b, arrive(b));
  if (synchronize) tsan_acquire(address);
}

// All lanes of a warp must be at the same instruction.
void arrive_and_wait(Warp& warp, const char* instruction, bool synchronize) {
  if (warp.barrier.arrived == 0) warp.instruction = instruction;
  if (std::strcmp(warp.instruction, instruction) != 0)
    fail("the lanes of a warp are at different instructions");
  arrive_and_wait(warp.barrier, synchronize);
}

void finish() {
  if (!current->copies.empty() && !is_off("copies")) fail("a copy is pending at exit");
  if (!current->block->stores.empty() && !is_off("cluster"))
    fail("a CTA exits while a store to it is under way");
  if (current->arrived_at_cluster) fail("a thread exits between arrive and wait");
  current->done = current->block->exiting = true;
  progress = true;
}

// The context stays for the next launch.
__attribute__((noipa)) void leave() {
  Fiber* self = current;
  tsan_switch(scheduler_tsan_fiber, true);
  if (!__builtin_setjmp(self->jump_buffer)) jump(scheduler);
}

void run_fiber() {
  for (;;) {
    (*grid.kernel)();
    finish();
    leave();
  }
}

void prepare(Fiber& f, Block& block, int thread) {
  if (!f.stack) {
    void* p =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) std::abort();
    f.stack = static_cast<char*>(p);
  }
  if (!f.started) {
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack;
    f.context.uc_stack.ss_size = kStackBytes;
    f.context.uc_link = nullptr;
    makecontext(&f.context, run_fiber, 0);
    if (f.tsan_fiber) tsan_destroy(f.tsan_fiber);
    f.tsan_fiber = tsan_create();
  }
  f.block = &block;
  f.thread = thread;
  f.done = f.arrived_at_cluster = false;
  f.waits_for = nullptr;
  f.copies.clear();
  f.groups.clear();
}

// Resumes the lanes of a warp that can continue. Returns how many exited.
int run_warp(Fiber* const* lanes, bool first) {
  int exited = 0;
  const size_t order = random() % 32;
  for (size_t i = 0; i < 32 && !failed; ++i) {
    Fiber& f = *lanes[i ^ order];
    if (f.done || (f.waits_for && is_waiting(*f.waits_for, f.generation))) continue;
    resume(&f, first);
    exited += f.done;
  }
  return exited;
}

// Runs the first fibers, in whole warps, until all are done. False if no fiber makes progress in a
// whole round, or one has failed.
bool run_all(size_t count) {
  std::vector<Fiber*> running;
  std::vector<size_t> warps;
  for (size_t i = 0; i < count; ++i) running.push_back(&fibers[i]);
  for (size_t w = 0; w < count / 32; ++w) warps.push_back(w);
  scheduler_tsan_fiber = tsan_current();
  bool first = true, hold = true;
  while (count > 0) {
    random.shuffle(warps);
    bool any = false, held = false;
    for (const size_t w : warps) {
      // Some warps fall behind, and others run on as far as they can.
      if (!first && hold && random.one_in(8)) {
        held = true;
        continue;
      }
      size_t turns = 1 + random() % 8;
      do {
        progress = false;
        // All fibers see what the host wrote before the launch. A later switch synchronizes
        // nothing.
        count -= run_warp(&running[w * 32], first);
        if (failed) return false;
        any = any || progress;
      } while (progress && !first && --turns > 0);
    }
    first = false;
    if (!any && !held) return false;
    hold = any;
  }
  return true;
}

void allocate(Cluster& cluster, const std::vector<dim3>& indices) {
  const int warps = grid.threads / 32;
  cluster.barrier.expected = static_cast<int>(indices.size()) * grid.threads;
  cluster.blocks.resize(indices.size());
  for (size_t i = 0; i < indices.size(); ++i) {
    Block& b = cluster.blocks[i];
    b.index = indices[i];
    b.rank = static_cast<int>(i);
    b.cluster = &cluster;
    b.memory = borrow_memory(round_up(grid.shared_bytes, 32 << 10) + 128);
    b.shared = b.memory->take(grid.shared_bytes, 128);
    b.barrier.expected = grid.threads;
    b.warps.resize(warps);
    for (Warp& w : b.warps) w.barrier.expected = 32;
  }
}

// Runs all blocks of these clusters concurrently. Null, or why it fails.
const char* run_clusters(std::list<Cluster>& clusters) {
  size_t count = 0;
  for (Cluster& c : clusters)
    for (Block& b : c.blocks)
      for (int t = 0; t < grid.threads; ++t, ++count) {
        if (fibers.size() == count) fibers.emplace_back();
        prepare(fibers[count], b, t);
      }
  failed = false;
  const bool good = run_all(count);
  // The contexts that cannot continue are made anew.
  if (!good)
    for (Fiber& f : fibers) f.started = f.started && f.done;
  const char* damage = nullptr;
  for (Cluster& c : clusters)
    for (Block& b : c.blocks) {
      if (!damage) damage = b.memory->damage();
      give_back(std::move(b.memory));
    }
  return failed ? message : !good ? "deadlock" : damage;
}

// Reports a signal that a fiber's access raises as its failure.
class FaultHandler {
 public:
  FaultHandler() {
    struct sigaction action = {};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &action, &before_[i]);
  }
  ~FaultHandler() {
    for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &before_[i], nullptr);
  }

 private:
  static constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
  struct sigaction before_[std::size(kSignals)];

  static void handle(int number, siginfo_t*, void*) {
    if (!current) {
      signal(number, SIG_DFL);  // the instruction runs again
      return;
    }
    // -fsanitize-undefined-trap-on-error ends in SIGILL.
    fail(number == SIGSEGV || number == SIGBUS ? "an access outside of memory"
                                               : "a misaligned access or undefined arithmetic");
  }
};

Warp& own_warp() {
  return current->block->warps[current->thread / 32];
}

}  // namespace

// For Python, before each test.
extern "C" __attribute__((visibility("default"))) void lstm_fused_emulation_restart() {
  random = Random(initial_seed());
}

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

void fail(const char* what) {
  const dim3& b = current->block->index;
  std::snprintf(message, sizeof message, "%s: CTA (%u, %u, %u), thread %d", what, b.x, b.y, b.z,
                current->thread);
  failed = true;
  tsan_switch(scheduler_tsan_fiber, false);
  jump(scheduler);
}

void sync_block() {
  if (!is_off("block")) arrive_and_wait(current->block->barrier, true);
}
void sync_warp() {
  arrive_and_wait(own_warp(), "syncwarp", true);
}
static void check_shared_of(const Block& block, const void* p, int bytes) {
  const int64_t at = static_cast<const char*>(p) - block.shared;
  if (at < 0 || at + bytes > grid.shared_bytes) fail("an access outside of shared memory");
  if (at % bytes != 0) fail("a misaligned access to shared memory");
}
void check_shared(const void* p, int bytes) {
  check_shared_of(*current->block, p, bytes);
}

void cluster_barrier_arrive() {
  if (is_off("cluster")) return;
  if (current->arrived_at_cluster) fail("a thread arrives twice at the cluster's barrier");
  current->arrived_at_cluster = true;
  Barrier& b = current->block->cluster->barrier;
  current->cluster_address = address_of(b);
  tsan_release(current->cluster_address);
  current->cluster_generation = arrive(b);
}
void cluster_barrier_wait() {
  if (is_off("cluster")) return;
  if (!current->arrived_at_cluster) fail("a thread waits for a barrier that it has not arrived at");
  wait_until_past(current->block->cluster->barrier, current->cluster_generation);
  current->arrived_at_cluster = false;
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

// In shared memory.
struct Mbarrier {
  int32_t bytes;  // that are to come
  uint16_t armed, phase;
};
static_assert(sizeof(Mbarrier) == 8);

static Mbarrier& mbarrier_at(void* p) {
  Mbarrier& b = *static_cast<Mbarrier*>(p);
  if (b.armed > 1) fail("an mbarrier that is not initialized");
  return b;
}
static void count_bytes(Mbarrier& b, int bytes) {
  b.bytes += bytes;
  if (b.armed && b.bytes == 0) {
    b.armed = 0;
    ++b.phase;
  }
  progress = true;
}

void init_mbarrier(void* barrier) {
  check_shared(barrier, sizeof(Mbarrier));
  *static_cast<Mbarrier*>(barrier) = {};
}
void arm_mbarrier(void* barrier, int bytes) {
  check_shared(barrier, sizeof(Mbarrier));
  Mbarrier& b = mbarrier_at(barrier);
  if (b.armed && !is_off("cluster")) fail("an mbarrier is armed twice in a phase");
  tsan_release(barrier);
  b.armed = 1;
  count_bytes(b, bytes);
}

// Not by memcpy: the sanitizer has the store where it was issued.
static void arrive_store(const Store& store) {
  for (size_t i = 0; i < kVectorBytes; ++i)
    const_cast<volatile char*>(store.to)[i] = store.bytes[i];
  count_bytes(mbarrier_at(store.barrier), -static_cast<int>(kVectorBytes));
}
void store_async(void* to, const void* bytes, void* barrier) {
  std::vector<Block>& blocks = current->block->cluster->blocks;
  const auto owner = std::find_if(blocks.begin(), blocks.end(), [&](const Block& b) {
    const int64_t at = static_cast<char*>(to) - b.shared;
    return at >= 0 && at < grid.shared_bytes;
  });
  if (owner == blocks.end()) fail("a store to no CTA of the cluster");
  check_shared_of(*owner, to, kVectorBytes);
  check_shared_of(*owner, barrier, sizeof(Mbarrier));
  if (owner->exiting) fail("a store to a CTA that exits");
  mbarrier_at(barrier);
  Store store{static_cast<char*>(to), static_cast<char*>(barrier), {}};
  std::memcpy(store.bytes, bytes, kVectorBytes);
  std::memset(to, 0xff, kVectorBytes);  // poison
  tsan_release(barrier);
  if (random.one_in(2)) return arrive_store(store);
  const AsScheduler scope;
  owner->stores.push_back(store);
}
void wait_mbarrier(void* barrier, int parity) {
  check_shared(barrier, sizeof(Mbarrier));
  if (is_off("cluster")) return;
  const Mbarrier& b = mbarrier_at(barrier);
  std::vector<Store>& stores = current->block->stores;
  while ((b.phase & 1) == parity) {
    {
      // Some of the stores that are under way, in any order.
      const AsScheduler scope;
      random.shuffle(stores);
      const size_t later = random.is_on() ? stores.size() / 2 : 0;
      for (; stores.size() > later; stores.pop_back()) arrive_store(stores.back());
    }
    if ((b.phase & 1) == parity) yield();
  }
  tsan_acquire(barrier);
}

static void read_source(Copy& copy) {
  if (copy.from)
    std::memcpy(copy.bytes, copy.from, kVectorBytes);
  else
    std::memset(copy.bytes, 0, kVectorBytes);
  copy.state = Copy::kRead;
}
static void complete(Copy& copy) {
  if (copy.state == Copy::kLate) read_source(copy);
  if (copy.state == Copy::kRead) std::memcpy(copy.to, copy.bytes, kVectorBytes);
  copy.state = Copy::kDone;
}

void enqueue_copy(void* to, const void* from, bool valid) {
  check_shared(to, kVectorBytes);
  if (reinterpret_cast<uintptr_t>(from) % kVectorBytes != 0) fail("a copy's source is misaligned");
  Copy copy{to, valid ? from : nullptr, Copy::kLate, {}};
  if (random.one_in(2)) read_source(copy);
  if (copy.state == Copy::kRead && random.one_in(2))
    complete(copy);
  else
    std::memset(to, 0xff, kVectorBytes);  // poison
  current->copies.push_back(copy);
}
void commit_copies() {
  current->groups.push_back(current->copies.size());
}
void wait_copies(int pending) {
  if (is_off("copies")) return;
  std::vector<Copy>& copies = current->copies;
  std::vector<size_t>& groups = current->groups;
  const int finished = static_cast<int>(groups.size()) - pending;
  if (finished <= 0) return;
  const size_t end = groups[finished - 1];
  for (size_t i = 0; i < end; ++i) complete(copies[i]);
  copies.erase(copies.begin(), copies.begin() + end);
  groups.erase(groups.begin(), groups.begin() + finished);
  for (size_t& group : groups) group -= end;
}

static uint32_t (&store_words(const uint32_t (&own)[8]))[32][8] {
  Warp& warp = own_warp();
  auto& words = warp.words[warp.barrier.generation & 1];
  for (int i = 0; i < 8; ++i) words[current->thread % 32][i] = own[i];
  return words;
}
const LaneWords& exchange_words(const char* instruction, const uint32_t (&own)[8]) {
  LaneWords& words = store_words(own);
  arrive_and_wait(own_warp(), instruction, false);
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
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  const FaultHandler handler;
  grid = {blocks, threads, shared_bytes, &kernel};
  std::vector<dim3> indices;
  for (unsigned z = 0; z < blocks.z; ++z)
    for (unsigned y = 0; y < blocks.y; ++y)
      for (unsigned x = 0; x < blocks.x; ++x) indices.emplace_back(x, y, z);
  const size_t size = std::max(cluster, 1);
  std::vector<size_t> order;
  for (size_t i = 0; i < indices.size(); i += size) order.push_back(i);
  random.shuffle(order);
  std::list<Cluster> clusters;
  for (const size_t first : order) {
    clusters.emplace_back();
    allocate(clusters.back(), {indices.begin() + first, indices.begin() + first + size});
    if (cooperative && first != order.back()) continue;
    if (const char* error = run_clusters(clusters)) return error;
    clusters.clear();
  }
  return nullptr;
}

}  // namespace lstm_fused::cuda::fibers
