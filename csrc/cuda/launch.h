// From a plan to launches: the body of each arithmetic's .cu file. launch_plan picks the kernel
// that was compiled for the plan and launches it, once for a persistent plan and once a step for
// the others.
#pragma once

#include "backward.h"
#include "forward.h"
#include "recurrence.h"
#include "stepwise.h"

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

// A step's product and epilogue.
template <class Math, class Epilogue>
const char* launch_step(const Plan& plan, RecurrenceParams& p, Gemm& gemm, void* stream) {
  using S = typename Math::Storage;
  const RowCounts counts = row_counts<Epilogue>(p);
  if (counts.most == 0) return nullptr;
  if (plan.kind == PlanKind::kGemm) {
    multiply<Epilogue>(p, counts, gemm);
    return launch_pointwise<Epilogue, S>(p, counts, stream);
  }
  constexpr int kRowTiles = kStepRows / 8;
  const DType dtype = sizeof(typename Math::Acc) == 8 ? DType::kFloat64 : DType::kFloat32;
  const int64_t shared = shared_bytes(PlanKind::kStep, dtype, false, Epilogue::kGates, 1, kStepRows,
                                      p.product.in.bytes);
  return launch_kernel(recurrence_kernel<Math, Epilogue, kRowTiles, PlanKind::kStep, 1>,
                       configure(plan, p, ceil_div(p.product.units, kUnitTile),
                                 counts.groups_of(kStepRows), shared, stream),
                       p, configured_devices<Math, Epilogue>());
}

// A Launcher (kernels.h).
template <class Cell, class Math>
const char* launch_plan(const Plan& plan, const RecurrenceParams& p, const Product* second,
                        const Steps& steps, Gemm& gemm, void* stream) {
  using S = typename Math::Storage;
  using Forward = ForwardCell<Cell, S>;
  using Backward = BackwardCell<Cell, S>;
  if (!plan.backward)
    if (const char* error = launch_initial<S, Math>(p, steps, stream)) return error;
  if (is_stepwise(plan.kind)) {
    return launch_steps<Epilogues<Cell, S>>(
        plan.backward, p, second, steps, [&]<class Epilogue>(RecurrenceParams& of_step) {
          return launch_step<Math, Epilogue>(plan, of_step, gemm, stream);
        });
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
