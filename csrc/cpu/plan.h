// Which kernel runs, in which tiles, on how many threads: a pure function of the problem and the
// machine, so that it can be printed, tested and looked up without running anything.
#pragma once

#include <cstdint>

#include "../cells/cells.h"

namespace lstm_fused {

enum class Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };
inline constexpr int kIsaCount = 4;

enum class KernelKind : int {
  kPersistent = 0,  // weights packed once, one thread team for the whole sequence
  kDirect = 1,      // weights read where they lie: a few steps are not worth packing for
};

struct Problem {
  CellKind cell;
  DType dtype;
  int64_t T, N, I, H, R;
  int D;
  bool projection;
  bool training;
  bool tangents = false;  // the forward pass of tangents
};

struct Machine {
  Isa isa;
  int threads;
};

// Threads are direction_groups x row_groups x unit_groups. Row groups are independent of each
// other; the unit_groups threads of one row group meet at a barrier each step.
struct Plan {
  KernelKind kernel;
  DType dtype;
  Isa isa;  // of the code that runs: kAvx512Bf16 only when the dtype uses it
  int threads;
  int direction_groups;
  int row_groups;
  int unit_groups;
  int tile_rows, tile_cols;  // the largest register tile: rows of the batch, vectors of weights
  // Steps whose input projection is computed ahead; 0: walked with the hidden one.
  int64_t hoist_steps;
};

Plan plan_forward(const Problem& problem, const Machine& machine);
Plan plan_backward(const Problem& problem, const Machine& machine);

// Facts about an ISA's code that the plan needs and the kernels are compiled with.
int tile_rows(Isa isa);
int vector_bytes(Isa isa);
bool multiplies_pairs(Isa isa, DType dtype);

const char* name(Isa isa);
const char* name(KernelKind kernel);

}  // namespace lstm_fused
