// The scheduler of fibers.h. LSTM_FUSED_EMULATION_SEED=<n> makes it random, 0 does not.
// LSTM_FUSED_EMULATION_WITHOUT=block, cluster, counter or copies turns that kind of barrier off,
// for the tests that a missing one is detected.
#include "fibers.h"

#include <signal.h>
#include <sys/mman.h>

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
#include "state.h"

namespace lstm_fused::cuda::fibers {
namespace {

unsigned initial_seed() {
  const char* seed = std::getenv("LSTM_FUSED_EMULATION_SEED");
  return seed ? static_cast<unsigned>(std::atoi(seed)) : 0;
}

void* scheduler[5];  // jump buffer
bool failed;
char message[200];         // of the failure
std::deque<Fiber> fibers;  // reused by all launches

// The compiler's own longjmp: swapcontext would make a system call each time. noipa makes callers
// assume that the call changes every caller-saved register.
__attribute__((noipa, noreturn)) void jump(void** jump_buffer) {
  __builtin_longjmp(jump_buffer, 1);
}

}  // namespace

Grid grid;
Random random(initial_seed());
Fiber* current;
void* scheduler_tsan_fiber;
bool progress;

bool is_off(const char* kind) {
  static const char* off = std::getenv("LSTM_FUSED_EMULATION_WITHOUT");
  return off && std::string(off) == kind;
}

__attribute__((noipa)) void yield() {
  Fiber* self = current;
  tsan_switch(scheduler_tsan_fiber, false);
  if (!__builtin_setjmp(self->jump_buffer)) jump(scheduler);
}

bool is_waiting(const Barrier& b, unsigned generation) {
  return b.generation == generation;
}

namespace {

__attribute__((noipa)) void resume(Fiber* f, bool synchronize) {
  current = f;
  own_memory = {reinterpret_cast<uintptr_t>(f->stack),
                reinterpret_cast<uintptr_t>(f->block->shared),
                static_cast<size_t>(grid.shared_bytes)};
  tsan_switch(f->tsan_fiber, synchronize);
  if (__builtin_setjmp(scheduler)) {
    current = nullptr;
    return;
  }
  if (f->started) jump(f->jump_buffer);
  f->started = true;
  setcontext(&f->context);
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

// first: number of its first block in the launch. all: how many blocks synchronize with each other.
void allocate(Cluster& cluster, const std::vector<dim3>& indices, size_t first, size_t all) {
  const int warps = grid.threads / 32;
  cluster.barrier.expected = static_cast<int>(indices.size()) * grid.threads;
  cluster.blocks.resize(indices.size());
  for (size_t i = 0; i < indices.size(); ++i) {
    Block& b = cluster.blocks[i];
    b.index = indices[i];
    b.rank = static_cast<int>(i);
    b.number = static_cast<uint32_t>(first + i);
    b.first = static_cast<uint32_t>(all > indices.size() ? 0 : first);
    if (all > 1) {
      b.epochs.resize(all);
      b.epochs[b.number - b.first] = 1;
    }
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

}  // namespace

// For Python, before each test.
extern "C" __attribute__((visibility("default"))) void lstm_fused_emulation_restart() {
  random = Random(initial_seed());
}

void fail(const char* what) {
  const dim3& b = current->block->index;
  std::snprintf(message, sizeof message, "%s: CTA (%u, %u, %u), thread %d", what, b.x, b.y, b.z,
                current->thread);
  failed = true;
  tsan_switch(scheduler_tsan_fiber, false);
  jump(scheduler);
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
  begin_launch();
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
    allocate(clusters.back(), {indices.begin() + first, indices.begin() + first + size}, first,
             cooperative ? indices.size() : size);
    if (cooperative && first != order.back()) continue;
    if (const char* error = run_clusters(clusters)) return error;
    clusters.clear();
  }
  return nullptr;
}

}  // namespace lstm_fused::cuda::fibers
