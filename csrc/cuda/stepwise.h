// What the plans with launches for each step share: the first B, the loop over the steps, and the
// product and epilogue of a step of the gemm plan.
#pragma once

#include <algorithm>
#include <type_traits>

#include "backward.h"
#include "forward.h"
#include "initial.h"
#include "kernel_launch.h"
#include "kernels.h"
#include "operand.h"
#include "pointwise.h"

namespace lstm_fused::cuda {
namespace {

// Which devices a kernel, named by its template arguments, has been configured for.
template <class... Compiled>
ConfiguredDevices& configured_devices() {
  static ConfiguredDevices devices;
  return devices;
}

// The B that a forward pass begins with, which is zeros without an initial state.
template <class S, class Operand>
const char* launch_initial(RecurrenceParams p, const Steps& steps, void* stream) {
  if (!p.product.in.data || (!p.h0 && !p.in_parts)) return nullptr;
  for (int d = 0; d < p.D; ++d) p.rows[d] = rows_at(steps, p.s_begin, d == 1);
  const dim3 grid(
      static_cast<unsigned>(ceil_div(p.R, kPointwiseUnits)),
      static_cast<unsigned>(std::min<int64_t>(ceil_div(p.N, kPointwiseRows), kMaxGridY)),
      static_cast<unsigned>(p.D));
  return launch_kernel(initial_kernel<S, Operand>,
                       {grid, kPointwiseUnits * kPointwiseRows, 0, 0, false, stream}, p,
                       configured_devices<S, Operand>());
}

// How many rows of each direction a step's product is computed for.
struct RowCounts {
  int64_t of[2], most;

  // CTAs along y that divide the rows, so many each.
  int64_t groups_of(int64_t rows) const {
    return std::min<int64_t>(ceil_div(most, rows), kMaxGridY);
  }
};

template <class Epilogue>
RowCounts row_counts(const RecurrenceParams& p) {
  RowCounts counts{};
  for (int d = 0; d < p.D; ++d) {
    counts.of[d] = Epilogue::row_count(p.rows[d]);
    counts.most = std::max(counts.most, counts.of[d]);
  }
  return counts;
}

// A step's product in the gemm plan.
template <class Epilogue>
void multiply(RecurrenceParams& p, const RowCounts& counts, Gemm& gemm) {
  for (int d = 0; d < p.D; ++d)
    p.products[d] = p.product.in.data && counts.of[d]
                        ? gemm.multiply(p.product, Epilogue::kGates, p.s_begin, d, counts.of[d])
                        : nullptr;
}

// Its epilogue, whose rows are partitioned anew: a packed batch shrinks or grows.
template <class Epilogue, class S>
const char* launch_pointwise(const RecurrenceParams& p, const RowCounts& counts, void* stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(p.product.units, kPointwiseUnits)),
                  static_cast<unsigned>(counts.groups_of(kPointwiseRows)),
                  static_cast<unsigned>(p.D));
  return launch_kernel(pointwise_kernel<Epilogue, S>,
                       {grid, kPointwiseUnits * kPointwiseRows, 0, 0, false, stream}, p,
                       configured_devices<Epilogue, S>());
}

// All steps, each with its one or two products; at once if params.steps say so. launch<Epilogue>
// (params of the step).
template <class Own, class Launch>
const char* launch_steps(bool backward, RecurrenceParams p, const Product* second,
                         const Steps& steps, const Launch& launch) {
  if (p.steps.T > 0) {
    for (StepRows& rows : p.rows) rows.active = p.N;
    return backward ? launch.template operator()<typename Own::Backward>(p)
                    : launch.template operator()<typename Own::Forward>(p);
  }
  const Product first = p.product;
  for (int64_t s = p.s_begin, end = p.s_end; s < end; ++s) {
    p.s_begin = s;
    p.s_end = s + 1;
    for (int d = 0; d < p.D; ++d) p.rows[d] = rows_at(steps, s, backward != (d == 1));
    p.product = first;
    const char* error = !backward ? launch.template operator()<typename Own::Forward>(p)
                        : second  ? launch.template operator()<typename Own::FirstBackward>(p)
                                  : launch.template operator()<typename Own::Backward>(p);
    if (error) return error;
    if (!second) continue;
    p.product = *second;
    error = backward ? launch.template operator()<typename Own::Backward>(p)
                     : launch.template operator()<typename Own::SecondForward>(p);
    if (error) return error;
  }
  return nullptr;
}

}  // namespace
}  // namespace lstm_fused::cuda
