// Copies of the weights in the order tiles read them, and the bookkeeping every kernel shares:
// scratch memory, even splits, which rows a thread owns.
#pragma once

#include "plan.h"
#include "simd.h"
#include "team.h"
#include "tile.h"

namespace lstm_fused {
namespace {

// Hands out aligned pieces of one scratch buffer. With a null base it only measures.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    char* p = base_ ? base_ + used_ : nullptr;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return reinterpret_cast<T*>(p);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

inline Range split(int64_t total, int64_t parts, int64_t i) {
  return {total * i / parts, total * (i + 1) / parts};
}

inline int64_t min64(int64_t a, int64_t b) {
  return a < b ? a : b;
}
inline int64_t max64(int64_t a, int64_t b) {
  return a > b ? a : b;
}

// A thread's place in the team, as the plan divides it.
struct Place {
  int direction_group, row_group, unit_group;

  Place(const Plan& p, int worker)
      : direction_group(worker / (p.row_groups * p.unit_groups)),
        row_group(worker / p.unit_groups % p.row_groups),
        unit_group(worker % p.unit_groups) {}
};

// The batch rows of a row group. Dense rows are contiguous; packed ones are dealt out in turn,
// since the first are the longest.
struct RowGroup {
  int64_t first, step, count;

  RowGroup(const Steps& s, const Plan& p, int group) {
    if (s.sizes) {
      first = group;
      step = p.row_groups;
      count = group < s.N ? ceil_div(s.N - group, step) : 0;
    } else {
      const Range r = split(s.N, p.row_groups, group);
      first = r.begin;
      step = 1;
      count = r.size();
    }
  }
  int64_t row(int64_t i) const { return first + i * step; }
  // How many of the group's rows are among the batch's first `active`.
  int64_t active(int64_t active_rows) const {
    const int64_t below = active_rows - first;
    return below <= 0 ? 0 : min64(count, ceil_div(below, step));
  }
};

// ---- transposition ----

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

// One vector of `lanes` tile steps from a row of K elements, starting at step k.
template <class M, class S>
LSTM_FUSED_INLINE typename M::V load_steps(const S* row, int64_t k, int64_t K) {
  if constexpr (M::kPair == 1) {
    return load_first<typename M::V>(row + k, K - k);
  } else {
    constexpr int64_t wanted = sizeof(typename M::V) / sizeof(S);
    typename M::V v = {};
    __builtin_memcpy(&v, row + k * M::kPair, sizeof(S) * min64(wanted, K - k * M::kPair));
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
#pragma GCC unroll 16
      for (int l = 0; l < lanes; ++l) tile[l] = load_steps<M>(w + l * K, k, (k + lanes) * M::kPair);
    } else {
      for (int64_t l = 0; l < lanes; ++l) tile[l] = l < rows ? load_steps<M>(w + l * K, k, K) : V{};
    }
    // What the next block will write: a line a step, too far apart to be foreseen.
#pragma GCC unroll 16
    for (int l = 0; l < lanes; ++l) __builtin_prefetch(dst + (k + lanes + l) * dst_stride, 1);
    transpose(tile);
    const int64_t here = min64(lanes, steps - k);
    if (here == lanes) {
#pragma GCC unroll 16
      for (int l = 0; l < lanes; ++l)
        __builtin_memcpy(dst + (k + l) * dst_stride, &tile[l], sizeof(V));
    } else {
      for (int64_t l = 0; l < here; ++l)
        __builtin_memcpy(dst + (k + l) * dst_stride, &tile[l], sizeof(V));
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
  constexpr int lanes = Panels<M>::lanes, width = Panels<M>::width;
  Row rows[M::kPair];
  for (int i = 0; i < M::kPair; ++i) rows[i] = row_of(step * M::kPair + i);
  for (int64_t p = 0; p < panels.count(); ++p) {
    const int cols = panels.cols(p);
    typename M::Element* dst = panels.panel(p) + step * cols * width;
    for (int c = 0; c < cols; ++c) {
      const int64_t at = (panels.first_vector(p) + c) * lanes;
      Row from[M::kPair];
      for (int i = 0; i < M::kPair; ++i) from[i] = rows[i] && at < n ? rows[i] + at : nullptr;
      M::store_b(dst + c * width, from, n - at);
    }
  }
}

// Tile steps `range` of panels of w (G * H, n), its rows taken in the order of the gradients of the
// sums: block, sum, lane. gate_of gives a sum's gate.
template <int G, class M, class S>
void pack_gate_rows(const Panels<M>& panels, Range range, int (*gate_of)(int), const S* w,
                    int64_t H, int64_t n) {
  for (int64_t step = range.begin; step < range.end; ++step)
    pack_panel_step(panels, step, n, [&](int64_t k) {
      const int64_t gate = gate_of(k / kBlock % G);
      const int64_t u = k / (G * kBlock) * kBlock + k % kBlock;
      return u < H ? w + (gate * H + u) * n : nullptr;
    });
}

// Panels whose column p is row p of w (n, K): B = w transposed.
template <class A, class S>
void pack_transposed(const Panels<Multiply<A>>& panels, const S* w, int64_t n, int64_t K) {
  constexpr int lanes = VectorOf<A>::lanes;
  for (int64_t p = 0; p < panels.count(); ++p) {
    const int cols = panels.cols(p);
    for (int c = 0; c < cols; ++c) {
      const int64_t first = (panels.first_vector(p) + c) * lanes;
      pack_rows_as_lanes<Multiply<A>>(panels.panel(p) + c * lanes, cols * lanes, w + first * K,
                                      n - first, K);
    }
  }
}

}  // namespace
}  // namespace lstm_fused
