// Transposition of a square of vectors in registers, and sums of lanes by the same stages.
#pragma once

#include "simd.h"

namespace lstm_fused {
namespace {

template <int Step, class V>
LSTM_FUSED_INLINE void transpose_stage(V* rows) {
  constexpr int lanes = sizeof(V) / sizeof(V{}[0]);
  using Bits = typename VectorOf<decltype(V{}[0] + 0)>::bits;
  Bits low = {}, high = {};
#pragma GCC unroll 16
  for (int l = 0; l < lanes; ++l) {
    low[l] = (l & Step) ? lanes + l - Step : l;
    high[l] = (l & Step) ? lanes + l : l + Step;
  }
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) {
    if (i & Step) continue;
    const V a = rows[i], b = rows[i + Step];
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i + Step] = __builtin_shuffle(a, b, high);
  }
}

template <class V>
LSTM_FUSED_INLINE void transpose(V* rows) {
  constexpr int lanes = sizeof(V) / sizeof(V{}[0]);
  if constexpr (lanes > 8) transpose_stage<8>(rows);
  if constexpr (lanes > 4) transpose_stage<4>(rows);
  if constexpr (lanes > 2) transpose_stage<2>(rows);
  transpose_stage<1>(rows);
}

// The sum of each row's lanes, that of row l in lane l. Each stage halves the rows: of two that are
// Step apart it adds the halves that belong together, one row's to lanes without the bit Step.
template <int Step, class V>
LSTM_FUSED_INLINE void sum_stage(V* rows) {
  constexpr int lanes = sizeof(V) / sizeof(V{}[0]);
  using Bits = typename VectorOf<decltype(V{}[0] + 0)>::bits;
  Bits own = {}, other = {};
#pragma GCC unroll 16
  for (int l = 0; l < lanes; ++l) {
    own[l] = (l & Step) ? lanes + l : l;
    other[l] = (l & Step) ? lanes + l - Step : l + Step;
  }
#pragma GCC unroll 16
  for (int i = 0; i < Step; ++i)
    rows[i] = __builtin_shuffle(rows[i], rows[i + Step], own) +
              __builtin_shuffle(rows[i], rows[i + Step], other);
}

template <class V>
LSTM_FUSED_INLINE V sums_as_lanes(V* rows) {
  constexpr int lanes = sizeof(V) / sizeof(V{}[0]);
  if constexpr (lanes > 8) sum_stage<8>(rows);
  if constexpr (lanes > 4) sum_stage<4>(rows);
  if constexpr (lanes > 2) sum_stage<2>(rows);
  sum_stage<1>(rows);
  return rows[0];
}

}  // namespace
}  // namespace lstm_fused
