// The register tile every matrix product here goes through: R rows of A, broadcast element by
// element, times C vectors of a packed panel of B, accumulated in R x C registers.
#pragma once

#include "isa.h"
#include "simd.h"

namespace lstm_fused {
namespace {

// Registers decide the tile: of 32 it is 6 x 4 accumulators, of 16 it is 6 x 2, or 3 x 4 for at
// most three rows. 6 x 2 reads half the bytes of B that 3 x 4 would read for as many multiply-adds.
constexpr int kMaxRows = kTileRows;
constexpr int kMaxCols = 4;                                  // vectors of a panel of B
constexpr int kStripCols = LSTM_FUSED_TILE_COLS;             // vectors of a tile of kMaxRows rows
constexpr int kWideRows = kMaxRows * kStripCols / kMaxCols;  // rows of a tile of kMaxCols vectors
constexpr int64_t kLine = 64;                                // bytes of a cache line

// How a tile multiplies. `Element` is what A is stored in, `kPair` how many of them one step takes,
// `Packed` the same for B: a vector of the panel holds kPair consecutive k for each lane.
template <class A>
struct Multiply {
  using Compute = A;
  using Element = A;
  static constexpr int kPair = 1;
  using V = Vector<A>;
  static LSTM_FUSED_INLINE V broadcast(const A* a) { return splat_of<V>(*a); }
  static LSTM_FUSED_INLINE V load_b(const A* b) { return load<V>(b); }
  // A vector of the panel from the first n elements of row k; a null row is zeros.
  template <class S>
  static LSTM_FUSED_INLINE void store_b(A* to, const S* const (&row)[kPair], int64_t n) {
    store(to, row[0] ? load_first<V>(row[0], n) : V{});
  }
  static LSTM_FUSED_INLINE V multiply_add(V acc, V a, V b) { return acc + a * b; }
};

#if defined(LSTM_FUSED_BF16_PAIRS)
// bfloat16 products, two to a lane, summed in float32.
struct MultiplyPairs {
  using Compute = float;
  using Element = BFloat16;
  static constexpr int kPair = 2;
  using V = VFloat;
  static LSTM_FUSED_INLINE VUint32 broadcast(const BFloat16* a) {
    uint32_t pair;
    std::memcpy(&pair, a, sizeof(pair));
    return splat_bits(pair);
  }
  static LSTM_FUSED_INLINE VUint32 load_b(const BFloat16* b) {
    VUint32 v;
    std::memcpy(&v, b, sizeof(v));
    return v;
  }
  template <class S>
  static LSTM_FUSED_INLINE void store_b(BFloat16* to, const S* const (&row)[kPair], int64_t n) {
    const auto bits = [n](const S* p) {
      return LSTM_FUSED_CONVERT(p ? load_bits(p, n) : VUint16{}, VUint32);
    };
    const VUint32 v = bits(row[0]) | bits(row[1]) << 16;
    std::memcpy(to, &v, sizeof(v));
  }
  static LSTM_FUSED_INLINE VFloat multiply_add(VFloat acc, VUint32 a, VUint32 b) {
    return add_pairs(acc, a, b);
  }

 private:
  static LSTM_FUSED_INLINE VUint32 splat_bits(uint32_t s) { return VUint32{} + s; }
};
#endif

// A panel of B, `depth` tile steps of `cols` vectors, is cut into strips of kStripCols vectors,
// each of them contiguous.
template <class M>
struct Strips {
  static constexpr int width = VectorOf<typename M::Compute>::lanes * M::kPair;  // of a vector
  // Vectors of the strip that holds vector c.
  static constexpr int cols_at(int cols, int c) {
    const int rest = cols - c / kStripCols * kStripCols;
    return rest < kStripCols ? rest : kStripCols;
  }
  // The elements from one step of vector c to the next, and those before its first.
  static constexpr int64_t pitch(int cols, int c) { return cols_at(cols, c) * width; }
  static constexpr int64_t offset(int64_t depth, int c) {
    return (c / kStripCols * kStripCols * depth + c % kStripCols) * width;
  }
};

// The strips of C vectors, each from the step where a product begins.
template <class M, int C>
struct Columns {
  using E = typename M::Element;
  static constexpr int kStrips = (C + kStripCols - 1) / kStripCols;
  const E* strip[kStrips];

