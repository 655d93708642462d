// How threads divide a layer: even ranges, the rows and the units a thread computes.
#pragma once

#include "plan.h"
#include "simd.h"

namespace lstm_fused {
namespace {

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

inline Range split(int64_t total, int64_t parts, int64_t i) {
  return {total * i / parts, total * (i + 1) / parts};
}

inline int64_t min64(int64_t a, int64_t b) {
  return a < b ? a : b;
}
inline int64_t max64(int64_t a, int64_t b) {
  return a > b ? a : b;
}

// The groups a thread belongs to, by the plan's partition.
struct Place {
  int direction_group, row_group, unit_group;

  Place(const Plan& p, int worker)
      : direction_group(worker / (p.row_groups * p.unit_groups)),
        row_group(worker / p.unit_groups % p.row_groups),
        unit_group(worker % p.unit_groups) {}
};

// The batch rows of a row group. Dense rows are contiguous. Packed rows are assigned round-robin,
// since the first ones are the longest.
struct RowGroup {
  int64_t first, step, count;

  RowGroup(const Steps& s, const Plan& p, int group) {
    if (s.sizes) {
      first = group;
      step = p.row_groups;
      count = group < s.N ? ceil_div(s.N - group, step) : 0;
    } else {
      const Range r = split(s.N, p.row_groups, group);
      first = r.begin;
      step = 1;
      count = r.size();
    }
  }
  int64_t row(int64_t i) const { return first + i * step; }
  // How many of the group's rows are among the batch's first `active`.
  int64_t active(int64_t active_rows) const {
    const int64_t below = active_rows - first;
    return below <= 0 ? 0 : min64(count, ceil_div(below, step));
  }
};

// A thread's slice of vectors: whole blocks, less the vectors that hold no unit at all.
template <class A>
inline Range vector_slice(int64_t units, int parts, int part) {
  constexpr int per_block = kBlock / VectorOf<A>::lanes;
  const Range blocks = split(ceil_div(units, kBlock), parts, part);
  const int64_t last = ceil_div(units, VectorOf<A>::lanes);
  return {min64(blocks.begin * per_block, last), min64(blocks.end * per_block, last)};
}

}  // namespace
}  // namespace lstm_fused
