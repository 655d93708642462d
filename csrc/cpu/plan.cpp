#include "plan.h"

#include <algorithm>
#include <cmath>
#include <sstream>
#include <stdexcept>

#include "cost.h"

namespace lstm_fused {
namespace {

// Rows of the hoisted input projection computed at once: enough for full tiles, few enough that the
// pre-activations stay in the second-level cache.
constexpr int64_t kHoistRows = 64;

// Counts of groups worth trying, up to `most`: powers of two, all, and what fills the tiles.
// Between them none is the best by much.
struct Counts {
  int values[12];
  int size = 0;

  explicit Counts(int64_t most, int64_t tiles = 0) {
    for (int64_t n = 1; n < most && size < 8; n *= 2) add(n);
    if (tiles > 1 && tiles < most) add(tiles);
    add(most);
  }
  void add(int64_t n) { values[size++] = static_cast<int>(n); }
  const int* begin() const { return values; }
  const int* end() const { return values + size; }
};

// The cheapest partition. No thread of it lacks a core, since the siblings of a core share its
// multiply-add units, and no barrier of a step joins sockets.
template <class Cost>
Partition best_partition(const Problem& p, const Machine& m, const Cost& cost) {
  const Topology& t = m.topology;
  const int threads = t.cores ? std::min(m.threads, t.cores) : m.threads;
  const int64_t blocks = std::max<int64_t>(1, ceil_div(p.H, kBlock));
  const int64_t rows = std::max<int64_t>(1, p.N);
  const int64_t tiles = ceil_div(rows, kTileRows);
  Partition best{1, 1, 1};
  double best_cost = cost(best);
  for (int d = 1; d <= std::min(p.D, threads); ++d)
    for (const int r : Counts(std::min<int64_t>(threads / d, rows), tiles))
      for (const int u : Counts(std::min<int64_t>(threads / (d * r), blocks))) {
        const Partition candidate{d, r, u};
        if (u > 1 && candidate.threads() > t.socket_cores) continue;
        if (const double c = cost(candidate); c < best_cost) {
          best_cost = c;
          best = candidate;
        }
      }
  return best;
}

// Whether the forward pass adds in the same order on both partitions. The order of a sum depends on
// the shape of its register tile: only those of fewer than 8 vectors have several sums at a time.
bool same_sums(const Problem& p, const Machine& m, const Partition& a, const Partition& b) {
  if (p.format != WeightFormat::kPlain) return true;  // one sum a unit, over k in its order
  if (p.projection) return false;
  // The rows of all tiles are two or more, if they are so many.
  const bool full_tiles = info(p.cell).gates == kTileCols && !p.packed &&
                          p.N / std::max(a.row_groups, b.row_groups) >= 2;
  if (a.row_groups != b.row_groups && !full_tiles) return false;
  // The columns are the gates of one vector of units, or several vectors of units of one gate, of
  // which a slice may end with fewer.
  const CellInfo& cell = info(p.cell);
  if (cell.described ? cell.gates > kTileCols / 2 : cell.preacts > 1) return true;
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
template <class Cost>
Partition shared_partition(const Problem& p, const Machine& m, const Partition& own,
                           const Cost& cost) {
  if (!m.undisturbed || own.threads() <= m.undisturbed) return own;
  const auto shared_cost = [&](const Partition& part) { return cost(part) * slowdown(m, part); };
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
  if (p.format == WeightFormat::kInt8) return KernelKind::kInt8;
  if (p.format == WeightFormat::kBFloat16) return KernelKind::kBFloat16;
  const bool few =
      p.T <= kDirectMaxSteps && p.N <= kDirectMaxRows && p.T * p.N <= kDirectMaxAllRows;
  const bool direct = few && !p.projection && !p.tangents && !info(p.cell).described;
  return direct ? KernelKind::kDirect : KernelKind::kPersistent;
}

Plan with_partition(const Problem& p, const Machine& m, KernelKind kernel, const Partition& part,
                    double cycles) {
  Plan plan{};
  plan.kernel = kernel;
  plan.dtype = p.dtype;
  const bool pairs = multiplies_pairs(m.isa, p.dtype) && kernel != KernelKind::kDirect;
  plan.isa = isa_for(m.isa, pairs                         ? Products::kBFloat16Pairs
                            : kernel == KernelKind::kInt8 ? Products::kBytes
                                                          : Products::kAll);
  plan.threads = part.threads();
  plan.direction_groups = part.direction_groups;
  plan.row_groups = part.row_groups;
  plan.unit_groups = part.unit_groups;
  plan.undisturbed = m.undisturbed < m.threads ? m.undisturbed : 0;
  plan.nanoseconds = std::llround(cycles * 1000 / m.topology.mhz);
  return plan;
}

}  // namespace

Plan plan_forward(const Problem& p, const Machine& m) {
  const KernelKind kernel = kernel_of(p);
  const auto cost = [&](const Partition& part) { return forward_cycles(p, m, kernel, part); };
  const Partition part = shared_partition(p, m, best_partition(p, m, cost), cost);
  Plan plan = with_partition(p, m, kernel, part, cost(part));
  if (kernel == KernelKind::kDirect) return plan;
  const int64_t rows = std::max<int64_t>(1, ceil_div(p.N, part.row_groups));
  if (p.format != WeightFormat::kPlain || hoists(p, m)) {
    plan.hoist_steps = std::clamp<int64_t>(kHoistRows / rows, 1, std::max<int64_t>(p.T, 1));
  }
  return plan;
}

Plan plan_backward(const Problem& p, const Machine& m) {
  const KernelKind kernel = kernel_of(p);
  const auto cost = [&](const Partition& part) { return backward_cycles(p, m, kernel, part); };
  // Beside other programs too: with fewer threads its sums would be taken in another order.
  const Partition part = best_partition(p, m, cost);
  return with_partition(p, m, kernel, part, cost(part));
}

const char* name(KernelKind kernel) {
  constexpr const char* names[] = {"persistent", "direct", "int8", "bfloat16"};
  return names[static_cast<int>(kernel)];
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
  } else if (p.kernel != KernelKind::kPersistent) {
    s << ", weights in panels";
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
