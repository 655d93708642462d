// The kernel of the gemm plan: the epilogue of a step, after a product by cuBLAS. A thread for each
// unit of a row. Grid: (units, rows, directions).
#pragma once

#include "epilogue.h"
#include "plan.h"
#include "ptx/threads.h"

namespace lstm_fused::cuda {

template <class Epilogue, class S>
LSTM_FUSED_KERNEL(kPointwiseUnits* kPointwiseRows, sizeof(S) == 8 ? 3 : 4)
pointwise_kernel(const LSTM_FUSED_CONSTANT RecurrenceParams p) {
  using C = Compute<S>;
  const int d = block_index().z;
  const StepRows& rows = p.rows[d];
  const int64_t units = p.product.units, count = Epilogue::row_count(rows);
  const int64_t u = int64_t{block_index().x} * kPointwiseUnits + thread_index() % kPointwiseUnits;
  if (u >= units) return;
  const Exchange& next = p.product.out;
  const int64_t columns = next.bytes / static_cast<int64_t>(sizeof(S)) / Epilogue::kOut;
  const int64_t first =
      int64_t{block_index().y} * kPointwiseRows + thread_index() / kPointwiseUnits;
  for (int64_t n = first; n < count; n += int64_t{block_count().y} * kPointwiseRows) {
    const C* products = as<C>(p.products[d]) + n * Epilogue::kGates * units + u;
    C product[Epilogue::kGates];
    LSTM_FUSED_UNROLL
    for (int m = 0; m < Epilogue::kGates; ++m) product[m] = products[Epilogue::gate(m) * units];
    typename Epilogue::Unit unit;
    S out[Epilogue::kOut];
    Epilogue::fetch(p, rows, d, n, u, unit);
    if (Epilogue::apply(p, rows, d, n, u, unit, product, out)) {
      S* to = reinterpret_cast<S*>(next.at(p.s_begin + 1, d, n)) + u;
      LSTM_FUSED_UNROLL
      for (int v = 0; v < Epilogue::kOut; ++v) to[v * columns] = out[v];
    }
    Epilogue::store(p, rows, d, n, u, unit);
  }
}

}  // namespace lstm_fused::cuda
