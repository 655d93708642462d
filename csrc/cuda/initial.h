// The kernel that writes B of a forward pass's first step: h0 or that of a checkpoint, or the reset
// state where a row begins anew. A thread for each unit of a row. Grid: (units, rows, directions).
#pragma once

#include "epilogue.h"
#include "plan.h"
#include "ptx/threads.h"

namespace lstm_fused::cuda {

// Operand: what B holds of a value (tile.h).
template <class S, class Operand>
LSTM_FUSED_KERNEL(kPointwiseUnits* kPointwiseRows, 4)
initial_kernel(const LSTM_FUSED_CONSTANT RecurrenceParams p) {
  const int d = block_index().z;
  const int64_t u = int64_t{block_index().x} * kPointwiseUnits + thread_index() % kPointwiseUnits;
  if (u >= p.R) return;
  const int64_t first =
      int64_t{block_index().y} * kPointwiseRows + thread_index() / kPointwiseUnits;
  for (int64_t n = first; n < p.N; n += int64_t{block_count().y} * kPointwiseRows) {
    const Element<int64_t> e{p.rows[d], d, n, u};
    const bool reset = reset_before(p, e, d == 1) != 0;
    const S h = p.resume && !reset
                    ? round_to<S>(as<Compute<S>>(p.resume)[(d * p.N + n) * p.resume_width + u])
                    : initial_hidden<S>(p, e, reset);
    // Both buffers: a row of packed data may begin at any step.
    for (int64_t s = 0; s < 2; ++s)
      reinterpret_cast<S*>(p.product.in.at(s, d, n))[u] = Operand::operand(h);
  }
}

}  // namespace lstm_fused::cuda
