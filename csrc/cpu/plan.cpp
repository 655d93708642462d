#include "plan.h"

#include <algorithm>
#include <cmath>
#include <sstream>
#include <stdexcept>

namespace lstm_fused {
namespace {

// Costs in core cycles, rough on purpose: they rank partitions, they predict nothing.
constexpr double kBarrierCycles = 700;
constexpr double kForkCycles = 8000;
constexpr double kSharedSlowdown = 2;
constexpr double kCellCyclesPerVector = 60;
// A tile step's 4 vectors of weights from the second-level cache, and from beyond it.
constexpr int kTileCols = 4;
constexpr double kNearCyclesPerStep = 6.5;
constexpr double kFarCyclesPerStep = 11;
constexpr double kNearBytes = 768 << 10;
constexpr double kPackCyclesPerVector = 1.5;

// Rows of the hoisted input projection computed at once: enough for full tiles, few enough that the
// pre-activations stay in the second-level cache.
constexpr int64_t kHoistRows = 64;
constexpr int64_t kHoistBelowRows = 16;

int lanes(const Machine& m, DType dtype) {
  return facts(m.isa).vector_bytes / compute_bytes(dtype);
}

struct Partition {
  int direction_groups, row_groups, unit_groups;
  int threads() const { return direction_groups * row_groups * unit_groups; }
};

// Rows that tiles cannot read in place are staged many steps at a time.
bool hoists(const Problem& p, const Machine& m) {
  const bool in_place = p.dtype == DType::kFloat32 || p.dtype == DType::kFloat64 ||
                        (multiplies_pairs(m.isa, p.dtype) && p.I % 2 == 0);
  return !in_place || p.N < kHoistBelowRows;
}

// One step of k for all rows and one vector of units. A tile of fewer columns has fewer independent
// sums, which costs it a cycle. The thread reads `bytes` of weights, each panel once a tile: the
// first time from beyond the second-level cache where they exceed it.
double tile_cycles(int64_t rows, const Machine& m, double bytes) {
  const int64_t tiles = ceil_div(rows, kTileRows);
  const double multiply = 2.0 * rows + (facts(m.isa).tile_cols < kTileCols ? tiles : 0);
  const double far = bytes <= kNearBytes ? 0 : kFarCyclesPerStep - kNearCyclesPerStep;
  return std::max(multiply, kNearCyclesPerStep * tiles) + far;
}

double cost(const Problem& p, const Machine& m, KernelKind kernel, const Partition& part) {
  const int per_block = kBlock / std::min(kBlock, lanes(m, p.dtype));
  const double blocks = ceil_div(ceil_div(p.H, kBlock), part.unit_groups) * per_block;
  const double rows = ceil_div(p.N, part.row_groups);
  const double depth = p.I + p.R;
  const double gates = info(p.cell).gates;
  const double bytes = blocks * (hoists(p, m) ? p.R : depth) * gates * facts(m.isa).vector_bytes;
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

// Of a team that shares a core with another program, beside one that does not. Its slowest thread
// gets half a core; threads that wait for each other at every step advance only while all run.
double slowdown(const Machine& m, const Partition& part) {
  if (!m.undisturbed || part.threads() <= m.undisturbed) return 1;
  return part.unit_groups > 1 ? kSharedSlowdown * kSharedSlowdown : kSharedSlowdown;
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

// Whether the forward pass adds in the same order on both partitions. The order of a sum depends on
// the shape of its register tile: only those of fewer than 8 vectors have several sums at a time.
bool same_sums(const Problem& p, const Machine& m, const Partition& a, const Partition& b) {
  if (p.projection) return false;
  // The rows of all tiles are two or more, if they are so many.
  const bool full_tiles = info(p.cell).gates == kTileCols && !p.packed &&
                          p.N / std::max(a.row_groups, b.row_groups) >= 2;
  if (a.row_groups != b.row_groups && !full_tiles) return false;
  // The columns are the gates of one vector of units, or several vectors of units of one gate, of
  // which a slice may end with fewer.
  if (info(p.cell).preacts > 1) return true;
  const int64_t vectors = kBlock / std::min(kBlock, lanes(m, p.dtype));
  const auto whole_tiles = [&](int unit_groups) {
    for (int64_t i = 1; i < unit_groups; ++i)
      if (ceil_div(p.H, kBlock) * i / unit_groups * vectors % kTileCols != 0) return false;
    return true;
  };
  return whole_tiles(a.unit_groups) && whole_tiles(b.unit_groups);
}

// The partition beside other programs: the best one that gives the same bits, so that no result
// depends on what else runs.
Partition shared_partition(const Problem& p, const Machine& m, KernelKind kernel,
                           const Partition& own) {
  if (!m.undisturbed || own.threads() <= m.undisturbed) return own;
  const auto shared_cost = [&](const Partition& part) {
    return cost(p, m, kernel, part) * slowdown(m, part);
  };
  const auto part_of = [&](int threads, int most) { return std::clamp(threads, 1, most); };
  Partition best = own;
  for (const int d : {own.direction_groups, 1})
    for (const int r : {own.row_groups, part_of(m.undisturbed / d, own.row_groups), 1})
      for (const int u : {1, part_of(m.undisturbed / (d * r), own.unit_groups)}) {
        const Partition candidate{d, r, u};
        if (same_sums(p, m, own, candidate) && shared_cost(candidate) < shared_cost(best))
          best = candidate;
      }
  return best;
}

KernelKind kernel_of(const Problem& p) {
  const bool few =
      p.T <= kDirectMaxSteps && p.N <= kDirectMaxRows && p.T * p.N <= kDirectMaxAllRows;
  return few && !p.projection && !p.tangents ? KernelKind::kDirect : KernelKind::kPersistent;
}

Plan with_partition(const Problem& p, const Machine& m, KernelKind kernel, const Partition& part) {
  Plan plan{};
  plan.kernel = kernel;
  plan.dtype = p.dtype;
  const bool pairs = multiplies_pairs(m.isa, p.dtype) && kernel != KernelKind::kDirect;
  plan.isa = pairs ? m.isa : without_pairs(m.isa);
  plan.threads = part.threads();
  plan.direction_groups = part.direction_groups;
  plan.row_groups = part.row_groups;
  plan.unit_groups = part.unit_groups;
  plan.undisturbed = m.undisturbed < m.threads ? m.undisturbed : 0;
  plan.nanoseconds = std::llround(cost(p, m, kernel, part) * 1000 / m.topology.mhz);
  return plan;
}

}  // namespace

Plan plan_forward(const Problem& p, const Machine& m) {
  const KernelKind kernel = kernel_of(p);
  const Partition part = shared_partition(p, m, kernel, best_partition(p, m, kernel));
  Plan plan = with_partition(p, m, kernel, part);
  if (kernel == KernelKind::kDirect) return plan;
  const int64_t rows = std::max<int64_t>(1, ceil_div(p.N, part.row_groups));
  if (hoists(p, m)) {
    plan.hoist_steps = std::clamp<int64_t>(kHoistRows / rows, 1, std::max<int64_t>(p.T, 1));
  }
  return plan;
}

Plan plan_backward(const Problem& p, const Machine& m) {
  const KernelKind kernel = kernel_of(p);
  // Beside other programs too: with fewer threads its sums would be taken in another order.
  return with_partition(p, m, kernel, best_partition(p, m, kernel));
}

const char* name(KernelKind kernel) {
  return kernel == KernelKind::kPersistent ? "persistent" : "direct";
}

std::string describe(const Plan& p) {
  std::ostringstream s;
  s << name(p.kernel) << " kernel, " << name(p.isa) << ", " << name(p.dtype) << ", " << p.threads
    << (p.threads == 1 ? " thread" : " threads");
  if (p.threads > 1)
    s << " (" << p.direction_groups << " direction x " << p.row_groups << " row x " << p.unit_groups
      << " unit groups)";
  if (p.undisturbed)
    s << ", other programs leave " << p.undisturbed << (p.undisturbed == 1 ? " core" : " cores");
  if (p.kernel == KernelKind::kDirect) {
    s << ", weights read in place";
  } else {
    const IsaFacts isa = facts(p.isa);
    s << ", tiles of up to " << kTileRows << " rows x " << isa.tile_cols << " vectors of "
      << isa.vector_bytes << " bytes";
    if (p.hoist_steps)
      s << ", input projection " << p.hoist_steps << (p.hoist_steps == 1 ? " step" : " steps")
        << " ahead";
    else
      s << ", input and hidden projection together";
  }
  return s.str();
}

std::vector<int64_t> encode(const Plan& p) {
  return {static_cast<int64_t>(p.kernel),
          static_cast<int64_t>(p.dtype),
          static_cast<int64_t>(p.isa),
          p.threads,
          p.direction_groups,
          p.row_groups,
          p.unit_groups,
          p.hoist_steps,
          p.undisturbed,
          p.nanoseconds};
}

Plan decode(const std::vector<int64_t>& v) {
  if (v.size() != 10) throw std::invalid_argument("a plan is encoded by 10 integers");
  const auto at = [&](int i) { return static_cast<int>(v[i]); };
  return {static_cast<KernelKind>(at(0)),
          static_cast<DType>(at(1)),
          static_cast<Isa>(at(2)),
          at(3),
          at(4),
          at(5),
          at(6),
          v[7],
          at(8),
          v[9]};
}

}  // namespace lstm_fused
