// Transposition of a square of vectors in registers, and sums of lanes by the same stages.
#pragma once

#include <utility>

#include "simd.h"

namespace lstm_fused {
namespace {

// Lane l is lane l + FromB of b where l has the bit Step, else lane l + FromA of a.
template <int Step, int FromA, int FromB, class V, int... l>
LSTM_FUSED_INLINE V choose(const V& a, const V& b, std::integer_sequence<int, l...>) {
  using Bits [[maybe_unused]] = typename VectorOf<decltype(V{}[0] + 0)>::bits;
  constexpr int lanes = sizeof...(l);
  return LSTM_FUSED_SHUFFLE(Bits, a, b, ((l & Step) ? lanes + l + FromB : l + FromA)...);
}

template <int Step, class V>
LSTM_FUSED_INLINE void transpose_stage(V* rows) {
  constexpr int lanes = sizeof(V) / sizeof(V{}[0]);
  constexpr std::make_integer_sequence<int, lanes> each;
  LSTM_FUSED_UNROLLED_FOR (int i = 0; i < lanes; ++i) {
    if (i & Step) continue;
    const V a = rows[i], b = rows[i + Step];
    rows[i] = choose<Step, 0, -Step>(a, b, each);
    rows[i + Step] = choose<Step, Step, 0>(a, b, each);
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
  constexpr std::make_integer_sequence<int, lanes> each;
  LSTM_FUSED_UNROLLED_FOR (int i = 0; i < Step; ++i)
    rows[i] = choose<Step, 0, 0>(rows[i], rows[i + Step], each) +
              choose<Step, Step, -Step>(rows[i], rows[i + Step], each);
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
