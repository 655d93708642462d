// The instructions of AVX2 and AVX-512 that the compiler finds by itself for no vector. Part of
// simd.h.
#pragma once

#include <immintrin.h>

#include "simd.h"

namespace lstm_fused {
namespace {

// v clamped to [low, high]; NaN stays NaN: the instructions return their last operand where one is
// NaN.
#if LSTM_FUSED_VECTOR_BYTES == 64
#if defined(LSTM_FUSED_VNNI)
using VDigits = VInt32;
LSTM_FUSED_INLINE VInt32 add_quads(VInt32 sum, VBytes w, VBytes digits) {
  return bit_cast<VInt32>(
      _mm512_dpbusd_epi32(bit_cast<__m512i>(sum), bit_cast<__m512i>(w), bit_cast<__m512i>(digits)));
}
LSTM_FUSED_INLINE VInt32 sum_of_digits(VInt32 high, VInt32 low) {
  return (high << 5) + low;
}
#else
using VDigits = VInt16;
LSTM_FUSED_INLINE VInt16 add_quads(VInt16 sum, VBytes w, VBytes digits) {
  sum += bit_cast<VInt16>(_mm512_maddubs_epi16(bit_cast<__m512i>(w), bit_cast<__m512i>(digits)));
  LSTM_FUSED_IN_REGISTER(sum);  // g++ 12 would first compute, and spill, the products of all steps
  return sum;
}
LSTM_FUSED_INLINE VInt32 sum_of_digits(VInt16 high, VInt16 low) {
  const auto pairs = [](VInt16 v, int16_t factor) {
    return bit_cast<VInt32>(_mm512_madd_epi16(bit_cast<__m512i>(v), _mm512_set1_epi16(factor)));
  };
  return pairs(high, 32) + pairs(low, 1);
}
#endif
LSTM_FUSED_INLINE void store_bytes(int8_t* p, VInt32 v) {
  const __m128i bytes = _mm512_cvtepi32_epi8(bit_cast<__m512i>(v));
  std::memcpy(p, &bytes, sizeof(bytes));
}
LSTM_FUSED_INLINE int32_t largest_lane(VInt32 v) {
  return _mm512_reduce_max_epi32(bit_cast<__m512i>(v));
}
LSTM_FUSED_INLINE int32_t sum_of_lanes(VInt32 v) {
  return _mm512_reduce_add_epi32(bit_cast<__m512i>(v));
}
// The 16 bits of each lane from a vector half as long: g++ 12 would convert half of it at a time.
LSTM_FUSED_INLINE VUint32 in_lanes(VUint16 raw) {
  return bit_cast<VUint32>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(raw)));
}
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
LSTM_FUSED_INLINE VFloat widen(VUint16 raw, Half) {
  return bit_cast<VFloat>(_mm512_cvtph_ps(bit_cast<__m256i>(raw)));
}
LSTM_FUSED_INLINE VUint16 narrow(VFloat v, Half) {
  return bit_cast<VUint16>(_mm512_cvtps_ph(bit_cast<__m512>(v), 0));
}
#else
using VDigits = VInt16;
LSTM_FUSED_INLINE VInt16 add_quads(VInt16 sum, VBytes w, VBytes digits) {
  sum += bit_cast<VInt16>(_mm256_maddubs_epi16(bit_cast<__m256i>(w), bit_cast<__m256i>(digits)));
  LSTM_FUSED_IN_REGISTER(sum);
  return sum;
}
LSTM_FUSED_INLINE VInt32 sum_of_digits(VInt16 high, VInt16 low) {
  const auto pairs = [](VInt16 v, int16_t factor) {
    return bit_cast<VInt32>(_mm256_madd_epi16(bit_cast<__m256i>(v), _mm256_set1_epi16(factor)));
  };
  return pairs(high, 32) + pairs(low, 1);
}
LSTM_FUSED_INLINE void store_bytes(int8_t* p, VInt32 v) {
  const __m256i lanes = bit_cast<__m256i>(v);
  const __m128i shorts =
      _mm_packs_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
  const int64_t bytes = _mm_cvtsi128_si64(_mm_packs_epi16(shorts, shorts));
  std::memcpy(p, &bytes, sizeof(bytes));
}
// f of all lanes, two by two.
template <class F>
LSTM_FUSED_INLINE int32_t reduced(VInt32 v, const F& f) {
  const __m256i x = bit_cast<__m256i>(v);
  __m128i half = f(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  half = f(half, _mm_shuffle_epi32(half, 0b01001110));
  return _mm_cvtsi128_si32(f(half, _mm_shuffle_epi32(half, 0b10110001)));
}
LSTM_FUSED_INLINE int32_t largest_lane(VInt32 v) {
  return reduced(v, [](__m128i a, __m128i b) { return _mm_max_epi32(a, b); });
}
LSTM_FUSED_INLINE int32_t sum_of_lanes(VInt32 v) {
  return reduced(v, [](__m128i a, __m128i b) { return _mm_add_epi32(a, b); });
}
LSTM_FUSED_INLINE VUint32 in_lanes(VUint16 raw) {
  return bit_cast<VUint32>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(raw)));
}
LSTM_FUSED_INLINE VFloat clamp(VFloat v, float low, float high) {
  const __m256 x = _mm256_max_ps(_mm256_set1_ps(low), bit_cast<__m256>(v));
  return bit_cast<VFloat>(_mm256_min_ps(_mm256_set1_ps(high), x));
}
LSTM_FUSED_INLINE VDouble clamp(VDouble v, double low, double high) {
  const __m256d x = _mm256_max_pd(_mm256_set1_pd(low), bit_cast<__m256d>(v));
  return bit_cast<VDouble>(_mm256_min_pd(_mm256_set1_pd(high), x));
}
LSTM_FUSED_INLINE VFloat widen(VUint16 raw, Half) {
  return bit_cast<VFloat>(_mm256_cvtph_ps(bit_cast<__m128i>(raw)));
}
LSTM_FUSED_INLINE VUint16 narrow(VFloat v, Half) {
  return bit_cast<VUint16>(_mm256_cvtps_ph(bit_cast<__m256>(v), 0));
}
#endif

#if defined(LSTM_FUSED_BF16_PAIRS)
// As the products, this takes a subnormal for zero.
LSTM_FUSED_INLINE VUint16 narrow(VFloat v, BFloat16) {
  return bit_cast<VUint16>(_mm512_cvtneps_pbh(bit_cast<__m512>(v)));
}
// acc + the two products of bfloat16 in each lane.
LSTM_FUSED_INLINE VFloat add_pairs(VFloat acc, VUint32 a, VUint32 b) {
  return bit_cast<VFloat>(
      _mm512_dpbf16_ps(bit_cast<__m512>(acc), bit_cast<__m512bh>(a), bit_cast<__m512bh>(b)));
}
#endif

}  // namespace
}  // namespace lstm_fused
