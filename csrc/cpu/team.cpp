#include "team.h"

#include <omp.h>
#include <pthread.h>
#include <strings.h>
#include <time.h>

#include <atomic>
#include <chrono>
#include <cstdlib>

#include "topology.h"

namespace lstm_fused {
namespace {

std::atomic<bool> forked{false};

void note_fork() {
  forked.store(true, std::memory_order_relaxed);
}

[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, note_fork);

// How long a thread spins before it sleeps. On a core that another process uses, a thread that
// slept runs again only after that process's time slice of some milliseconds, at every barrier. A
// thread that spins loses no more than its share. As long as OpenMP's threads spin, and longer than
// a slice.
constexpr std::chrono::milliseconds kSpinDuration{10};
constexpr int kFirstPauses = 256;  // before the clock is read
constexpr int kPauses = 64;        // between two readings of it

// Whether the user asked OpenMP's threads to sleep when they wait.
bool passive() {
  const char* policy = std::getenv("OMP_WAIT_POLICY");
  return policy && strcasecmp(policy, "passive") == 0;
}

// Cores this process may run on: fewer than the threads asked for means that spinning is harmful.
int allowed_cores() {
  const int known = static_cast<int>(allowed_cpus().size());
  return known > 0 ? known : omp_get_num_procs();
}

// Whether the threads of a team spin when they wait for each other.
bool spins(int threads) {
  static const int cores = allowed_cores();
  static const bool passive_waiting = passive();
  return threads <= cores && !passive_waiting;
}

// CPU time of the calling thread: a system call.
int64_t thread_nanoseconds() {
  timespec time;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return int64_t{time.tv_sec} * 1'000'000'000 + time.tv_nsec;
}

thread_local bool observing = false;
thread_local TeamLoss loss;

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

int usable_threads() {
  if (forked.load(std::memory_order_relaxed) || omp_in_parallel()) return 1;
  return omp_get_max_threads();
}

bool run_team(int threads, void (*work)(void*, int), void* context) {
  if (threads == 1) {
    work(context, 0);
    return true;
  }
  bool granted = true;
  const bool observed = observing && spins(threads);
  const int64_t begin = observed ? nanoseconds_now() : 0;
  std::atomic<int64_t> longest{0};
  std::atomic<int> late{0};
#pragma omp parallel num_threads(threads)
  {
    if (omp_get_num_threads() == threads) {
      const int64_t used = observed ? thread_nanoseconds() : 0;
      work(context, omp_get_thread_num());
      if (observed) {
        const int64_t lost = nanoseconds_now() - begin - (thread_nanoseconds() - used);
        if (lost >= kLateness) late.fetch_add(1, std::memory_order_relaxed);
        int64_t most = longest.load(std::memory_order_relaxed);
        while (lost > most && !longest.compare_exchange_weak(most, lost)) {
        }
      }
    } else if (omp_get_thread_num() == 0) {
      granted = false;
    }
  }
  loss = {longest, late};
  return granted;
}

void observe_team(bool wanted) {
  observing = wanted;
}

TeamLoss observed_loss() {
  return loss;
}

int64_t nanoseconds_now() {
  return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void Barrier::init(int size) {
  arrived_ = 0;
  generation_ = 0;
  size_ = size;
  spins_ = spins(size);
}

void Barrier::wait() {
  if (size_ == 1) return;
  const std::atomic_ref arrived(arrived_);
  const std::atomic_ref current(generation_);
  const uint32_t generation = current.load(std::memory_order_relaxed);
  if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(size_)) {
    arrived.store(0, std::memory_order_relaxed);
    current.store(generation + 1, std::memory_order_release);
    current.notify_all();
    return;
  }
  const auto passed = [&](int pauses) {
    for (int i = 0; i < pauses; ++i) {
      if (current.load(std::memory_order_acquire) != generation) return true;
      pause_cpu();
    }
    return false;
  };
  if (passed(kFirstPauses)) return;
  if (spins_) {
    using Clock = std::chrono::steady_clock;
    for (const auto end = Clock::now() + kSpinDuration; Clock::now() < end;)
      if (passed(kPauses)) return;
  }
  while (current.load(std::memory_order_acquire) == generation) {
    current.wait(generation, std::memory_order_acquire);
  }
}

}  // namespace lstm_fused
