// Packing: copies of the weights in the order in which tiles read them.
#pragma once

#include "partition.h"
#include "tile.h"
#include "transpose.h"

namespace lstm_fused {
namespace {

// One vector of `lanes` tile steps from a row of K elements, starting at step k.
template <class M, class S>
LSTM_FUSED_INLINE typename M::V load_steps(const S* row, int64_t k, int64_t K) {
  if constexpr (M::kPair == 1) {
    return load_first<typename M::V>(row + k, K - k);
  } else {
    constexpr int64_t wanted = sizeof(typename M::V) / sizeof(S);
    typename M::V v = {};
    std::memcpy(&v, row + k * M::kPair, sizeof(S) * min64(wanted, K - k * M::kPair));
    return v;
  }
}

// dst[step * dst_stride + lane] = w[(row0 + lane) * K + k], lane < rows, else 0: rows become lanes.
template <class M, class S>
void pack_rows_as_lanes(typename M::Element* dst, int64_t dst_stride, const S* w, int64_t rows,
                        int64_t K) {
  using V = typename M::V;
  constexpr int lanes = VectorOf<typename M::Compute>::lanes;
  const int64_t steps = ceil_div(K, M::kPair);
  for (int64_t k = 0; k < steps; k += lanes) {
    V tile[lanes];
    if (rows >= lanes && (k + lanes) * M::kPair <= K) {
      LSTM_FUSED_UNROLLED_FOR (int l = 0; l < lanes; ++l)
        tile[l] = load_steps<M>(w + l * K, k, (k + lanes) * M::kPair);
    } else {
      for (int64_t l = 0; l < lanes; ++l) tile[l] = l < rows ? load_steps<M>(w + l * K, k, K) : V{};
    }
    // Prefetch the lines that the next block writes: one a step, at a stride that the hardware
    // prefetcher does not follow.
    LSTM_FUSED_UNROLLED_FOR (int l = 0; l < lanes; ++l)
      prefetch_to_write(dst + (k + lanes + l) * dst_stride);
    transpose(tile);
    const int64_t here = min64(lanes, steps - k);
    if (here == lanes) {
      LSTM_FUSED_UNROLLED_FOR (int l = 0; l < lanes; ++l)
        std::memcpy(dst + (k + l) * dst_stride, &tile[l], sizeof(V));
    } else {
      for (int64_t l = 0; l < here; ++l)
        std::memcpy(dst + (k + l) * dst_stride, &tile[l], sizeof(V));
    }
  }
}

// A range of column vectors of B, cut into panels of at most kMaxCols.
template <class M>
struct Panels {
  using E = typename M::Element;
  Range vectors;
  int64_t depth;  // tile steps: rows of B, or pairs of them
  E* data;

  static constexpr int lanes = VectorOf<typename M::Compute>::lanes;
  static constexpr int width = lanes * M::kPair;  // elements of a vector
  int64_t count() const { return ceil_div(vectors.size(), kMaxCols); }
  int cols(int64_t panel) const {
    return static_cast<int>(min64(kMaxCols, vectors.size() - panel * kMaxCols));
  }
  int64_t first_vector(int64_t panel) const { return vectors.begin + panel * kMaxCols; }
  E* panel(int64_t p) const { return data + p * kMaxCols * depth * width; }
};

// Tile step `step` of every panel from rows of n elements; row_of(k) is row k of B, null for zeros.
template <class M, class RowOf>
void pack_panel_step(const Panels<M>& panels, int64_t step, int64_t n, const RowOf& row_of) {
  using Row = decltype(row_of(0));
  constexpr int lanes = Panels<M>::lanes;
  Row rows[M::kPair];
  for (int i = 0; i < M::kPair; ++i) rows[i] = row_of(step * M::kPair + i);
  for (int64_t p = 0; p < panels.count(); ++p) {
    const int cols = panels.cols(p);
    typename M::Element* panel = panels.panel(p);
    for (int c = 0; c < cols; ++c) {
      const int64_t at = (panels.first_vector(p) + c) * lanes;
      Row from[M::kPair];
      for (int i = 0; i < M::kPair; ++i) from[i] = rows[i] && at < n ? rows[i] + at : nullptr;
      M::store_b(panel + Strips<M>::offset(panels.depth, c) + step * Strips<M>::pitch(cols, c),
                 from, n - at);
    }
  }
}

// The gates of the pre-activations that belong to the input's or to the hidden state's weights.
struct GateOrder {
  int G, P;
  bool hidden;
  int operator()(int64_t j) const {
    return hidden ? static_cast<int>(j) : input_gate_of(G, P, static_cast<int>(j));
  }
};

// Tile steps `range` of panels of w (G * H, n), its rows in the order of the pre-activations'
// gradients: block, pre-activation, lane. The last block has only the lanes that hold a unit,
// rounded up to a tile step. gate_of gives a pre-activation's gate.
template <class M, class S>
void pack_gate_rows(const Panels<M>& panels, Range range, GateOrder gate_of, const S* w, int64_t H,
                    int64_t n) {
  const int64_t G = gate_of.G;
  const int64_t whole = H / kBlock * kBlock;
  const int64_t rest = round_up(H - whole, M::kPair);
  for (int64_t step = range.begin; step < range.end; ++step)
    pack_panel_step(panels, step, n, [&](int64_t k) {
      const bool last = k >= G * whole;
      const int64_t i = last ? k - G * whole : k, width = last ? rest : kBlock;
      const int64_t gate = gate_of(i / width % G);
      const int64_t u = (last ? whole : i / (G * kBlock) * kBlock) + i % width;
      return u < H ? w + (gate * H + u) * n : nullptr;
    });
}

// The same of w (G * H, K) where the units of a head, K of them, have K inputs of their own: the
// rest of a row of B (n,) is zero. rows: (pair, n) of scratch memory. K is whole blocks.
template <class M, class S>
void pack_head_rows(const Panels<M>& panels, Range range, GateOrder gate_of, const S* w, int64_t K,
                    int64_t n, S* rows) {
  const int64_t G = gate_of.G;
  for (int64_t step = range.begin; step < range.end; ++step)
    pack_panel_step(panels, step, n, [&](int64_t k) {
      const int64_t gate = gate_of(k / kBlock % G), u = k / (G * kBlock) * kBlock + k % kBlock;
      S* row = rows + k % M::kPair * n;
      for (int64_t i = 0; i < n; ++i) row[i] = S{};
      std::memcpy(row + u / K * K, w + (gate * n + u) * K, K * sizeof(S));
      return static_cast<const S*>(row);
    });
}

// Panels whose column p is row p of w (n, K): B = w transposed.
template <class M, class S>
void pack_transposed(const Panels<M>& panels, const S* w, int64_t n, int64_t K) {
  constexpr int lanes = Panels<M>::lanes;
  for (int64_t p = 0; p < panels.count(); ++p) {
    const int cols = panels.cols(p);
    for (int c = 0; c < cols; ++c) {
      const int64_t first = (panels.first_vector(p) + c) * lanes;
      pack_rows_as_lanes<M>(panels.panel(p) + Strips<M>::offset(panels.depth, c),
                            Strips<M>::pitch(cols, c), w + first * K, n - first, K);
    }
  }
}

}  // namespace
}  // namespace lstm_fused
