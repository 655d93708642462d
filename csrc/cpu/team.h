// Threads that work on one layer together. One OpenMP region per call, so that torch's own pool of
// threads is used and no second pool competes with it.
#pragma once

#include <cstdint>

namespace lstm_fused {

// Threads a call may use now: torch's setting, or 1 inside a parallel region or in a forked child
// (an OpenMP pool does not survive fork).
int usable_threads();

// Runs work(context, i) for i in [0, threads) at the same time, or returns false having run nothing
// when the OpenMP runtime grants fewer threads than that.
bool run_team(int threads, void (*work)(void*, int), void* context);

// What the threads of a team lost to other programs: the time between its begin and their own end
// in which they did not run.
struct TeamLoss {
  int64_t longest = 0;  // nanoseconds, of one thread
  int threads = 0;      // that lost kLateness or more
};
inline constexpr int64_t kLateness = 500'000;  // nanoseconds: less than a time slice

// Whether the calling thread's next teams measure their loss, and that of the last one. There is
// none where threads sleep as they wait.
void observe_team(bool wanted);
TeamLoss observed_loss();

int64_t nanoseconds_now();

// A barrier for `size` threads that spins for some milliseconds and then sleeps. It is part of a
// kernel's scratch memory and needs init(). The words are plain and made atomic in team.cpp,
// because the ISA files include this header and must not emit shared inline functions.
class alignas(64) Barrier {
 public:
  void init(int size);
  void wait();

 private:
  uint32_t arrived_;
  int size_;
  bool spins_;
  alignas(64) uint32_t generation_;
};

}  // namespace lstm_fused
