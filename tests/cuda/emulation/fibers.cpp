// The scheduler behind primitives_host.h. LSTM_FUSED_EMULATION_SEED=<n> runs fibers in a random
// order; LSTM_FUSED_EMULATION_WITHOUT=block, cluster, counter or copies leaves that kind of waiting
// out, for the test that the sanitizer would notice.
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <list>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "primitives_host.h"

// This file itself is not instrumented: what it does is not what is watched. Its memcpy and memset
// are, being calls.
#if defined(LSTM_FUSED_WATCHED)
#include <sanitizer/tsan_interface.h>
#endif

namespace lstm_fused::cuda::fibers {
namespace {

#if defined(LSTM_FUSED_WATCHED)
void* new_thread() {
  return __tsan_create_fiber(0);
}
void* this_thread() {
  return __tsan_get_current_fiber();
}
void become(void* t, bool ordered) {
  __tsan_switch_to_fiber(t, ordered ? 0 : __tsan_switch_to_fiber_no_sync);
}
void release(void* p) {
  __tsan_release(p);
}
void acquire(void* p) {
  __tsan_acquire(p);
}
#else
void* new_thread() {
  return nullptr;
}
void* this_thread() {
  return nullptr;
}
void become(void*, bool) {}
void release(void*) {}
void acquire(void*) {}
#endif

constexpr size_t kStack = 256 << 10;

// Where a fixed number of fibers meet again and again. Two places to order them by, so that one
// that comes early for the next meeting does not order one that is late for this.
struct Meeting {
  int wanted = 0, arrived = 0;
  unsigned generation = 0;
  char order[2] = {};
};

struct Warp {
  Meeting meeting;
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
  Meeting meeting;
  std::vector<Warp> warps;
};
struct Cluster {
  Meeting meeting;
  std::vector<Block> blocks;
};

struct Fiber {
  ucontext_t context;  // how it begins
  bool begun = false;
  void* place[5];  // where it waits
  Block* block;
  int thread;
  bool done = false;
  unsigned cluster_turn = 0;  // the meeting it has arrived at
  char* cluster_order = nullptr;
  std::vector<std::vector<Copy>> groups{1};  // the last is not committed yet
  void* watched;
};

struct Grid {
  dim3 blocks;
  int threads;
  const std::function<void()>* kernel;
};

Grid grid;
Fiber* current;
void* home[5];
void* home_thread;
bool progress;
// Kept from launch to launch.
std::vector<char*> stacks;
std::vector<void*> watched;

bool leaves_out(const char* what) {
  static const char* wanted = std::getenv("LSTM_FUSED_EMULATION_WITHOUT");
  return wanted && std::string(wanted) == what;
}

// The compiler's own, since swapcontext asks the kernel each time. noipa: to their callers they
// must look as if they changed every register that a call may.
__attribute__((noipa, noreturn)) void jump(void** place) {
  __builtin_longjmp(place, 1);
}

__attribute__((noipa)) void yield() {
  Fiber* self = current;
  become(home_thread, false);
  if (!__builtin_setjmp(self->place)) jump(home);
}

__attribute__((noipa)) void resume(Fiber* f, bool ordered) {
  current = f;
  become(f->watched, ordered);
  if (__builtin_setjmp(home)) return;
  if (f->begun) jump(f->place);
  f->begun = true;
  setcontext(&f->context);
}

unsigned arrive(Meeting& m) {
  const unsigned mine = m.generation;
  if (++m.arrived == m.wanted) {
    m.arrived = 0;
    ++m.generation;
  }
  progress = true;
  return mine;
}
bool waiting(const Meeting& m, unsigned mine) {
  return m.generation == mine;
}
char* order_of(Meeting& m) {
  return &m.order[m.generation & 1];
}

void meet(Meeting& m, bool ordered) {
  char* order = order_of(m);
  if (ordered) release(order);
  const unsigned mine = arrive(m);
  while (waiting(m, mine)) yield();
  if (ordered) acquire(order);
}

void finish() {
  current->done = true;
  progress = true;
}

void begin() {
  (*grid.kernel)();
  finish();
  become(home_thread, true);
  jump(home);
}

char* stack(size_t i) {
  while (stacks.size() <= i) {
    void* p = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) std::abort();
    stacks.push_back(static_cast<char*>(p));
  }
  return stacks[i];
}

void start(Fiber& f, size_t i) {
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = stack(i);
  f.context.uc_stack.ss_size = kStack;
  f.context.uc_link = nullptr;
  makecontext(&f.context, begin, 0);
  while (watched.size() <= i) watched.push_back(new_thread());
  f.watched = watched[i];
}

// In turns until all are done; false if a whole round brings nobody further.
bool run_all(std::vector<Fiber>& fibers) {
  static const char* seed = std::getenv("LSTM_FUSED_EMULATION_SEED");
  std::mt19937 random(seed ? static_cast<unsigned>(std::atoi(seed)) : 0);
  std::vector<Fiber*> left;
  for (Fiber& f : fibers) left.push_back(&f);
  home_thread = this_thread();
  bool first = true;
  while (!left.empty()) {
    if (seed) std::shuffle(left.begin(), left.end(), random);
    progress = false;
    // What the host wrote before the launch is seen by all; nothing that fibers write.
    for (Fiber* f : left) resume(f, first);
    first = false;
    left.erase(std::remove_if(left.begin(), left.end(), [](Fiber* f) { return f->done; }),
               left.end());
    if (!progress) return false;
  }
  return true;
}

void lay_out(Cluster& cluster, const std::vector<dim3>& indices, int64_t shared_bytes) {
  const int warps = grid.threads / 32;
  cluster.meeting.wanted = static_cast<int>(indices.size()) * grid.threads;
  cluster.blocks.resize(indices.size());
  for (size_t i = 0; i < indices.size(); ++i) {
    Block& b = cluster.blocks[i];
    b.index = indices[i];
    b.rank = static_cast<int>(i);
    b.cluster = &cluster;
    b.memory.reset(new char[shared_bytes + 128]);
    b.shared = b.memory.get() + (128 - reinterpret_cast<uintptr_t>(b.memory.get()) % 128) % 128;
    std::memset(b.shared, 0xff, shared_bytes);
    b.meeting.wanted = grid.threads;
    b.warps.resize(warps);
    for (Warp& w : b.warps) w.meeting.wanted = 32;
  }
}

// All blocks of these clusters at once.
bool run_together(std::list<Cluster>& clusters) {
  std::vector<Fiber> fibers;
  for (Cluster& c : clusters)
    for (Block& b : c.blocks)
      for (int t = 0; t < grid.threads; ++t) {
        fibers.emplace_back();
        fibers.back().block = &b;
        fibers.back().thread = t;
      }
  for (size_t i = 0; i < fibers.size(); ++i) start(fibers[i], i);
  return run_all(fibers);
}

}  // namespace

