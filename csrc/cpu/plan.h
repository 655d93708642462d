// Which kernel runs, with which partition of the work among threads: a pure function of the problem
// and the machine, so that it can be printed and tested without running a kernel.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../cells/cells.h"
#include "isa.h"

namespace lstm_fused {

// The direct kernels take calls of so few steps and rows, and so many rows of all steps. They read
// every weight once a step and four rows; packing reads and writes them all once before the first
// step.
inline constexpr int64_t kDirectMaxSteps = 4;
inline constexpr int64_t kDirectMaxRows = 8;
inline constexpr int64_t kDirectMaxAllRows = 16;

enum class KernelKind : int {
  kPersistent = 0,  // weights packed once, one thread team for the whole sequence
  kDirect = 1,      // weights read in place: packing does not pay for a few steps
  kInt8 = 2,        // quantized weights, which come in panels
  kBFloat16 = 3,
};

struct Problem {
  CellKind cell;
  DType dtype;
  int64_t T, N, I, H, R;
  int D;
  bool projection;
  bool training;
  bool tangents = false;  // the forward pass of tangents
  bool packed = false;    // sequences of several lengths
  WeightFormat format = WeightFormat::kPlain;
};

// The cores this process may use. The defaults are a guess where nothing is known.
struct Topology {
  int cores = 0;          // physical ones, within a quota of the cgroup; 0: one a thread
  int cache_cores = 8;    // of them share a last-level cache
  int socket_cores = 64;  // of them are on a socket
  int64_t l2 = 1 << 20;   // bytes, of one core
  int64_t l3 = 32 << 20;  // bytes, of cache_cores
  int64_t mhz = 4000;     // at full speed
};

struct Machine {
  Isa isa;
  int threads;          // at most
  int undisturbed = 0;  // of them find a core that no other program uses; 0: all
  Topology topology = {};
};

// Threads are direction_groups x row_groups x unit_groups. Row groups are independent of each
// other; the unit_groups threads of one row group wait for each other at a barrier each step.
struct Plan {
  KernelKind kernel;
  DType dtype;
  Isa isa;  // of the code that runs: isa_for what is multiplied
  int threads;
  int direction_groups;
  int row_groups;
  int unit_groups;
  // Steps whose input projection is computed in advance; 0: with the hidden one, step by step.
  int64_t hoist_steps;
  int undisturbed;      // Machine::undisturbed where that is less than the threads allowed, else 0
  int64_t nanoseconds;  // the call's predicted time
};

Plan plan_forward(const Problem& problem, const Machine& machine);
Plan plan_backward(const Problem& problem, const Machine& machine);

// Whether the ISA multiplies the dtype in pairs.
inline bool multiplies_pairs(Isa isa, DType dtype) {
  return facts(isa).products == Products::kBFloat16Pairs && dtype == DType::kBFloat16;
}

const char* name(KernelKind kernel);

// The plan in words.
std::string describe(const Plan& plan);

// A plan as integers, as an operator can return it, and back.
std::vector<int64_t> encode(const Plan& plan);
Plan decode(const std::vector<int64_t>& values);

}  // namespace lstm_fused
