#include "team.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

#include <atomic>
#include <cctype>
#include <chrono>
#include <cstdlib>
#include <string>

#include "../compiler.h"
#include "system.h"
#include "topology.h"

namespace lstm_fused {
namespace {

std::atomic<bool> forked{false};

void note_fork() {
  forked.store(true, std::memory_order_relaxed);
}

[[maybe_unused]] const bool noted = (after_fork(note_fork), true);

#if !defined(_OPENMP)
// One thread: without OpenMP there is no pool to share with torch.
int omp_in_parallel() {
  return 0;
}
int omp_get_max_threads() {
  return 1;
}
int omp_get_num_procs() {
  return 1;
}
int omp_get_num_threads() {
  return 1;
}
int omp_get_thread_num() {
  return 0;
}
#endif

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
  std::string lower = policy ? policy : "";
  for (char& c : lower) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return lower == "passive";
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

thread_local bool observing = false;
thread_local TeamLoss loss;

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
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
#endif
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
