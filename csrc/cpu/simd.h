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
typedef int16_t VInt16Half LSTM_FUSED_VECTOR(kVectorBytes / 2);
typedef int8_t VInt8 LSTM_FUSED_VECTOR(kVectorBytes / 2);

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

// ---- loads and stores in the compute type A, from and to the storage type S ----

LSTM_FUSED_INLINE VFloat widen(VUint16 raw, BFloat16) {
  return bit_cast<VFloat>(LSTM_FUSED_CONVERT(raw, VUint32) << 16);
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
