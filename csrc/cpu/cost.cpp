#include "cost.h"

namespace lstm_fused {
namespace {

// Fitted to measured calls: docs/design.md says how. A tile step is one k of 4 vectors of weights
// for all rows of a tile.
constexpr double kRowCycles = 2.07;     // a row of a tile step, at the rate of multiply-adds
constexpr double kFewRowsCycles = 0.9;  // the same while the step waits for its weights
constexpr double kInt8RowCycles = 2.5;  // a row of a tile step with int8 weights, of any ISA
constexpr double kBFloat16RowCycles = 4;
constexpr double kWeightCycles = 6.2;  // 256 bytes of weights from the second-level cache
constexpr double kFarCycles = 1;       // more from the third
constexpr double kMemoryCycles = 5.6;  // more where they fill a large part of that
constexpr double kCellCycles = 74;     // a vector of units of one row
constexpr double kCellBackwardCycles = 119;
constexpr double kPackCycles = 1.5;         // a vector of weights
constexpr double kPackBackwardCycles = 39;  // the same, with its gradient
constexpr double kProductCycles = 2.4;      // a row of a tile step of dx and dW
constexpr double kCallCycles = 6000;
constexpr double kBackwardCallCycles = 300e3;  // autograd's part included

// To start and join a team, and to wait at a barrier. A line that another core wrote is read from
// there. All of it takes longer between cores that share no cache.
constexpr double kForkCycles = 8000, kForkCyclesPerThread = 500;
constexpr double kBarrierCycles = 700, kBarrierCyclesPerThread = 150, kFarBarrierCycles = 1500;
constexpr double kLineCycles = 4, kFarLineCycles = 20;

// A thread that shares a core with another program gets half of it.
constexpr double kSharedSlowdown = 2;

// Rows below which the input projection is computed ahead; and where the weights fill so large a
// part of the last-level cache that each step reads them from memory.
constexpr int64_t kHoistBelowRows = 16, kHoistFarBelowRows = 33;
constexpr double kFarPart = 0.75;

// What the slowest thread does of a layer.
struct Share {
  double vectors;  // of hidden units
  double rows;
  double tiles;    // that the rows make
  double columns;  // of a vector of units, in parts of a tile's
  double depth_x, depth_h;

  Share(const Problem& p, const Machine& m, const Partition& part)
      : vectors(ceil_div(ceil_div(p.H, kBlock), part.unit_groups) *
                (kBlock / std::min(kBlock, lanes(m, p.dtype)))),
        rows(ceil_div(p.N, part.row_groups)),
        tiles(ceil_div(ceil_div(p.N, part.row_groups), kTileRows)),
        columns(static_cast<double>(info(p.cell).gates) / kTileCols) {
    const int pair = multiplies_pairs(m.isa, p.dtype) ? 2 : 1;
    depth_x = ceil_div(p.I, pair);
    depth_h = ceil_div(p.R, pair);
  }

