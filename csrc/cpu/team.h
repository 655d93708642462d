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
