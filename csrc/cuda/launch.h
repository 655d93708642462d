// From a plan to launches: the body of every file of one arithmetic.
#pragma once

#include <algorithm>
#include <type_traits>

#include "epilogues.h"
#include "kernel_launch.h"
#include "kernels.h"
#include "pointwise.h"
#include "recurrence.h"

namespace lstm_fused::cuda {
namespace {

template <class Math, class Epilogue, int kTiles, PlanKind kKind, int kMostTiles = 1>
const char* launch(const Plan& plan, const RecurrenceParams& p, int64_t units, int64_t row_groups,
                   int64_t shared, void* stream) {
  LaunchConfig config{};
  const int64_t unit_ctas =
      kKind == PlanKind::kStep ? ceil_div(units, kUnitTile) : int64_t{plan.unit_ctas};
  config.grid = dim3(static_cast<unsigned>(unit_ctas), static_cast<unsigned>(row_groups),
                     static_cast<unsigned>(p.D));
  config.threads = plan.threads;
  config.shared_bytes = shared;
  config.cluster = kKind == PlanKind::kCluster ? plan.unit_ctas : 0;
  config.cooperative = kKind == PlanKind::kGrid;
  config.stream = stream;
  static ConfiguredDevices configured;
  return launch_kernel(recurrence_kernel<Math, Epilogue, kTiles, kKind, kMostTiles>, config, p,
                       configured);
}

// A step's product and epilogue, its rows shared out anew: a packed batch shrinks or grows.
template <class Math, class Epilogue>
const char* launch_step(const Plan& plan, RecurrenceParams& p, Gemm& gemm, void* stream) {
  using S = typename Math::Storage;
  int64_t reach[2] = {}, most = 0;
  for (int d = 0; d < p.D; ++d) {
    reach[d] = Epilogue::reach(p.rows[d]);
    most = std::max(most, reach[d]);
  }
  if (most == 0) return nullptr;
  const auto groups_of = [&](int64_t rows) {
    return std::min<int64_t>(ceil_div(most, rows), kMaxGridY);
  };
  const int64_t units = p.product.units;
  if (plan.kind == PlanKind::kStep) {
    constexpr int kTiles = kStepRows / 8;
    const DType dtype = sizeof(typename Math::Acc) == 8 ? DType::kFloat64 : DType::kFloat32;
    const int64_t shared = shared_bytes(PlanKind::kStep, dtype, false, Epilogue::kGates, 1,
                                        kStepRows, p.product.in.bytes);
    return launch<Math, Epilogue, kTiles, PlanKind::kStep>(plan, p, units, groups_of(kStepRows),
                                                           shared, stream);
  }
  for (int d = 0; d < p.D; ++d)
    if (reach[d]) p.sums[d] = gemm.multiply(p.product, Epilogue::kGates, p.s_begin, d, reach[d]);
  LaunchConfig config{};
  config.grid = dim3(static_cast<unsigned>(ceil_div(units, kPointUnits)),
                     static_cast<unsigned>(groups_of(kPointRows)), static_cast<unsigned>(p.D));
  config.threads = plan.threads;
  config.stream = stream;
  static ConfiguredDevices configured;
  return launch_kernel(pointwise_kernel<Epilogue, S>, config, p, configured);
}

// All steps of the walk, each with its one or two products.
template <class Math, class First, class Second>
const char* walk(const Plan& plan, RecurrenceParams p, const Product* second, const Steps& steps,
                 Gemm& gemm, void* stream) {
  const Product first = p.product;
  for (int64_t s = p.s_begin, end = p.s_end; s < end; ++s) {
    p.s_begin = s;
    p.s_end = s + 1;
    for (int d = 0; d < p.D; ++d) p.rows[d] = rows_at(steps, s, First::kBackward != (d == 1));
    p.product = first;
    if (const char* error = launch_step<Math, First>(plan, p, gemm, stream)) return error;
    if (!second) continue;
    p.product = *second;
    if (const char* error = launch_step<Math, Second>(plan, p, gemm, stream)) return error;
  }
  return nullptr;
}

template <class Math, class Epilogue, PlanKind kKind, int kMostTiles>
const char* launch_tiles(const Plan& plan, const RecurrenceParams& p, void* stream) {
  const auto run = [&](auto launcher) {
    return launcher(plan, p, p.product.units, plan.row_groups, plan.shared_bytes, stream);
  };
  switch (plan.tile_rows) {
    case 8: return run(launch<Math, Epilogue, 1, kKind, kMostTiles>);
    case 16: return run(launch<Math, Epilogue, 2, kKind, kMostTiles>);
    case 32:
      if constexpr (kKind == PlanKind::kGrid)
        return run(launch<Math, Epilogue, 4, kKind, kMostTiles>);
    default: return "no kernel was compiled for the plan's tile";
  }
}

template <class Math, class Epilogue>
const char* launch_persistent(const Plan& plan, const RecurrenceParams& p, void* stream) {
  if (plan.kind == PlanKind::kGrid)
    return launch_tiles<Math, Epilogue, PlanKind::kGrid, 1>(plan, p, stream);
  switch (compiled_tiles(plan.kind, plan.unit_tiles)) {
    case 2: return launch_tiles<Math, Epilogue, PlanKind::kCluster, 2>(plan, p, stream);
    case 3: return launch_tiles<Math, Epilogue, PlanKind::kCluster, 3>(plan, p, stream);
    case 4: return launch_tiles<Math, Epilogue, PlanKind::kCluster, 4>(plan, p, stream);
    default: return "no kernel was compiled for so many units";
  }
}

template <class Cell, class Math>
const char* run_with(const Plan& plan, const RecurrenceParams& p, const Product* second,
                     const Steps& steps, Gemm& gemm, void* stream) {
  using S = typename Math::Storage;
  using Forward = ForwardCell<Cell, S>;
  using Backward = BackwardCell<Cell, S>;
  if (in_steps(plan.kind)) {
    if (!plan.backward)
      return walk<Math, Forward, Project<S>>(plan, p, second, steps, gemm, stream);
    return second ? walk<Math, JoinGradients<S>, Backward>(plan, p, second, steps, gemm, stream)
                  : walk<Math, Backward, Backward>(plan, p, nullptr, steps, gemm, stream);
  }
  if constexpr (!std::is_same_v<S, double>) {
    return plan.backward ? launch_persistent<Math, Backward>(plan, p, stream)
                         : launch_persistent<Math, Forward>(plan, p, stream);
  }
  return "no persistent kernel was compiled for this dtype";
}

template <class Math>
const char* run_cell(CellKind cell, const Plan& plan, const RecurrenceParams& params,
                     const Product* second, const Steps& steps, Gemm& gemm, void* stream) {
  switch (cell) {
#define LSTM_FUSED_CASE(name, Cell) \
  case CellKind::k##Cell: return run_with<Cell, Math>(plan, params, second, steps, gemm, stream);
    LSTM_FUSED_CELLS(LSTM_FUSED_CASE)
#undef LSTM_FUSED_CASE
    default: return "no kernel was compiled for this cell";
  }
}

}  // namespace
}  // namespace lstm_fused::cuda