  double steps(double depth) const { return vectors * depth * columns; }
};

double row_cycles(const Problem& p) {
  constexpr double cycles[] = {kRowCycles, kInt8RowCycles, kBFloat16RowCycles};
  return cycles[static_cast<int>(p.format)];
}

// Of the weights of a tile step; int8 ones have a scale of 16 bits for each group.
double step_bytes(const Problem& p, const Machine& m) {
  constexpr double part[] = {1, 0.25 + 0.5 / kQuantizationGroup, 0.5};
  return kTileCols * facts(m.isa).vector_bytes * part[static_cast<int>(p.format)];
}

// So many tile steps for all rows: bound by the multiply-adds, or by the weights, which each tile
// reads. What the first tile waits for a cache further away comes to either.
double product_cycles(const Share& share, const Problem& p, const Machine& m, double steps) {
  const double of_step = step_bytes(p, m), bytes = steps * of_step;
  const double far = bytes <= 0.75 * m.topology.l2   ? 0
                     : bytes <= 0.25 * m.topology.l3 ? kFarCycles
                                                     : kMemoryCycles;
  // A tile of fewer columns has fewer independent sums, which costs it a cycle.
  const double narrow = facts(m.isa).tile_cols < kTileCols ? share.tiles : 0;
  const double multiply = share.rows * row_cycles(p) + narrow;
  const double read = share.tiles * kWeightCycles * of_step / 256 + share.rows * kFewRowsCycles;
  return steps * (std::max(multiply, read) + far * of_step / 256);
}

// What a step costs beyond its arithmetic where threads divide the units.
double exchange_cycles(const Problem& p, const Machine& m, const Partition& part) {
  if (part.unit_groups == 1) return 0;
  const bool far = part.threads() > m.topology.cache_cores;
  const double barrier = kBarrierCycles + kBarrierCyclesPerThread * (part.unit_groups - 2) +
                         (far ? kFarBarrierCycles : 0);
  const double lines = ceil_div(p.N, part.row_groups) * p.R * compute_bytes(p.dtype) / 64.0;
  const double others = 1 - 1.0 / part.unit_groups;
  return barrier * (p.projection ? 2 : 1) + lines * others * (far ? kFarLineCycles : kLineCycles);
}

double team_cycles(const Partition& part) {
  return part.threads() == 1 ? 0 : kForkCycles + kForkCyclesPerThread * (part.threads() - 2);
}

}  // namespace

// Rows that tiles cannot read in place are staged many steps at a time.
bool hoists(const Problem& p, const Machine& m) {
  const bool in_place = p.dtype == DType::kFloat32 || p.dtype == DType::kFloat64 ||
                        (multiplies_pairs(m.isa, p.dtype) && p.I % 2 == 0);
  if (!in_place || p.N < kHoistBelowRows) return true;
  const double weights = static_cast<double>(p.I + p.R) * info(p.cell).gates * p.H * p.D;
  const int bytes = multiplies_pairs(m.isa, p.dtype) ? 2 : compute_bytes(p.dtype);
  return p.T > 1 && p.N < kHoistFarBelowRows && weights * bytes > kFarPart * m.topology.l3;
}

double forward_cycles(const Problem& p, const Machine& m, KernelKind kernel,
                      const Partition& part) {
  const Share share(p, m, part);
  const bool direct = kernel == KernelKind::kDirect;
  const double input = share.steps(share.depth_x), hidden = share.steps(share.depth_h);
  double step = share.vectors * share.rows * kCellCycles + exchange_cycles(p, m, part);
  const bool quantized = p.format != WeightFormat::kPlain;
  if (quantized || (!direct && hoists(p, m))) {
    step += product_cycles(share, p, m, hidden) + input * share.rows * row_cycles(p);
  } else {
    step += product_cycles(share, p, m, hidden + input);
  }
  if (p.projection) step += product_cycles(share, p, m, share.vectors * p.R / kTileCols);
  const double pack =
      direct || quantized ? 0 : (hidden + input) * kTileCols * kPackCycles / part.row_groups;
  return ceil_div(p.D, part.direction_groups) * (p.T * step + pack) + kCallCycles +
         team_cycles(part);
}

double backward_cycles(const Problem& p, const Machine& m, KernelKind kernel,
                       const Partition& part) {
  const Share share(p, m, part), all(p, m, {1, 1, 1});
  const double input = share.steps(share.depth_x), hidden = share.steps(share.depth_h);
  double step = share.vectors * share.rows * kCellBackwardCycles + exchange_cycles(p, m, part) +
                product_cycles(share, p, m, hidden);
  if (p.projection) step += product_cycles(share, p, m, share.vectors * p.R / kTileCols);
  const bool direct = kernel == KernelKind::kDirect;
  const double pack =
      direct ? 0 : (hidden + input) * kTileCols * kPackBackwardCycles / part.row_groups;
  // dx, dW_ih and dW_hh, which all threads divide.
  const double rows = static_cast<double>(p.T) * p.N * p.D;
  const double products = rows * all.steps(2 * all.depth_x + all.depth_h) * kProductCycles;
  return ceil_div(p.D, part.direction_groups) * (p.T * step + pack) + products / part.threads() +
         kCallCycles + kBackwardCallCycles + team_cycles(part);
}

// Threads that wait for each other at every step advance only while all of them run.
double slowdown(const Machine& m, const Partition& part) {
  if (!m.undisturbed || part.threads() <= m.undisturbed) return 1;
  return part.unit_groups > 1 ? kSharedSlowdown * kSharedSlowdown : kSharedSlowdown;
}

}  // namespace lstm_fused
