// The cost model of the CPU plan: what a pass takes on a partition of the work among threads.
#pragma once

#include <algorithm>

#include "plan.h"

namespace lstm_fused {

// Vectors of weights that a tile step counts, the columns of the widest register tile.
inline constexpr int kTileCols = 4;

struct Partition {
  int direction_groups, row_groups, unit_groups;
  int threads() const { return direction_groups * row_groups * unit_groups; }
};

// Units in a vector.
inline int lanes(const Machine& m, DType dtype) {
  return facts(m.isa).vector_bytes / compute_bytes(dtype);
}

// Whether the input projection is computed some steps ahead.
bool hoists(const Problem& p, const Machine& m);

// Cycles of a core at 4 GHz, where no other program runs.
double forward_cycles(const Problem& p, const Machine& m, KernelKind kernel, const Partition& part);
double backward_cycles(const Problem& p, const Machine& m, KernelKind kernel,
                       const Partition& part);

// How many times as long a call takes beside other programs.
double slowdown(const Machine& m, const Partition& part);

}  // namespace lstm_fused
