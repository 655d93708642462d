// Launches of the described cells (cells/described.h), which have the gemm plan: the body of a .cu
// file of each dtype, apart from the other cells' so that they are compiled at the same time.
#pragma once

#include "normalized.h"
#include "stepwise.h"
#include "tile.h"

namespace lstm_fused::cuda {
namespace {

// A CTA for each row.
template <class Kernel, class Tag>
const char* launch_rows(Kernel kernel, Tag, const Plan& plan, const RecurrenceParams& p,
                        const RowCounts& counts, void* stream) {
  const dim3 grid(1, static_cast<unsigned>(counts.groups_of(1)), static_cast<unsigned>(p.D));
  return launch_kernel(kernel, {grid, plan.threads, plan.shared_bytes, 0, false, stream}, p,
                       configured_devices<Tag>());
}

// A Launcher (kernels.h).
template <class Cell, class S>
const char* launch_described(const Plan& plan, const RecurrenceParams& p, const Product* second,
                             const Steps& steps, Gemm& gemm, void* stream) {
  using Own = Epilogues<Cell, S>;
  using Forward = typename Own::Forward;
  using Backward = typename Own::Backward;
  if (plan.kind != PlanKind::kGemm) return "described cells have the gemm plan alone";
  if (!plan.backward)
    if (const char* error = launch_initial<S, FusedMultiplyAdd<S>>(p, steps, stream)) return error;
  return launch_steps<Own>(
      plan.backward, p, second, steps,
      [&]<class Epilogue>(RecurrenceParams& of_step) -> const char* {
        const RowCounts counts = row_counts<Epilogue>(of_step);
        if (counts.most == 0) return nullptr;
        multiply<Epilogue>(of_step, counts, gemm);
        constexpr bool kForward = std::is_same_v<Epilogue, Forward>;
        if constexpr (CellNumbers<Cell>::kGroups > 0 && kForward) {
          return launch_rows(normalized_forward_kernel<Cell, S>, Forward{}, plan, of_step, counts,
                             stream);
        } else if constexpr (CellNumbers<Cell>::kGroups > 0 && std::is_same_v<Epilogue, Backward>) {
          return launch_rows(normalized_backward_kernel<Cell, S>, Backward{}, plan, of_step, counts,
                             stream);
        } else {
          return launch_pointwise<Epilogue, S>(of_step, counts, stream);
        }
      });
}

template <class S>
constexpr Launcher* kDescribedLaunchers[] = {
#define LSTM_FUSED_LAUNCHER(name, Cell) launch_described<Cell, S>,
    LSTM_FUSED_DESCRIBED_CELLS(LSTM_FUSED_LAUNCHER)
#undef LSTM_FUSED_LAUNCHER
};

}  // namespace
}  // namespace lstm_fused::cuda
