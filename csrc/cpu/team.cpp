#include "team.h"

#include <omp.h>
#include <pthread.h>
#include <sched.h>
#include <strings.h>

#include <atomic>
#include <chrono>
#include <cstdlib>

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
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
  return omp_get_num_procs();
}

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
#pragma omp parallel num_threads(threads)
  {
    if (omp_get_num_threads() == threads) {
      work(context, omp_get_thread_num());
    } else if (omp_get_thread_num() == 0) {
      granted = false;
    }
  }
  return granted;
}

void Barrier::init(int size) {
  static const int cores = allowed_cores();
  static const bool passive_waiting = passive();
  arrived_ = 0;
  generation_ = 0;
  size_ = size;
  spins_ = size <= cores && !passive_waiting;
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
