// Vectors of kVectorBytes by GCC's vector extension, and loads, stores and conversions for the four
// dtypes. Included once per ISA file, inside which everything has internal linkage: two ISA files
// must never share an inline function, or the linker could keep the one the machine cannot run.
#pragma once

#include <cstdint>

#include "../params.h"

// LSTM_FUSED_F16C and LSTM_FUSED_BF16_PAIRS name what the ISA file's target has beyond plain
// vectors. The compiler's own macros do not: g++ 12 sets them by command-line options, not by
// target pragmas.
#if defined(LSTM_FUSED_F16C)
#include <immintrin.h>
#endif

namespace lstm_fused {
namespace {

constexpr int kVectorBytes = LSTM_FUSED_VECTOR_BYTES;

typedef float VFloat __attribute__((vector_size(kVectorBytes)));
typedef double VDouble __attribute__((vector_size(kVectorBytes)));
typedef int32_t VInt32 __attribute__((vector_size(kVectorBytes)));
typedef uint32_t VUint32 __attribute__((vector_size(kVectorBytes)));
typedef int64_t VInt64 __attribute__((vector_size(kVectorBytes)));
typedef uint64_t VUint64 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t VUint16 __attribute__((vector_size(kVectorBytes / 2)));

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = VFloat;
  using bits = VUint32;
  static constexpr int lanes = kVectorBytes / 4;
};
template <>
struct VectorOf<double> {
  using type = VDouble;
  using bits = VUint64;
  static constexpr int lanes = kVectorBytes / 8;
};
template <class T>
using Vector = typename VectorOf<T>::type;

template <class V>
LSTM_FUSED_INLINE V splat_of(decltype(V{}[0] + 0) s) {
  return s - V{};  // `V{} + s` would cost an addition: -0 + 0 is not -0
}

template <class To, class From>
LSTM_FUSED_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

// v clamped to [low, high]; NaN stays NaN. The instructions return their last operand where one is
// NaN; g++ 12 finds them by itself for no vector of these.
#if defined(LSTM_FUSED_F16C) && LSTM_FUSED_VECTOR_BYTES == 64
LSTM_FUSED_INLINE VFloat clamp(VFloat v, float low, float high) {
  __m512 x = bit_cast<__m512>(v);  // masked, all lanes on: the plain ones make g++ 12 warn
  x = _mm512_mask_max_ps(x, 0xffff, _mm512_set1_ps(low), x);
  return bit_cast<VFloat>(_mm512_mask_min_ps(x, 0xffff, _mm512_set1_ps(high), x));
}
LSTM_FUSED_INLINE VDouble clamp(VDouble v, double low, double high) {
  __m512d x = bit_cast<__m512d>(v);
  x = _mm512_mask_max_pd(x, 0xff, _mm512_set1_pd(low), x);
  return bit_cast<VDouble>(_mm512_mask_min_pd(x, 0xff, _mm512_set1_pd(high), x));
}
#elif defined(LSTM_FUSED_F16C)
LSTM_FUSED_INLINE VFloat clamp(VFloat v, float low, float high) {
  const __m256 x = _mm256_max_ps(_mm256_set1_ps(low), bit_cast<__m256>(v));
  return bit_cast<VFloat>(_mm256_min_ps(_mm256_set1_ps(high), x));
}
LSTM_FUSED_INLINE VDouble clamp(VDouble v, double low, double high) {
  const __m256d x = _mm256_max_pd(_mm256_set1_pd(low), bit_cast<__m256d>(v));
  return bit_cast<VDouble>(_mm256_min_pd(_mm256_set1_pd(high), x));
}
#else
template <class V>
LSTM_FUSED_INLINE V clamp(V v, decltype(V{}[0] + 0) low, decltype(V{}[0] + 0) high) {
  v = v < low ? splat_of<V>(low) : v;
  return v > high ? splat_of<V>(high) : v;
}
#endif

// ---- loads and stores in the compute type A, from and to the storage type S ----

LSTM_FUSED_INLINE VFloat widen(VUint16 raw, BFloat16) {
  return bit_cast<VFloat>(__builtin_convertvector(raw, VUint32) << 16);
}

#if defined(LSTM_FUSED_BF16_PAIRS)
// As the products, this takes a subnormal for zero.
LSTM_FUSED_INLINE VUint16 narrow(VFloat v, BFloat16) {
  return bit_cast<VUint16>(_mm512_cvtneps_pbh(bit_cast<__m512>(v)));
}
#else
LSTM_FUSED_INLINE VUint16 narrow(VFloat v, BFloat16) {
  const VUint32 u = bit_cast<VUint32>(v);
  const VUint32 rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const VUint32 quiet = (u >> 16) | 0x40;
  return __builtin_convertvector((u & 0x7fffffff) > 0x7f800000 ? quiet : rounded, VUint16);
}
#endif

#if defined(LSTM_FUSED_F16C) && LSTM_FUSED_VECTOR_BYTES == 64
LSTM_FUSED_INLINE VFloat widen(VUint16 raw, Half) {
  return bit_cast<VFloat>(_mm512_cvtph_ps(bit_cast<__m256i>(raw)));
}
LSTM_FUSED_INLINE VUint16 narrow(VFloat v, Half) {
  return bit_cast<VUint16>(_mm512_cvtps_ph(bit_cast<__m512>(v), 0));
}
#elif defined(LSTM_FUSED_F16C)
LSTM_FUSED_INLINE VFloat widen(VUint16 raw, Half) {
  return bit_cast<VFloat>(_mm256_cvtph_ps(bit_cast<__m128i>(raw)));
}
LSTM_FUSED_INLINE VUint16 narrow(VFloat v, Half) {
  return bit_cast<VUint16>(_mm256_cvtps_ph(bit_cast<__m256>(v), 0));
}
#else
LSTM_FUSED_INLINE VFloat widen(VUint16 raw, Half) {
  const VUint32 h = __builtin_convertvector(raw, VUint32);
  const VUint32 magnitude = (h & 0x7fff) << 13;
  // Scaling by 2^112 moves the exponent bias from 15 to 127, subnormals included.
  const VUint32 scaled = bit_cast<VUint32>(bit_cast<VFloat>(magnitude) * 0x1p112f);
  const VUint32 finite_or_not = magnitude >= 0x0f800000 ? (magnitude | 0x7f800000) : scaled;
  return bit_cast<VFloat>(finite_or_not | ((h & 0x8000) << 16));
}
LSTM_FUSED_INLINE VUint16 narrow(VFloat v, Half) {
  const VUint32 bits = bit_cast<VUint32>(v);
  const VUint32 u = bits & 0x7fffffff;
  const VUint32 normal = (u - (112u << 23) + 0xfff + ((u >> 13) & 1)) >> 13;
  // Adding 0.5 aligns a subnormal's bits at the bottom of the significand, rounded to even.
  const VUint32 subnormal = bit_cast<VUint32>(bit_cast<VFloat>(u) + 0.5f) - 0x3f000000;
  VUint32 h = u < 0x38800000 ? subnormal : normal;
  h = u >= 0x477ff000 ? VUint32{} + 0x7c00 : h;
  h = u > 0x7f800000 ? VUint32{} + 0x7e00 : h;
  return __builtin_convertvector(h | ((bits >> 16) & 0x8000), VUint16);
}
#endif

template <class V, class A>
LSTM_FUSED_INLINE V load(const A* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
template <class V>
LSTM_FUSED_INLINE V load(const BFloat16* p) {
  VUint16 raw;
  __builtin_memcpy(&raw, p, sizeof(raw));
  return widen(raw, BFloat16{});
}
template <class V>
LSTM_FUSED_INLINE V load(const Half* p) {
  VUint16 raw;
  __builtin_memcpy(&raw, p, sizeof(raw));
  return widen(raw, Half{});
}

LSTM_FUSED_INLINE void store(float* p, VFloat v) {
  __builtin_memcpy(p, &v, sizeof(v));
}
LSTM_FUSED_INLINE void store(double* p, VDouble v) {
  __builtin_memcpy(p, &v, sizeof(v));
}
template <class S>
LSTM_FUSED_INLINE void store(S* p, VFloat v) {
  const VUint16 raw = narrow(v, S{});
  __builtin_memcpy(p, &raw, sizeof(raw));
}

// v in a register. g++ 12 loads a vector with AVX-512 anew for each multiply-add that it enters,
// and two loads a cycle then bound the products of two and three rows.
template <class V>
LSTM_FUSED_INLINE V in_register(V v) {
#if defined(LSTM_FUSED_F16C)
  asm("" : "+v"(v));
#endif
  return v;
}

// The first n lanes only, 0 < n <= lanes; lanes past n read as zero.
template <class V, class S>
LSTM_FUSED_INLINE V load_first(const S* p, int64_t n) {
  constexpr int lanes = sizeof(V) / sizeof(V{}[0]);
  if (__builtin_expect(n >= lanes, 1)) return load<V>(p);
  S part[lanes] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = p[i];
  return load<V>(part);
}
template <class V, class S>
LSTM_FUSED_INLINE void store_first(S* p, V v, int64_t n) {
  constexpr int lanes = sizeof(V) / sizeof(V{}[0]);
  if (__builtin_expect(n >= lanes, 1)) return store(p, v);
  S part[lanes];
  store(part, v);
  for (int64_t i = 0; i < n; ++i) p[i] = part[i];
}

// v with lanes from n on zero. A lane without a unit has zero weights, but zero times an infinite
// input is NaN, which later products over all lanes would spread.
template <class V>
LSTM_FUSED_INLINE V keep_first(V v, int64_t n) {
  constexpr int lanes = sizeof(V) / sizeof(V{}[0]);
  for (int64_t l = n; l < lanes; ++l) v[l] = 0;
  return v;
}

// The first n elements as bfloat16 bits, rounded if need be; the rest zero.
LSTM_FUSED_INLINE VUint16 load_bits(const BFloat16* p, int64_t n) {
  VUint16 raw = {};
  __builtin_memcpy(&raw, p, n >= kVectorBytes / 4 ? sizeof(raw) : n * sizeof(*p));
  return raw;
}
LSTM_FUSED_INLINE VUint16 load_bits(const float* p, int64_t n) {
  return narrow(load_first<VFloat>(p, n), BFloat16{});
}

// v rounded to the storage type, still in the compute type: what a later step may read back.
LSTM_FUSED_INLINE VFloat round_to(VFloat v, float) {
  return v;
}
LSTM_FUSED_INLINE VDouble round_to(VDouble v, double) {
  return v;
}
template <class S>
LSTM_FUSED_INLINE VFloat round_to(VFloat v, S) {
  return widen(narrow(v, S{}), S{});
}

template <class S>
LSTM_FUSED_INLINE auto to_scalar(S s) {
  return s;
}
LSTM_FUSED_INLINE float to_scalar(BFloat16 s) {
  return bit_cast<float>(static_cast<uint32_t>(s.bits) << 16);
}
LSTM_FUSED_INLINE float to_scalar(Half s) {
  return widen(VUint16{s.bits}, Half{})[0];
}

// dst[0, n) = src[0, n) in the compute type, dst[n, pitch) = 0.
template <class A, class S>
inline void stage_row(A* dst, const S* src, int64_t n, int64_t pitch) {
  using V = Vector<A>;
  constexpr int lanes = VectorOf<A>::lanes;
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) store(dst + i, load<V>(src + i));
  if (i < n) {
    const V last = load_first<V>(src + i, n - i);
    for (int l = 0; i < n; ++i, ++l) dst[i] = last[l];
  }
  for (; i < pitch; ++i) dst[i] = 0;
}
inline void stage_row(BFloat16* dst, const BFloat16* src, int64_t n, int64_t pitch) {
  if (n > 0) __builtin_memcpy(dst, src, n * sizeof(BFloat16));
  __builtin_memset(dst + n, 0, (pitch - n) * sizeof(BFloat16));
}

}  // namespace
}  // namespace lstm_fused
