// Products of few rows with weights that are read in place, and weight gradients of few rows: what
// packing would cost more than it saves.
#pragma once

#include "partition.h"
#include "tile.h"

namespace lstm_fused {
namespace {

// Rows of A at once.
constexpr int kInPlaceRows = 4;
// Rows of W at once: enough products for each sum that is read and written.
constexpr int kInPlaceDepth = 4;

// out[r] (columns) += sum over i < Depth of a[r][i] * w[i] (columns), r < Rows. What out has past
// the last column up to the end of its vector is written, too.
template <int Rows, int Depth, class A, class S>
LSTM_FUSED_INLINE void add_rows(const A* const* a, const S* w, int64_t pitch, Range columns,
                                A* const* out) {
  using V = Vector<A>;
  constexpr int lanes = VectorOf<A>::lanes;
  V factor[Rows][Depth];
  LSTM_FUSED_UNROLLED_FOR (int r = 0; r < Rows; ++r)
    LSTM_FUSED_UNROLLED_FOR (int i = 0; i < Depth; ++i) factor[r][i] = splat_of<V>(a[r][i]);
  const auto add = [&](int64_t at, const V(&row)[Depth]) {
    LSTM_FUSED_UNROLLED_FOR (int r = 0; r < Rows; ++r) {
      V sum = load<V>(out[r] + at);
      LSTM_FUSED_UNROLLED_FOR (int i = 0; i < Depth; ++i) sum += factor[r][i] * row[i];
      store(out[r] + at, sum);
    }
  };
  int64_t at = columns.begin;
  for (; at + lanes <= columns.end; at += lanes) {
    V row[Depth];
    LSTM_FUSED_UNROLLED_FOR (int i = 0; i < Depth; ++i) row[i] = load<V>(w + i * pitch + at);
    add(at, row);
  }
  if (at == columns.end) return;
  V row[Depth];
  LSTM_FUSED_UNROLLED_FOR (int i = 0; i < Depth; ++i)
    row[i] = load_first<V>(w + i * pitch + at, columns.end - at);
  add(at, row);
}

// Sums of as many rows as a step may have, and of kInPlaceRows of them over a piece of W.
template <class A>
struct InPlaceSums {
  A *all[kDirectMaxRows], *recent[kInPlaceRows];

  // memory: size(columns) elements.
  InPlaceSums(A* memory, int64_t columns) {
    for (int r = 0; r < kDirectMaxRows; ++r) all[r] = memory + r * columns;
    for (int r = 0; r < kInPlaceRows; ++r) recent[r] = memory + (kDirectMaxRows + r) * columns;
  }
  static int64_t size(int64_t columns) { return (kDirectMaxRows + kInPlaceRows) * columns; }
};

// sums.all[first + r] (columns) = (add ? the same : 0) + a[r] times w (G * units, pitch), r < Rows.
// Element j of unit u is at a[r] + u / kBlock * block_pitch + j * kBlock + u % kBlock.
template <int G, int Rows, class A, class S>
void multiply_in_place(const A* const* a, int64_t block_pitch, int (*gate_of)(int), const S* w,
                       int64_t units, int64_t pitch, Range columns, const InPlaceSums<A>& sums,
                       int64_t first, bool add) {
  using V = Vector<A>;
  constexpr int64_t kPieceUnits = kPieceSteps / G / kInPlaceDepth * kInPlaceDepth;
  for (int64_t begin = 0; begin < units; begin += kPieceUnits) {
    for (int r = 0; r < Rows; ++r)
      for (int64_t at = columns.begin; at < columns.end; at += VectorOf<A>::lanes)
        store(sums.recent[r] + at, V{});
    const int64_t end = min64(begin + kPieceUnits, units);
    for (int64_t u = begin; u < end; u += kInPlaceDepth)
      for (int j = 0; j < G; ++j) {
        const A* from[Rows];
        for (int r = 0; r < Rows; ++r)
          from[r] = a[r] + u / kBlock * block_pitch + j * kBlock + u % kBlock;
        const S* row = w + (gate_of(j) * units + u) * pitch;
        if (u + kInPlaceDepth <= end) {
          add_rows<Rows, kInPlaceDepth>(from, row, pitch, columns, sums.recent);
        } else {
          for (int64_t i = u; i < end; ++i, row += pitch) {
            add_rows<Rows, 1>(from, row, pitch, columns, sums.recent);
            for (int r = 0; r < Rows; ++r) ++from[r];
          }
        }
      }
    for (int r = 0; r < Rows; ++r)
      for (int64_t at = columns.begin; at < columns.end; at += VectorOf<A>::lanes) {
        const V recent = load<V>(sums.recent[r] + at);
        A* all = sums.all[first + r] + at;
        store(all, add || begin > 0 ? load<V>(all) + recent : recent);
      }
  }
}

// to[i] (columns) = sum over s of a[s][i] * b[s] (columns), for Units rows of a weight gradient.
template <int Units, class A, class B, class S>
void outer_products(const A* const* a, const B* const* b, int64_t count, S* to, int64_t columns) {
  using V = Vector<A>;
  constexpr int lanes = VectorOf<A>::lanes;
  const auto put = [&](int64_t at, const auto& load_b, const auto& store_to) {
    V sum[Units] = {};
    for (int64_t s = 0; s < count; ++s) {
      const V row = load_b(b[s] + at);
      LSTM_FUSED_UNROLLED_FOR (int i = 0; i < Units; ++i) sum[i] += splat_of<V>(a[s][i]) * row;
    }
    LSTM_FUSED_UNROLLED_FOR (int i = 0; i < Units; ++i) store_to(to + i * columns + at, sum[i]);
  };
  int64_t at = 0;
  for (; at + lanes <= columns; at += lanes)
    put(at, [](const B* p) { return load<V>(p); }, [](S* p, const V& v) { store(p, v); });
  if (at == columns) return;
  const int64_t rest = columns - at;
  put(
      at, [rest](const B* p) { return load_first<V>(p, rest); },
      [rest](S* p, const V& v) { store_first(p, v, rest); });
}

}  // namespace
}  // namespace lstm_fused
