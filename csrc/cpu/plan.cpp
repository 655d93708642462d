#include "plan.h"

#include <algorithm>

namespace lstm_fused {
namespace {

// Costs in core cycles, rough on purpose: they rank partitions, they predict nothing.
constexpr double kBarrierCycles = 700;
constexpr double kForkCycles = 8000;
constexpr double kCellCyclesPerVector = 60;
// A tile step's 4 vectors of weights from the second-level cache, and from beyond it.
constexpr int kTileCols = 4;
constexpr double kNearCyclesPerStep = 6.5;
constexpr double kFarCyclesPerStep = 11;
constexpr double kNearBytes = 768 << 10;
constexpr double kPackCyclesPerVector = 1.5;

// The direct kernel reads every weight once a step, a row of it as one dot product; packing reads
// and writes them all once before the first step.
constexpr int64_t kDirectMaxSteps = 4;
constexpr int64_t kDirectMaxRows = 4;

// Rows of the hoisted input projection computed at once: enough for full tiles, few enough that the
// pre-activations stay in the second-level cache.
constexpr int64_t kHoistRows = 64;
constexpr int64_t kHoistBelowRows = 16;

int lanes(const Machine& m, DType dtype) {
  return vector_bytes(m.isa) / compute_bytes(dtype);
}

struct Partition {
  int direction_groups, row_groups, unit_groups;
  int threads() const { return direction_groups * row_groups * unit_groups; }
};

// Rows that tiles cannot read where they lie are staged many steps at a time.
bool hoists(const Problem& p, const Machine& m) {
  const bool in_place = p.dtype == DType::kFloat32 || p.dtype == DType::kFloat64 ||
                        (multiplies_pairs(m.isa, p.dtype) && p.I % 2 == 0);
  return !in_place || p.N < kHoistBelowRows;
}

// One step of k for all rows and one vector of units. The thread reads `bytes` of weights in turn,
// each panel of them once a tile: the first time maybe from afar.
double tile_cycles(int64_t rows, const Machine& m, double bytes) {
  const int64_t tiles = ceil_div(rows, tile_rows(m.isa));
  const double first = bytes <= kNearBytes ? kNearCyclesPerStep : kFarCyclesPerStep;
  return std::max(2.0 * rows, first + kNearCyclesPerStep * (tiles - 1));
}

double cost(const Problem& p, const Machine& m, KernelKind kernel, const Partition& part) {
  const int per_block = kBlock / std::min(kBlock, lanes(m, p.dtype));
  const double blocks = ceil_div(ceil_div(p.H, kBlock), part.unit_groups) * per_block;
  const double rows = ceil_div(p.N, part.row_groups);
  const double depth = p.I + p.R;
  const double gates = info(p.cell).gates;
  const double bytes = blocks * (hoists(p, m) ? p.R : depth) * gates * vector_bytes(m.isa);
  const double tiles = tile_cycles(rows, m, bytes) * gates / kTileCols;
  double step = blocks * (depth * tiles + rows * kCellCyclesPerVector);
  if (p.projection) step += blocks * p.R * tiles / gates;
  if (part.unit_groups > 1) step += kBarrierCycles * (p.projection ? 2 : 1);
  const double pack = kernel == KernelKind::kDirect
                          ? 0
                          : blocks * depth * gates * kPackCyclesPerVector / part.row_groups;
  const double directions = ceil_div(p.D, part.direction_groups);
  return directions * (p.T * step + pack) + (part.threads() > 1 ? kForkCycles : 0);
}

Partition best_partition(const Problem& p, const Machine& m, KernelKind kernel) {
  const int64_t blocks = ceil_div(p.H, kBlock);
  Partition best{1, 1, 1};
  double best_cost = cost(p, m, kernel, best);
  for (int d = 1; d <= std::min(p.D, m.threads); ++d) {
    const int rest = m.threads / d;
    for (int r = 1; r <= rest && r <= std::max<int64_t>(p.N, 1); ++r) {
      const int u_max = static_cast<int>(std::min<int64_t>(rest / r, blocks));
      // Only the largest count, and one thread: between them a partition is never the best by much.
      for (const int u : {1, u_max}) {
        const Partition candidate{d, r, u};
        const double c = cost(p, m, kernel, candidate);
        if (c < best_cost) {
          best_cost = c;
          best = candidate;
        }
      }
    }
  }
  return best;
}

Plan with_partition(const Problem& p, const Machine& m, KernelKind kernel, const Partition& part) {
  Plan plan{};
  plan.kernel = kernel;
  plan.dtype = p.dtype;
  plan.isa = m.isa == Isa::kAvx512Bf16 && !multiplies_pairs(m.isa, p.dtype) ? Isa::kAvx512 : m.isa;
  plan.threads = part.threads();
  plan.direction_groups = part.direction_groups;
  plan.row_groups = part.row_groups;
  plan.unit_groups = part.unit_groups;
  // Rows are dealt out evenly to the fewest tiles.
  const int64_t rows = std::max<int64_t>(1, ceil_div(p.N, part.row_groups));
  plan.tile_rows = static_cast<int>(ceil_div(rows, ceil_div(rows, tile_rows(m.isa))));
  plan.tile_cols = info(p.cell).sums == 1 ? kTileCols : info(p.cell).gates;
  return plan;
}

}  // namespace

Plan plan_forward(const Problem& p, const Machine& m) {
  const bool direct =
      p.T <= kDirectMaxSteps && p.N <= kDirectMaxRows && !p.projection && !p.tangents;
  const KernelKind kernel = direct ? KernelKind::kDirect : KernelKind::kPersistent;
  const Partition part = best_partition(p, m, kernel);
  Plan plan = with_partition(p, m, kernel, part);
  if (direct) {
    if (plan.isa == Isa::kAvx512Bf16) plan.isa = Isa::kAvx512;
    return plan;
  }
  const int64_t rows = std::max<int64_t>(1, ceil_div(p.N, part.row_groups));
  if (hoists(p, m)) {
    plan.hoist_steps = std::clamp<int64_t>(kHoistRows / rows, 1, std::max<int64_t>(p.T, 1));
  }
  return plan;
}

Plan plan_backward(const Problem& p, const Machine& m) {
  constexpr KernelKind kernel = KernelKind::kPersistent;
  return with_partition(p, m, kernel, best_partition(p, m, kernel));
}

int tile_rows(Isa isa) {
#if defined(__aarch64__)
  return 6;
#else
  return isa >= Isa::kAvx512 ? 6 : 3;
#endif
}

int vector_bytes(Isa isa) {
  return isa == Isa::kBaseline ? 16 : isa == Isa::kAvx2 ? 32 : 64;
}

bool multiplies_pairs(Isa isa, DType dtype) {
  return isa == Isa::kAvx512Bf16 && dtype == DType::kBFloat16;
}

const char* name(Isa isa) {
  constexpr const char* names[kIsaCount] = {"baseline", "avx2", "avx512", "avx512_bf16"};
  return names[static_cast<int>(isa)];
}

const char* name(KernelKind kernel) {
  return kernel == KernelKind::kPersistent ? "persistent" : "direct";
}

}  // namespace lstm_fused
