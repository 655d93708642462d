// The register tile every matrix product here goes through: R rows of A, broadcast element by
// element, times C vectors of a packed panel of B, accumulated in R x C registers.
#pragma once

#include "simd.h"

namespace lstm_fused {
namespace {

// Registers decide the tile: 6 x 4 accumulators of 32 registers, 3 x 4 of 16.
constexpr int kMaxRows = LSTM_FUSED_TILE_ROWS;
constexpr int kMaxCols = 4;
constexpr int64_t kLine = 64;  // bytes of a cache line

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
// bfloat16 products, two to a lane, summed in float32: vdpbf16ps.
struct MultiplyPairs {
  using Compute = float;
  using Element = BFloat16;
  static constexpr int kPair = 2;
  using V = VFloat;
  static LSTM_FUSED_INLINE VUint32 broadcast(const BFloat16* a) {
    uint32_t pair;
    __builtin_memcpy(&pair, a, sizeof(pair));
    return splat_bits(pair);
  }
  static LSTM_FUSED_INLINE VUint32 load_b(const BFloat16* b) {
    VUint32 v;
    __builtin_memcpy(&v, b, sizeof(v));
    return v;
  }
  template <class S>
  static LSTM_FUSED_INLINE void store_b(BFloat16* to, const S* const (&row)[kPair], int64_t n) {
    const auto bits = [n](const S* p) {
      return __builtin_convertvector(p ? load_bits(p, n) : VUint16{}, VUint32);
    };
    const VUint32 v = bits(row[0]) | bits(row[1]) << 16;
    __builtin_memcpy(to, &v, sizeof(v));
  }
  static LSTM_FUSED_INLINE VFloat multiply_add(VFloat acc, VUint32 a, VUint32 b) {
    return bit_cast<VFloat>(
        _mm512_dpbf16_ps(bit_cast<__m512>(acc), bit_cast<__m512bh>(a), bit_cast<__m512bh>(b)));
  }

 private:
  static LSTM_FUSED_INLINE VUint32 splat_bits(uint32_t s) { return VUint32{} + s; }
};
#endif

// acc[r][c] += sum over k of rows[r][k * stride] * b[k][c]. k counts steps of kPair elements.
template <class M, int R, int C>
LSTM_FUSED_INLINE void accumulate_once(typename M::V (&acc)[R][C],
                                       const typename M::Element* const* rows, int64_t stride,
                                       const typename M::Element* b, int64_t k) {
  constexpr int lanes = VectorOf<typename M::Compute>::lanes;
  constexpr int step = lanes * M::kPair;
  if constexpr (R <= 3) {
    decltype(M::broadcast(nullptr)) a[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) a[r] = M::broadcast(rows[r] + k * stride);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const auto v = M::load_b(b + c * step);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r][c] = M::multiply_add(acc[r][c], a[r], v);
    }
  } else {
    decltype(M::load_b(nullptr)) v[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) v[c] = M::load_b(b + c * step);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const auto a = M::broadcast(rows[r] + k * stride);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) acc[r][c] = M::multiply_add(acc[r][c], a, v[c]);
    }
  }
}

template <class M, int R, int C>
LSTM_FUSED_INLINE void accumulate_piece(typename M::V (&acc)[R][C],
                                        const typename M::Element* const* rows_in, int64_t stride,
                                        const typename M::Element* b, int64_t steps) {
  using E = typename M::Element;
  constexpr int width = C * VectorOf<typename M::Compute>::lanes * M::kPair;
  const E* rows[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) rows[r] = rows_in[r];
  // Too few accumulators cannot hide the latency of a multiply-add: keep two or four sets.
  constexpr int sets = R * C >= 8 ? 1 : R * C >= 4 ? 2 : 4;
  int64_t k = 0;
  if constexpr (sets > 1) {
    typename M::V extra[sets - 1][R][C] = {};
    for (; k + sets <= steps; k += sets) {
      accumulate_once<M, R, C>(acc, rows, stride, b + k * width, k);
#pragma GCC unroll 4
      for (int s = 1; s < sets; ++s)
        accumulate_once<M, R, C>(extra[s - 1], rows, stride, b + (k + s) * width, k + s);
    }
#pragma GCC unroll 4
    for (int s = 1; s < sets; ++s)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) acc[r][c] += extra[s - 1][r][c];
  }
  for (; k < steps; ++k) accumulate_once<M, R, C>(acc, rows, stride, b + k * width, k);
}

// Steps summed before the sum joins the total: one chain of a thousand products has several times
// the error of four of 256.
constexpr int64_t kPieceSteps = 256;

