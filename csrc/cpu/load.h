// How many cores other programs leave to this process, estimated from the time that its teams lost.
#pragma once

#include <atomic>
#include <climits>

#include "team.h"

namespace lstm_fused {

// One estimate for all calls of the process. Times are in nanoseconds. Threads that write at the
// same time cost it accuracy only.
class LoadEstimate {
 public:
  bool limits(int threads) const { return limit_.load(std::memory_order_relaxed) < threads; }

  // Of `threads` threads of a call that begins now, how many find a core of their own.
  int undisturbed(int threads, int64_t now) const;

  // Whether that call tries more threads than the last ones had.
  bool tries(int threads, int64_t now) const { return limits(threads) && is_trial(now); }

  // Puts a trial off, since other programs run now. Some trials in a row may be: what the system
  // says of other programs may not concern this one's cores.
  void put_off(int64_t now);

  // A call on so many threads has ended now: what it took and lost.
  void note(int threads, int64_t taken, const TeamLoss& loss, int64_t now);

 private:
  static constexpr int64_t kMillisecond = 1'000'000;
  // One loss may be chance. Losses are not that exceed the tolerated part of the time by kTolerated
  // in sum.
  static constexpr int64_t kTolerated = 4 * kMillisecond;
  static constexpr int64_t kLongCall = 50 * kMillisecond;
  // More threads are tried again after a pause, which doubles while that is in vain. A trial may
  // lose many time slices: in between are so many calls that few of them are trials, unless the
  // calls are long.
  static constexpr int64_t kFirstPause = 250 * kMillisecond, kLongestPause = 8000 * kMillisecond;
  static constexpr int kCallsBetween = 128;
  static constexpr int kMostPutOff = 12;

  bool is_trial(int64_t now) const;
  static int64_t tolerated(int threads, int64_t taken, int late);

  std::atomic<int> limit_{INT_MAX};
  std::atomic<int> calls_{0};    // since the limit
  std::atomic<int> put_off_{0};  // trials in a row
  std::atomic<int64_t> debt_{0};
  std::atomic<int64_t> limited_at_{0}, freed_at_{0};
  std::atomic<int64_t> pause_{kFirstPause};
};

}  // namespace lstm_fused