  LSTM_FUSED_INLINE Columns(const E* b, int64_t depth) {
    LSTM_FUSED_UNROLLED_FOR (int s = 0; s < kStrips; ++s)
      strip[s] = b + Strips<M>::offset(depth, s * kStripCols);
  }
  LSTM_FUSED_INLINE auto load(int64_t k, int c) const {
    return M::load_b(strip[c / kStripCols] + k * Strips<M>::pitch(C, c) +
                     c % kStripCols * Strips<M>::width);
  }
  LSTM_FUSED_INLINE void advance(int64_t steps) {
    LSTM_FUSED_UNROLLED_FOR (int s = 0; s < kStrips; ++s)
      strip[s] += steps * Strips<M>::pitch(C, s * kStripCols);
  }
};

// acc[r][c] += sum over k of rows[r][k * stride] * b[k][c]. k counts steps of kPair elements.
template <class M, int R, int C>
LSTM_FUSED_INLINE void accumulate_once(typename M::V (&acc)[R][C],
                                       const typename M::Element* const* rows, int64_t stride,
                                       const Columns<M, C>& b, int64_t k) {
  if constexpr (R <= 3) {
    decltype(M::broadcast(nullptr)) a[R];
    LSTM_FUSED_UNROLLED_FOR (int r = 0; r < R; ++r) a[r] = M::broadcast(rows[r] + k * stride);
    LSTM_FUSED_UNROLLED_FOR (int c = 0; c < C; ++c) {
      const auto v = in_register(b.load(k, c));
      LSTM_FUSED_UNROLLED_FOR (int r = 0; r < R; ++r)
        acc[r][c] = M::multiply_add(acc[r][c], a[r], v);
    }
  } else {
    decltype(M::load_b(nullptr)) v[C];
    LSTM_FUSED_UNROLLED_FOR (int c = 0; c < C; ++c) v[c] = b.load(k, c);
    LSTM_FUSED_UNROLLED_FOR (int r = 0; r < R; ++r) {
      const auto a = M::broadcast(rows[r] + k * stride);
      LSTM_FUSED_UNROLLED_FOR (int c = 0; c < C; ++c)
        acc[r][c] = M::multiply_add(acc[r][c], a, v[c]);
    }
  }
}

template <class M, int R, int C>
LSTM_FUSED_INLINE void accumulate_piece(typename M::V (&acc)[R][C],
                                        const typename M::Element* const* rows_in, int64_t stride,
                                        const Columns<M, C>& b, int64_t steps) {
  const typename M::Element* rows[R];
  LSTM_FUSED_UNROLLED_FOR (int r = 0; r < R; ++r) rows[r] = rows_in[r];
  // Too few accumulators cannot hide the latency of a multiply-add: keep two or four sets.
  constexpr int sets = R * C >= 8 ? 1 : R * C >= 4 ? 2 : 4;
  int64_t k = 0;
  if constexpr (sets > 1) {
    typename M::V extra[sets - 1][R][C] = {};
    for (; k + sets <= steps; k += sets) {
      accumulate_once<M, R, C>(acc, rows, stride, b, k);
      LSTM_FUSED_UNROLLED_FOR (int s = 1; s < sets; ++s)
        accumulate_once<M, R, C>(extra[s - 1], rows, stride, b, k + s);
    }
    LSTM_FUSED_UNROLLED_FOR (int s = 1; s < sets; ++s)
      LSTM_FUSED_UNROLLED_FOR (int r = 0; r < R; ++r)
        LSTM_FUSED_UNROLLED_FOR (int c = 0; c < C; ++c) acc[r][c] += extra[s - 1][r][c];
  }
  for (; k < steps; ++k) accumulate_once<M, R, C>(acc, rows, stride, b, k);
}

// Steps summed before the sum joins the total: one chain of a thousand products has several times
// the error of four of 256.
constexpr int64_t kPieceSteps = 256;

template <class M, int R, int C>
LSTM_FUSED_INLINE void accumulate(typename M::V (&acc)[R][C],
                                  const typename M::Element* const* rows_in, int64_t stride,
                                  Columns<M, C> b, int64_t steps) {
  const typename M::Element* rows[R];
  LSTM_FUSED_UNROLLED_FOR (int r = 0; r < R; ++r) rows[r] = rows_in[r];
  typename M::V total[R][C];
  for (int64_t first = 0;;) {
    const int64_t count = steps - first < kPieceSteps ? steps - first : kPieceSteps;
    accumulate_piece<M, R, C>(acc, rows, stride, b, count);
    const bool only = count == steps;
    if (only) return;
    LSTM_FUSED_UNROLLED_FOR (int r = 0; r < R; ++r) {
      rows[r] += count * stride;
      LSTM_FUSED_UNROLLED_FOR (int c = 0; c < C; ++c) {
        total[r][c] = first == 0 ? acc[r][c] : total[r][c] + acc[r][c];
        acc[r][c] = typename M::V{};
      }
    }
    first += count;
    b.advance(count);
    if (first == steps) break;
  }
  LSTM_FUSED_UNROLLED_FOR (int r = 0; r < R; ++r)
    LSTM_FUSED_UNROLLED_FOR (int c = 0; c < C; ++c) acc[r][c] = total[r][c];
}

// Cache lines that the code after a product reads or writes and that no cache holds. The product
// prefetches a few of them with each segment: a core drops most of a long burst of prefetches.
struct Prefetch {
  const void* const* lines;
  int64_t count;
};

// A product of any R <= kMaxRows, C <= kMaxCols. A comes in segments: step k of segment s of row r
// is rows[r] + s * segment_stride + k * stride. All of them together are the steps of B from
// `first` on, of a panel of `depth` steps.
template <class M>
struct TileProduct {
  const typename M::Element* rows[kMaxRows];  // set after construction, as many as there are
  const typename M::Element* b;
  int64_t stride;
  int64_t steps;  // of each segment
  int64_t segments;
  int64_t segment_stride;
  int64_t depth;
  int64_t first;
  Prefetch prefetch = {};
  const TileProduct* next = nullptr;  // a product to add, of as many rows and columns