int thread() {
  return current->thread;
}
int threads() {
  return grid.threads;
}
dim3 block() {
  return current->block->index;
}
dim3 blocks() {
  return grid.blocks;
}
int rank() {
  return current->block->rank;
}
int cluster() {
  return static_cast<int>(current->block->cluster->blocks.size());
}
char* shared(int rank) {
  return current->block->cluster->blocks[rank].shared;
}

void sync_block() {
  if (!leaves_out("block")) meet(current->block->meeting, true);
}
void sync_warp() {
  meet(current->block->warps[current->thread / 32].meeting, true);
}
void arrive_cluster() {
  if (leaves_out("cluster")) return;
  Meeting& m = current->block->cluster->meeting;
  current->cluster_order = order_of(m);
  release(current->cluster_order);
  current->cluster_turn = arrive(m);
}
void wait_cluster() {
  if (leaves_out("cluster")) return;
  while (waiting(current->block->cluster->meeting, current->cluster_turn)) yield();
  acquire(current->cluster_order);
}

static void add(unsigned long long* counter) {
  ++*counter;
  progress = true;
}
static bool below(const unsigned long long* counter, unsigned long long target) {
  return *counter < target;
}

void add_to(unsigned long long* counter) {
  if (leaves_out("counter")) return;
  release(counter);
  add(counter);
}
void wait_for(unsigned long long* counter, unsigned long long target) {
  if (leaves_out("counter")) return;
  while (below(counter, target)) yield();
  acquire(counter);
}

void queue_copy(void* to, const void* from, bool valid) {
  current->groups.back().push_back({to, from, valid});
}
void commit() {
  current->groups.emplace_back();
}
static bool take(int pending, std::vector<Copy>& group) {
  auto& groups = current->groups;
  if (static_cast<int>(groups.size()) - 1 <= pending) return false;
  group = std::move(groups.front());
  groups.erase(groups.begin());
  return true;
}
void wait(int pending) {
  if (leaves_out("copies")) return;
  std::vector<Copy> group;
  while (take(pending, group))
    for (const Copy& c : group)
      if (c.valid)
        std::memcpy(c.to, c.from, 16);
      else
        std::memset(c.to, 0, 16);
}

static uint32_t (&deposit(const uint32_t (&mine)[8]))[32][8] {
  Warp& warp = current->block->warps[current->thread / 32];
  auto& words = warp.words[warp.meeting.generation & 1];
  for (int i = 0; i < 8; ++i) words[current->thread % 32][i] = mine[i];
  return words;
}
const Words& gather(const uint32_t (&mine)[8]) {
  Words& words = deposit(mine);
  meet(current->block->warps[current->thread / 32].meeting, false);
  return words;
}

const char* run(const std::function<void()>& kernel, dim3 blocks, int threads, int64_t shared_bytes,
                int cluster, bool cooperative) {
  Device device{};
  read_device(0, device);
  const int64_t count = int64_t{blocks.x} * blocks.y * blocks.z;
  if (shared_bytes > device.shared_bytes) return "more shared memory than the device has";
  if (cooperative && count > device.sms) return "too many blocks to be resident at once";
  if (cluster > device.cluster_ctas) return "too large a cluster";
  if (cluster && blocks.x % cluster) return "the grid is no multiple of the cluster";
  if (threads > 1024 || threads % 32) return "not a block's number of threads";
  grid = {blocks, threads, &kernel};
  std::vector<dim3> indices;
  std::list<Cluster> clusters;
  for (unsigned z = 0; z < blocks.z; ++z)
    for (unsigned y = 0; y < blocks.y; ++y)
      for (unsigned x = 0; x < blocks.x; ++x) {
        indices.emplace_back(x, y, z);
        if (static_cast<int>(indices.size()) < std::max(cluster, 1)) continue;
        clusters.emplace_back();
        lay_out(clusters.back(), indices, shared_bytes);
        indices.clear();
        if (cooperative) continue;
        if (!run_together(clusters)) return "deadlock";
        clusters.clear();
      }
  if (cooperative && !run_together(clusters)) return "deadlock";
  return nullptr;
}

}  // namespace lstm_fused::cuda::fibers