template <class M, int R, int C>
LSTM_FUSED_INLINE void accumulate(typename M::V (&acc)[R][C],
                                  const typename M::Element* const* rows_in, int64_t stride,
                                  const typename M::Element* b, int64_t steps) {
  constexpr int width = C * VectorOf<typename M::Compute>::lanes * M::kPair;
  const typename M::Element* rows[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) rows[r] = rows_in[r];
  typename M::V total[R][C];
  for (int64_t first = 0;;) {
    const int64_t count = steps - first < kPieceSteps ? steps - first : kPieceSteps;
    accumulate_piece<M, R, C>(acc, rows, stride, b + first * width, count);
    const bool only = count == steps;
    if (only) return;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      rows[r] += count * stride;
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        total[r][c] = first == 0 ? acc[r][c] : total[r][c] + acc[r][c];
        acc[r][c] = typename M::V{};
      }
    }
    first += count;
    if (first == steps) break;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) acc[r][c] = total[r][c];
}

// Cache lines that the code after a product reads or writes and that no cache holds. The product
// prefetches a few of them with each segment: a core drops most of a long burst of prefetches.
struct Prefetch {
  const void* const* lines;
  int64_t count;
};

// A product of any R <= kMaxRows, C <= kMaxCols. A comes in segments: step k of segment s of row r
// is rows[r] + s * segment_stride + k * stride; B is contiguous over all of them.
template <class M>
struct TileProduct {
  const typename M::Element* rows[kMaxRows];
  int64_t stride;
  int64_t steps;  // of each segment
  int64_t segments;
  int64_t segment_stride;
  Prefetch prefetch = {};
};

// out[r][c] = product + (add ? out : 0), out having kMaxCols vectors a row.
template <class M, int R, int C>
void tile_product(const TileProduct<M>& p, const typename M::Element* b, typename M::Compute* out,
                  bool add) {
  using A = typename M::Compute;
  using V = Vector<A>;
  constexpr int lanes = VectorOf<A>::lanes;
  V acc[R][C] = {};
  const typename M::Element* rows[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) rows[r] = p.rows[r];
  // Prefetch what is added to.
  if (add) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) __builtin_prefetch(out + (r * kMaxCols + c) * lanes, 1);
  }
  int64_t summed = 0, prefetched = 0;
  for (int64_t s = 0; s < p.segments; ++s) {
    for (const int64_t end = p.prefetch.count * (s + 1) / p.segments; prefetched < end;
         ++prefetched)
      __builtin_prefetch(p.prefetch.lines[prefetched]);
    if (p.stride == M::kPair) {
      // Prefetch the next segment: it is far from this one, and another core may have just written
      // it.
      if (s + 1 < p.segments) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
          for (int64_t k = 0; k < p.steps * M::kPair; k += kLine / sizeof(*b))
            __builtin_prefetch(rows[r] + p.segment_stride + k);
      }
      accumulate<M, R, C>(acc, rows, M::kPair, b, p.steps);
    } else {
      accumulate<M, R, C>(acc, rows, p.stride, b, p.steps);
    }
    b += p.steps * C * lanes * M::kPair;
    summed += p.steps;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) rows[r] += p.segment_stride;
    if (summed < kPieceSteps && s + 1 < p.segments) continue;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        A* at = out + (r * kMaxCols + c) * lanes;
        store(at, add ? load<V>(at) + acc[r][c] : acc[r][c]);
        acc[r][c] = V{};
      }
    add = true;
    summed = 0;
  }
}

// A run-time number as a template argument: f(Constant<n>{}) for n from 1 to kMax.
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

template <class M>
void multiply_tile(int rows, int cols, const TileProduct<M>& p, const typename M::Element* b,
                   typename M::Compute* out, bool add) {
  with_constant<kMaxRows>(rows, [&](auto r) {
    with_constant<kMaxCols>(cols, [&](auto c) {
      tile_product<M, decltype(r)::value, decltype(c)::value>(p, b, out, add);
    });
  });
}

// Rows [begin, end) in tiles of nearly equal height: calls f(first row, rows of the tile).
template <class F>
LSTM_FUSED_INLINE void for_each_tile(int64_t begin, int64_t end, const F& f) {
  const int64_t n = end - begin;
  const int64_t tiles = (n + kMaxRows - 1) / kMaxRows;
  int64_t first = begin;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t next = begin + n * (i + 1) / tiles;
    f(first, static_cast<int>(next - first));
    first = next;
  }
}

}  // namespace
}  // namespace lstm_fused
