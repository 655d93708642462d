// Vectors of kVectorBytes by the compiler's vector extension, and loads, stores and conversions for
// the four dtypes. Included once per ISA file, inside which everything has internal linkage: two
// ISA files must never share an inline function, or the linker could keep the one the machine
// cannot run.
#pragma once

#include <cstdint>
#include <cstring>

#include "../params.h"

namespace lstm_fused {
namespace {

constexpr int kVectorBytes = LSTM_FUSED_VECTOR_BYTES;

typedef float VFloat LSTM_FUSED_VECTOR(kVectorBytes);
typedef double VDouble LSTM_FUSED_VECTOR(kVectorBytes);
typedef int32_t VInt32 LSTM_FUSED_VECTOR(kVectorBytes);
typedef uint32_t VUint32 LSTM_FUSED_VECTOR(kVectorBytes);
typedef int64_t VInt64 LSTM_FUSED_VECTOR(kVectorBytes);
typedef uint64_t VUint64 LSTM_FUSED_VECTOR(kVectorBytes);
typedef uint16_t VUint16 LSTM_FUSED_VECTOR(kVectorBytes / 2);
typedef int16_t VInt16 LSTM_FUSED_VECTOR(kVectorBytes);
typedef int8_t VBytes LSTM_FUSED_VECTOR(kVectorBytes);

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
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace
}  // namespace lstm_fused

// clamp, and the conversions that have instructions of their own.
#if defined(LSTM_FUSED_F16C)
#include "simd_x86_64.h"
#elif defined(LSTM_FUSED_NEON) || defined(LSTM_FUSED_SVE)
#include "simd_arm64.h"
#else
#include "simd_plain.h"
#endif

namespace lstm_fused {
namespace {

// ---- products of bytes ----
//   add_quads(sum, w, digits)   + the products of the four bytes of each lane, without a sign in w,
//                               from -16 to 15 in digits; four of them fit VDigits
//   sum_of_digits(high, low)    32 * high + low, of each lane
//   store_bytes(p, v)           the low byte of each lane
//   largest_lane(v), sum_of_lanes(v)
#if !defined(LSTM_FUSED_F16C)
using VDigits = VInt32;
LSTM_FUSED_INLINE VInt32 add_quads(VInt32 sum, VBytes w, VBytes digits) {
  const VUint32 a = bit_cast<VUint32>(w);
  const VInt32 b = bit_cast<VInt32>(digits);
  LSTM_FUSED_UNROLLED_FOR (int k = 0; k < 4; ++k)
    sum += bit_cast<VInt32>((a >> (8 * k)) & 255) * ((b << (24 - 8 * k)) >> 24);
  return sum;
}
LSTM_FUSED_INLINE VInt32 sum_of_digits(VInt32 high, VInt32 low) {
  return (high << 5) + low;
}
LSTM_FUSED_INLINE void store_bytes(int8_t* p, VInt32 v) {
  for (int l = 0; l < VectorOf<float>::lanes; ++l) p[l] = static_cast<int8_t>(v[l]);
}
LSTM_FUSED_INLINE int32_t largest_lane(VInt32 v) {
  int32_t largest = v[0];
  for (int l = 1; l < VectorOf<float>::lanes; ++l) largest = v[l] > largest ? v[l] : largest;
  return largest;
}
LSTM_FUSED_INLINE int32_t sum_of_lanes(VInt32 v) {
  int32_t sum = 0;
  for (int l = 0; l < VectorOf<float>::lanes; ++l) sum += v[l];
  return sum;
}
#endif

// v rounded to an integer, half to even; |v| < 2^22.
LSTM_FUSED_INLINE VInt32 round_to_int(VFloat v) {
  LSTM_FUSED_IN_REGISTER(v);  // not part of a multiply-add, which would round otherwise
  // An integer is in the lowest bits of its sum with 1.5 * 2^23.
  return bit_cast<VInt32>(v + 0x1.8p23f) - 0x4b400000;
}

// ---- loads and stores in the compute type A, from and to the storage type S ----

LSTM_FUSED_INLINE VFloat widen(VUint16 raw, BFloat16) {
  return bit_cast<VFloat>(in_lanes(raw) << 16);
}

#if !defined(LSTM_FUSED_BF16_PAIRS)
LSTM_FUSED_INLINE VUint16 narrow(VFloat v, BFloat16) {
  const VUint32 u = bit_cast<VUint32>(v);
  const VUint32 rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const VUint32 quiet = (u >> 16) | 0x40;
  return LSTM_FUSED_CONVERT((u & 0x7fffffff) > 0x7f800000 ? quiet : rounded, VUint16);
}
#endif

template <class V, class A>
LSTM_FUSED_INLINE V load(const A* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
#if !defined(LSTM_FUSED_SVE)
template <class V>
LSTM_FUSED_INLINE V load(const BFloat16* p) {
  VUint16 raw;
  std::memcpy(&raw, p, sizeof(raw));
  return widen(raw, BFloat16{});
}
template <class V>
LSTM_FUSED_INLINE V load(const Half* p) {
  VUint16 raw;
  std::memcpy(&raw, p, sizeof(raw));
  return widen(raw, Half{});
}
#endif

LSTM_FUSED_INLINE void store(float* p, VFloat v) {
  std::memcpy(p, &v, sizeof(v));
}
LSTM_FUSED_INLINE void store(double* p, VDouble v) {
  std::memcpy(p, &v, sizeof(v));
}
template <class S>
LSTM_FUSED_INLINE void store(S* p, VFloat v) {
  const VUint16 raw = narrow(v, S{});
  std::memcpy(p, &raw, sizeof(raw));
}

// v in a register. g++ 12 loads a vector with AVX-512 anew for each multiply-add that it enters,
// and two loads a cycle then bound the products of two and three rows.
template <class V>
LSTM_FUSED_INLINE V in_register(V v) {
#if defined(LSTM_FUSED_F16C) || defined(LSTM_FUSED_NEON) || defined(LSTM_FUSED_SVE)
  LSTM_FUSED_IN_REGISTER(v);
#endif
  return v;
}

// The first n lanes only, 0 < n <= lanes; lanes past n read as zero.
template <class V, class S>
LSTM_FUSED_INLINE V load_first(const S* p, int64_t n) {
  constexpr int lanes = sizeof(V) / sizeof(V{}[0]);
  if (n >= lanes) [[likely]]
    return load<V>(p);
  S part[lanes] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = p[i];
  return load<V>(part);
}
template <class V, class S>
LSTM_FUSED_INLINE void store_first(S* p, V v, int64_t n) {
  constexpr int lanes = sizeof(V) / sizeof(V{}[0]);
  if (n >= lanes) [[likely]]
    return store(p, v);
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
  std::memcpy(&raw, p, n >= kVectorBytes / 4 ? sizeof(raw) : n * sizeof(*p));
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
  if (n > 0) std::memcpy(dst, src, n * sizeof(BFloat16));
  std::memset(dst + n, 0, (pitch - n) * sizeof(BFloat16));
}

}  // namespace
}  // namespace lstm_fused
