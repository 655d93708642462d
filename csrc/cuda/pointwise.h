// The kernel of the gemm plan: the epilogue of a step, after a product by cuBLAS, or of all steps
// of a cell without products. A thread for each unit of a row. Grid: (units, rows, directions).
#pragma once

#include "epilogue.h"
#include "plan.h"
#include "ptx/threads.h"

namespace lstm_fused::cuda {

// The product of row n for unit u; zeros if there is none.
template <class Epilogue, class C>
LSTM_FUSED_DEVICE void load_product(const RecurrenceParams& p, int d, int64_t n, int64_t u,
                                    C (&product)[Epilogue::kGates]) {
  const int64_t units = p.product.units;
  const C* products = as<C>(p.products[d]) + n * Epilogue::kGates * units + u;
  LSTM_FUSED_UNROLL
  for (int m = 0; m < Epilogue::kGates; ++m)
    product[m] = p.products[d] ? products[Epilogue::gate(m) * units] : C(0);
}

// `out` into the buffer that the next product reads, if there is one.
template <class Epilogue, class S>
LSTM_FUSED_DEVICE void put_out(const RecurrenceParams& p, int d, int64_t n, int64_t u,
                               const S (&out)[Epilogue::kOut]) {
  const Exchange& next = p.product.out;
  if (!next.data) return;
  const int64_t columns = next.bytes / static_cast<int64_t>(sizeof(S)) / Epilogue::kOut;
  S* to = reinterpret_cast<S*>(next.at(p.s_begin + 1, d, n)) + u;
  LSTM_FUSED_UNROLL
  for (int v = 0; v < Epilogue::kOut; ++v) to[v * columns] = out[v];
}

// How many CTAs of the kernel an SM has space for: fewer of described cells, whose units have more
// values.
template <class Epilogue, class S>
constexpr int pointwise_ctas() {
  constexpr int ctas = sizeof(S) == 8 ? 3 : 4;
  if constexpr (requires { typename Epilogue::Values; })
    return Epilogue::Values::kDescribed ? ctas - 1 : ctas;
  else
    return ctas;
}

template <class Epilogue, class S>
LSTM_FUSED_KERNEL(kPointwiseUnits* kPointwiseRows, (pointwise_ctas<Epilogue, S>()))
pointwise_kernel(const LSTM_FUSED_CONSTANT RecurrenceParams p) {
  using C = Compute<S>;
  const int d = block_index().z;
  const int64_t u = int64_t{block_index().x} * kPointwiseUnits + thread_index() % kPointwiseUnits;
  if (u >= p.product.units) return;
  const bool one_step = p.steps.T == 0;
  const int64_t first =
      int64_t{block_index().y} * kPointwiseRows + thread_index() / kPointwiseUnits;
  const int64_t count = one_step ? Epilogue::row_count(p.rows[d]) : p.N;
  typename Epilogue::Constants constants;
  constants.load(p, d, u);
  for (int64_t n = first; n < count; n += int64_t{block_count().y} * kPointwiseRows)
    // Nothing but what a thread wrote itself is read in the next of several steps.
    for (int64_t s = p.s_begin; s < p.s_end; ++s) {
      const StepRows rows =
          one_step ? p.rows[d] : rows_at(p.steps, s, Epilogue::kBackward != (d == 1));
      if (n >= Epilogue::row_count(rows)) continue;
      C product[Epilogue::kGates];
      load_product<Epilogue>(p, d, n, u, product);
      typename Epilogue::Unit unit;
      S out[Epilogue::kOut];
      const Element<int64_t> e{rows, d, n, u};
      Epilogue::fetch(p, e, unit);
      if (Epilogue::apply(p, e, constants, unit, product, out))
        put_out<Epilogue, S>(p, d, n, u, out);
      Epilogue::store(p, e, unit);
    }
}

}  // namespace lstm_fused::cuda
