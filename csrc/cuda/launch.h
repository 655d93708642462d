// From a plan to launches: the body of each arithmetic's .cu file. launch_plan picks the kernel
// that was compiled for the plan and launches it, once for a persistent plan and once a step for
// the others.
#pragma once

#include <algorithm>
#include <type_traits>

#include "backward.h"
#include "forward.h"
#include "initial.h"
#include "kernel_launch.h"
#include "kernels.h"
#include "pointwise.h"
#include "recurrence.h"

namespace lstm_fused::cuda {
namespace {

template <auto kValue>
using Constant = std::integral_constant<decltype(kValue), kValue>;

// call(row tiles, kind, unit tiles) of a persistent plan, as constants.
template <class Call>
const char* with_tiles(const Plan& plan, Call call) {
  const auto with_rows = [&](auto kind, auto unit_tiles) -> const char* {
    switch (plan.tile_rows) {
      case 8: return call(Constant<1>{}, kind, unit_tiles);
      case 16: return call(Constant<2>{}, kind, unit_tiles);
      case 32:
        if constexpr (kind == PlanKind::kGrid) return call(Constant<4>{}, kind, unit_tiles);
    }
    return "no kernel was compiled for the plan's tile";
  };
  if (plan.kind == PlanKind::kGrid) return with_rows(Constant<PlanKind::kGrid>{}, Constant<1>{});
  constexpr Constant<PlanKind::kCluster> cluster;
  switch (compiled_unit_tiles(plan.kind, plan.unit_tiles)) {
    case 2: return with_rows(cluster, Constant<2>{});
    case 3: return with_rows(cluster, Constant<3>{});
    case 4: return with_rows(cluster, Constant<4>{});
    default: return "no kernel was compiled for so many units";
  }
}

// Which devices a kernel, named by its template arguments, has been configured for.
template <class... Compiled>
ConfiguredDevices& configured_devices() {
  static ConfiguredDevices devices;
  return devices;
}

LaunchConfig configure(const Plan& plan, const RecurrenceParams& p, int64_t unit_ctas,
                       int64_t row_groups, int64_t shared_bytes, void* stream) {
  const dim3 grid(static_cast<unsigned>(unit_ctas), static_cast<unsigned>(row_groups),
                  static_cast<unsigned>(p.D));
  return {grid,
          plan.threads,
          shared_bytes,
          plan.kind == PlanKind::kCluster ? plan.unit_ctas : 0,
          plan.kind == PlanKind::kGrid,
          stream};
}

// The B that a forward pass begins with, which is zeros without an initial state.
template <class S>
const char* launch_initial(RecurrenceParams p, const Steps& steps, void* stream) {
  if (!p.h0 && !p.in_parts) return nullptr;
  for (int d = 0; d < p.D; ++d) p.rows[d] = rows_at(steps, p.s_begin, d == 1);
  const dim3 grid(
      static_cast<unsigned>(ceil_div(p.R, kPointwiseUnits)),
      static_cast<unsigned>(std::min<int64_t>(ceil_div(p.N, kPointwiseRows), kMaxGridY)),
      static_cast<unsigned>(p.D));
  return launch_kernel(initial_kernel<S>,
                       {grid, kPointwiseUnits * kPointwiseRows, 0, 0, false, stream}, p,
                       configured_devices<S>());
}

// A step's product and epilogue. Its rows are partitioned anew: a packed batch shrinks or grows.
template <class Math, class Epilogue>
const char* launch_step(const Plan& plan, RecurrenceParams& p, Gemm& gemm, void* stream) {
  using S = typename Math::Storage;
  int64_t count[2] = {}, max_count = 0;
  for (int d = 0; d < p.D; ++d) {
    count[d] = Epilogue::row_count(p.rows[d]);
    max_count = std::max(max_count, count[d]);
  }
  if (max_count == 0) return nullptr;
  const auto groups_of = [&](int64_t rows) {
    return std::min<int64_t>(ceil_div(max_count, rows), kMaxGridY);
  };
  const int64_t units = p.product.units;
  if (plan.kind == PlanKind::kStep) {
    constexpr int kRowTiles = kStepRows / 8;
    const DType dtype = sizeof(typename Math::Acc) == 8 ? DType::kFloat64 : DType::kFloat32;
    const int64_t shared = shared_bytes(PlanKind::kStep, dtype, false, Epilogue::kGates, 1,
                                        kStepRows, p.product.in.bytes);
    return launch_kernel(
        recurrence_kernel<Math, Epilogue, kRowTiles, PlanKind::kStep, 1>,
        configure(plan, p, ceil_div(units, kUnitTile), groups_of(kStepRows), shared, stream), p,
        configured_devices<Math, Epilogue>());
  }
  for (int d = 0; d < p.D; ++d)
    if (count[d])
      p.products[d] = gemm.multiply(p.product, Epilogue::kGates, p.s_begin, d, count[d]);
  return launch_kernel(
      pointwise_kernel<Epilogue, S>,
      configure(plan, p, ceil_div(units, kPointwiseUnits), groups_of(kPointwiseRows), 0, stream), p,
      configured_devices<Epilogue, S>());
}

// All steps, each with its one or two products.
template <class Math, class First, class Second>
const char* launch_steps(const Plan& plan, RecurrenceParams p, const Product* second,
                         const Steps& steps, Gemm& gemm, void* stream) {
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

// A Launcher (kernels.h).
template <class Cell, class Math>
const char* launch_plan(const Plan& plan, const RecurrenceParams& p, const Product* second,
                        const Steps& steps, Gemm& gemm, void* stream) {
  using S = typename Math::Storage;
  using Forward = ForwardCell<Cell, S>;
  using Backward = BackwardCell<Cell, S>;
  if (!plan.backward)
    if (const char* error = launch_initial<S>(p, steps, stream)) return error;
  if (is_stepwise(plan.kind)) {
    if (!plan.backward)
      return launch_steps<Math, Forward, Project<S>>(plan, p, second, steps, gemm, stream);
    return second ? launch_steps<Math, ProjectedGradient<S>, Backward>(plan, p, second, steps, gemm,
                                                                       stream)
                  : launch_steps<Math, Backward, Backward>(plan, p, nullptr, steps, gemm, stream);
  }
  if constexpr (!Math::kPersistent) {
    return "no persistent kernel was compiled for this dtype";
  } else {
    const LaunchConfig config =
        configure(plan, p, plan.unit_ctas, plan.row_groups, plan.shared_bytes, stream);
    return with_tiles(plan, [&](auto row_tiles, auto kind, auto unit_tiles) {
      const auto launch = [&]<class Epilogue>(std::type_identity<Epilogue>) {
        return launch_kernel(recurrence_kernel<Math, Epilogue, row_tiles, kind, unit_tiles>, config,
                             p,
                             configured_devices<Math, Epilogue, decltype(row_tiles), decltype(kind),
                                                decltype(unit_tiles)>());
      };
      return plan.backward ? launch(std::type_identity<Backward>{})
                           : launch(std::type_identity<Forward>{});
    });
  }
}

template <class Math>
constexpr Launcher* kLaunchers[] = {
#define LSTM_FUSED_LAUNCHER(name, Cell) launch_plan<Cell, Math>,
    LSTM_FUSED_CELLS(LSTM_FUSED_LAUNCHER)
#undef LSTM_FUSED_LAUNCHER
};

// The launchers of one arithmetic, by cell. Math must be what the arithmetic's row says.
template <Arithmetic kArithmetic, class Math>
constexpr Launcher* const* launchers() {
  constexpr ArithmeticFacts row = facts(kArithmetic);
  static_assert(row.tensor_cores == Math::kTensorCores && row.persistent == Math::kPersistent);
  static_assert(storage_bytes(row.dtype) == sizeof(typename Math::Storage));
  static_assert(compute_bytes(row.dtype) == sizeof(typename Math::Acc));
  return kLaunchers<Math>;
}

}  // namespace
}  // namespace lstm_fused::cuda
