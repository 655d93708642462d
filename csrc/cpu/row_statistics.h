// Sums over all units of a row, where the threads of a row group divide the units: each adds those
// of its own, then all wait for each other, then each adds up all. For described cells that
// normalize (cells/unit.h), forward and backward.
#pragma once

#include "../cells/unit.h"
#include "arena.h"
#include "partition.h"
#include "team.h"

namespace lstm_fused {
namespace {

// The memory of one pass.
template <class A>
struct RowStatistics {
  int groups = 0;
  int64_t rows = 0;  // of a row group, at most
  double* sums;      // (threads, 2, rows, groups, 2), two buffers in turn
  A* statistics;     // (threads, rows, groups, 4), see UnitForward

  RowStatistics(int groups, const Plan& plan, int64_t N, Arena& arena)
      : groups(groups), rows(ceil_div(N, plan.row_groups)) {
    if (groups == 0) return;
    sums = arena.take<double>(plan.threads * 4 * rows * groups);
    statistics = arena.take<A>(plan.threads * 4 * rows * groups);
  }
};

// One thread's part.
template <class A>
class RowSums {
 public:
  using V = Vector<A>;
  static constexpr int lanes = VectorOf<A>::lanes;

  RowSums(const RowStatistics<A>& memory, const Place& place, int worker, int unit_groups,
          Barrier& barrier)
      : memory_(memory),
        worker_(worker),
        first_(worker - place.unit_group),
        unit_groups_(unit_groups),
        barrier_(barrier) {}

  A* statistics(int64_t row) const {
    return memory_.statistics + (worker_ * memory_.rows + row) * memory_.groups * 4;
  }

  // Of each row and each group of a level two numbers of every thread: add(row, to) puts this
  // thread's, to (groups of the level, 2). take(row, group, of) gets those of all: of(unit group).
  template <class Add, class Take>
  void run(const UnitFunctions<A>& unit, int level, int64_t rows, const Add& add,
           const Take& take) {
    const int count = memory_.groups;
    for (int64_t i = 0; i < rows; ++i) {
      double* to = of(worker_, i);
      for (int k = 0; k < 2 * count; ++k) to[k] = 0;
      add(i, to);
    }
    barrier_.wait();
    for (int64_t i = 0; i < rows; ++i)
      for (int g = 0, k = 0; g < count; ++g) {
        if (unit.group[g].level != level) continue;
        take(i, g, [&](int from) { return of(first_ + from, i) + 2 * k; });
        ++k;
      }
    buffer_ ^= 1;
  }

  static double sum(const V& values) {
    double all = 0;
    for (int l = 0; l < lanes; ++l) all += values[l];
    return all;
  }

 private:
  double* of(int worker, int64_t row) const {
    return memory_.sums + ((worker * 2 + buffer_) * memory_.rows + row) * memory_.groups * 2;
  }

  const RowStatistics<A>& memory_;
  const int worker_, first_, unit_groups_;
  Barrier& barrier_;
  int buffer_ = 0;
};

}  // namespace
}  // namespace lstm_fused
