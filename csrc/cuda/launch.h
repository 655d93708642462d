// From a plan to launches: the body of every file of one arithmetic.
#pragma once

#include <algorithm>
#include <type_traits>

#include "epilogues.h"
#include "kernels.h"
#include "recurrence.h"

namespace lstm_fused::cuda {
namespace {

template <class Math, class Epilogue, int kTiles, PlanKind kKind, int kMostTiles = 1>
const char* launch(const Plan& plan, const RecurrenceParams& p, int64_t units, int64_t row_groups,
                   int64_t shared, void* stream) {
  Launch how{};
  const int64_t unit_ctas =
      kKind == PlanKind::kStep ? ceil_div(units, kUnitTile) : int64_t{plan.unit_ctas};
  how.grid = dim3(static_cast<unsigned>(unit_ctas), static_cast<unsigned>(row_groups),
                  static_cast<unsigned>(p.D));
  how.threads = 32 * split_of(kKind) * (kKind == PlanKind::kCluster ? plan.unit_tiles : 1);
  how.shared_bytes = shared;
  how.cluster = kKind == PlanKind::kCluster ? plan.unit_ctas : 0;
  how.cooperative = kKind == PlanKind::kGrid;
  how.stream = stream;
  static Prepared prepared;
  return launch_kernel(recurrence_kernel<Math, Epilogue, kTiles, kKind, kMostTiles>, how, p,
                       prepared);
}

// One launch of one step's product, its rows shared out anew: a packed batch shrinks or grows.
template <class Math, class Epilogue>
const char* launch_step(const Plan& plan, const RecurrenceParams& p, void* stream) {
  constexpr int kTiles = kStepRows / 8;
  int64_t reach = 0;
  for (int d = 0; d < p.D; ++d) {
    const int64_t rows =
        Epilogue::kBackward ? std::max(p.rows[d].active, p.rows[d].before) : p.rows[d].active;
    reach = std::max(reach, rows);
  }
  if (reach == 0) return nullptr;
  const int64_t groups = std::min<int64_t>(ceil_div(reach, kStepRows), kMostBlocks);
  const DType dtype = sizeof(typename Math::Acc) == 8 ? DType::kFloat64 : DType::kFloat32;
  const int64_t shared = shared_bytes(PlanKind::kStep, dtype, false, Epilogue::kGates, 1, kStepRows,
                                      p.product.in.bytes);
  return launch<Math, Epilogue, kTiles, PlanKind::kStep>(plan, p, p.product.units, groups, shared,
                                                         stream);
}

// All steps of the walk, one or two launches each.
template <class Math, class First, class Second>
const char* walk(const Plan& plan, RecurrenceParams p, const Product* second, const Steps& steps,
                 void* stream) {
  const Product first = p.product;
  for (int64_t s = p.s_begin, end = p.s_end; s < end; ++s) {
    p.s_begin = s;
    p.s_end = s + 1;
    for (int d = 0; d < p.D; ++d) p.rows[d] = rows_at(steps, s, First::kBackward != (d == 1));
    p.product = first;
    if (const char* error = launch_step<Math, First>(plan, p, stream)) return error;
    if (!second) continue;
    p.product = *second;
    if (const char* error = launch_step<Math, Second>(plan, p, stream)) return error;
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
                     const Steps& steps, void* stream) {
  using S = typename Math::Storage;
  using Forward = ForwardCell<Cell, S>;
  using Backward = BackwardCell<Cell, S>;
  if (plan.kind == PlanKind::kStep) {
    if (!plan.backward) return walk<Math, Forward, Project<S>>(plan, p, second, steps, stream);
    return second ? walk<Math, JoinGradients<S>, Backward>(plan, p, second, steps, stream)
                  : walk<Math, Backward, Backward>(plan, p, nullptr, steps, stream);
  }
  if constexpr (!std::is_same_v<S, double>) {
    return plan.backward ? launch_persistent<Math, Backward>(plan, p, stream)
                         : launch_persistent<Math, Forward>(plan, p, stream);
  }
  return "no persistent kernel was compiled for this dtype";
}

template <class Math>
const char* run_cell(CellKind cell, const Plan& plan, const RecurrenceParams& params,
                     const Product* second, const Steps& steps, void* stream) {
  switch (cell) {
#define LSTM_FUSED_CASE(name, Cell) \
  case CellKind::k##Cell: return run_with<Cell, Math>(plan, params, second, steps, stream);
    LSTM_FUSED_CELLS(LSTM_FUSED_CASE)
#undef LSTM_FUSED_CASE
    default: return "no kernel was compiled for this cell";
  }
}

}  // namespace
}  // namespace lstm_fused::cuda
