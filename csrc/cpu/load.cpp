#include "load.h"

#include <algorithm>

namespace lstm_fused {

bool LoadEstimate::is_trial(int64_t now) const {
  const int64_t since = now - limited_at_;
  if (since <= pause_) return false;
  return calls_ > kCallsBetween || since > std::min<int64_t>(4 * pause_, kLongestPause);
}

int LoadEstimate::undisturbed(int threads, int64_t now) const {
  const int limit = limit_.load(std::memory_order_relaxed);
  if (limit >= threads) return threads;
  return is_trial(now) ? std::min(threads, 2 * limit) : limit;
}

void LoadEstimate::put_off(int64_t now) {
  if (put_off_ >= kMostPutOff) return;
  ++put_off_;
  pause_ = std::min<int64_t>(2 * pause_, kLongestPause);
  limited_at_ = now;
  calls_ = 0;
}

// What a call may lose before fewer threads would be faster: without `late` of its threads it takes
// the longer, the larger their share was. A program that always runs takes just that share of the
// time. Calls not much longer than its time slices may lose less: fewer threads then make the
// slowest calls many times as fast.
int64_t LoadEstimate::tolerated(int threads, int64_t taken, int late) {
  const int64_t share = taken * std::clamp(late, 1, threads / 2) / threads;
  return taken < kLongCall ? share * 3 / 4 : share;
}

void LoadEstimate::note(int threads, int64_t taken, const TeamLoss& loss, int64_t now) {
  calls_.fetch_add(1, std::memory_order_relaxed);
  if (threads == 1) return;
  const int limit = limit_;
  const bool trial = threads > limit;
  if (trial) put_off_ = 0;
  const int64_t excess = loss.longest - tolerated(threads, taken, loss.threads);
  const int64_t debt = std::max<int64_t>(0, debt_ + excess);
  if (debt != debt_) debt_ = debt;
  if (debt == 0 && trial && is_trial(now)) {
    limit_ = threads;
    freed_at_ = now;
  }
  if (debt < kTolerated) return;
  const bool in_vain = trial || (freed_at_ > 0 && now - freed_at_ < 2 * pause_);
  pause_ = in_vain ? std::min<int64_t>(2 * pause_, kLongestPause) : kFirstPause;
  limit_ = std::max(1, std::min(threads, limit) - (trial ? 0 : std::max(1, loss.threads)));
  limited_at_ = now;
  calls_ = 0;
  debt_ = 0;
}

}  // namespace lstm_fused