  // Not an aggregate: that would clear the rows, by an instruction with a long start.
  TileProduct(const typename M::Element* b, int64_t depth, int64_t stride, int64_t steps,
              int64_t segments = 1, int64_t segment_stride = 0, int64_t first = 0)
      : b(b),
        stride(stride),
        steps(steps),
        segments(segments),
        segment_stride(segment_stride),
        depth(depth),
        first(first) {}
};

// out[r][c] = the sum of p and its next ones, for the C vectors from `from` on, + (add ? out : 0),
// out having kMaxCols vectors a row.
template <class M, int R, int C>
void tile_product(const TileProduct<M>& p, int from, typename M::Compute* out, bool add) {
  using A = typename M::Compute;
  using V = Vector<A>;
  constexpr int lanes = VectorOf<A>::lanes;
  V acc[R][C] = {};
  out += from * lanes;
  // Prefetch what is added to.
  if (add) {
    LSTM_FUSED_UNROLLED_FOR (int r = 0; r < R; ++r)
      LSTM_FUSED_UNROLLED_FOR (int c = 0; c < C; ++c)
        prefetch_to_write(out + (r * kMaxCols + c) * lanes);
  }
  int64_t summed = 0;
  for (const TileProduct<M>* part = &p; part; part = part->next) {
    const int64_t steps = part->steps, segments = part->segments;
    Columns<M, C> columns(part->b + Strips<M>::offset(part->depth, from), part->depth);
    columns.advance(part->first);
    const typename M::Element* rows[R];
    LSTM_FUSED_UNROLLED_FOR (int r = 0; r < R; ++r) rows[r] = part->rows[r];
    const int64_t lines = from == 0 ? part->prefetch.count : 0;
    int64_t prefetched = 0;
    for (int64_t s = 0; s < segments; ++s) {
      for (const int64_t end = lines * (s + 1) / segments; prefetched < end; ++prefetched)
        prefetch(part->prefetch.lines[prefetched]);
      if (part->stride == M::kPair) {
        // Prefetch the next segment: it is far from this one, and another core may have just
        // written it.
        if (from == 0 && s + 1 < segments) {
          LSTM_FUSED_UNROLLED_FOR (int r = 0; r < R; ++r)
            for (int64_t k = 0; k < steps * M::kPair; k += kLine / sizeof(*part->b))
              prefetch(rows[r] + part->segment_stride + k);
        }
        accumulate<M, R, C>(acc, rows, M::kPair, columns, steps);
      } else {
        accumulate<M, R, C>(acc, rows, part->stride, columns, steps);
      }
      columns.advance(steps);
      summed += steps;
      LSTM_FUSED_UNROLLED_FOR (int r = 0; r < R; ++r) rows[r] += part->segment_stride;
      if (summed < kPieceSteps && (s + 1 < segments || part->next)) continue;
      LSTM_FUSED_UNROLLED_FOR (int r = 0; r < R; ++r)
        LSTM_FUSED_UNROLLED_FOR (int c = 0; c < C; ++c) {
          A* at = out + (r * kMaxCols + c) * lanes;
          store(at, add ? load<V>(at) + acc[r][c] : acc[r][c]);
          acc[r][c] = V{};
        }
      add = true;
      summed = 0;
    }
  }
}

// out[r][c] = p and its next ones added to out in the order of accumulate, as if out were registers
// all the time. Products of one segment, whose rows are contiguous.
template <class M, int R, int C>
void extend_tile(const TileProduct<M>& p, int from, typename M::Compute* out) {
  using V = typename M::V;
  constexpr int lanes = VectorOf<typename M::Compute>::lanes;
  out += from * lanes;
  V acc[R][C];
  LSTM_FUSED_UNROLLED_FOR (int r = 0; r < R; ++r)
    LSTM_FUSED_UNROLLED_FOR (int c = 0; c < C; ++c)
      acc[r][c] = load<V>(out + (r * kMaxCols + c) * lanes);
  for (const TileProduct<M>* part = &p; part; part = part->next)
    accumulate<M, R, C>(acc, part->rows, M::kPair,
                        Columns<M, C>(part->b + Strips<M>::offset(part->depth, from), part->depth),
                        part->steps);
  LSTM_FUSED_UNROLLED_FOR (int r = 0; r < R; ++r)
    LSTM_FUSED_UNROLLED_FOR (int c = 0; c < C; ++c)
      store(out + (r * kMaxCols + c) * lanes, acc[r][c]);
}

// A run-time number as a template argument: f(Constant<n>{}) for n from 1 to kMax, and kMax above.
template <int N>
struct Constant {
  static constexpr int value = N;
};
template <int kMax, class F>
LSTM_FUSED_INLINE void with_constant(int n, const F& f) {
  if constexpr (kMax > 1) {
    if (n < kMax) return with_constant<kMax - 1>(n, f);
  }
  f(Constant<kMax>{});
}

// The products above for R and C known at run time: in one tile, or strip by strip where the rows
// are many.
template <class M>
void multiply_tile(int rows, int cols, const TileProduct<M>& p, typename M::Compute* out,
                   bool add) {
  with_constant<kMaxRows>(rows, [&](auto r) {
    constexpr int R = decltype(r)::value;
    constexpr int kCols = R > kWideRows ? kStripCols : kMaxCols;
    for (int from = 0; from < cols; from += kCols)
      with_constant<kCols>(
          cols - from, [&](auto c) { tile_product<M, R, decltype(c)::value>(p, from, out, add); });
  });
}

// Only for more rows than a tile of kMaxCols vectors has.
template <class M>
void extend_strips(int rows, int cols, const TileProduct<M>& p, typename M::Compute* out) {
  with_constant<kMaxRows - kWideRows>(rows - kWideRows, [&](auto r) {
    for (int from = 0; from < cols; from += kStripCols)
      with_constant<kStripCols>(cols - from, [&](auto c) {
        extend_tile<M, kWideRows + decltype(r)::value, decltype(c)::value>(p, from, out);
      });
  });
}

// Rows [begin, end) in tiles of kMaxRows. Two tiles share a remainder of one or two rows, which
// would take almost the time of four. Calls f(first row, rows of the tile).
template <class F>
LSTM_FUSED_INLINE void for_each_tile(int64_t begin, int64_t end, const F& f) {
  for (int64_t first = begin; first < end;) {
    const int64_t left = end - first;
    const bool shared = left > kMaxRows && left <= kMaxRows + 2;
    const int n = static_cast<int>(shared ? (left + 1) / 2 : left < kMaxRows ? left : kMaxRows);
    f(first, n);
    first += n;
  }
}

}  // namespace
}  // namespace lstm_fused
