// The instructions of NEON and SVE that the compiler finds by itself for no vector. Part of simd.h.
#pragma once

#if defined(LSTM_FUSED_SVE)
#include <arm_sve.h>
#else
#include <arm_neon.h>
#endif

#include "simd.h"

namespace lstm_fused {
namespace {

// v clamped to [low, high]; NaN stays NaN: the instructions return NaN where an operand is.
#if defined(LSTM_FUSED_SVE)
LSTM_FUSED_INLINE VFloat clamp(VFloat v, float low, float high) {
  const svbool_t all = svptrue_b32();
  return svmin_n_f32_x(all, svmax_n_f32_x(all, v, low), high);
}
LSTM_FUSED_INLINE VDouble clamp(VDouble v, double low, double high) {
  const svbool_t all = svptrue_b64();
  return svmin_n_f64_x(all, svmax_n_f64_x(all, v, low), high);
}

// The 16 bits of each lane from a vector half as long, through memory as a rule: `load` does not.
LSTM_FUSED_INLINE VUint32 in_lanes(VUint16 raw) {
  return LSTM_FUSED_CONVERT(raw, VUint32);
}
LSTM_FUSED_INLINE VUint32 in_lanes(const void* p) {
  return svld1uh_u32(svptrue_b32(), static_cast<const uint16_t*>(p));
}
LSTM_FUSED_INLINE VFloat half_to_float(VUint32 h) {
  return svcvt_f32_f16_x(svptrue_b32(), svreinterpret_f16_u32(h));
}
LSTM_FUSED_INLINE VUint32 float_to_half(VFloat v) {
  return svreinterpret_u32_f16(svcvt_f16_f32_x(svptrue_b32(), v));
}

LSTM_FUSED_INLINE VFloat widen(VUint16 raw, Half) {
  return half_to_float(in_lanes(raw));
}
LSTM_FUSED_INLINE VUint16 narrow(VFloat v, Half) {
  return LSTM_FUSED_CONVERT(float_to_half(v), VUint16);
}
LSTM_FUSED_INLINE VFloat round_to(VFloat v, Half) {
  return half_to_float(float_to_half(v));
}
template <class V>
LSTM_FUSED_INLINE V load(const BFloat16* p) {
  return bit_cast<VFloat>(in_lanes(p) << 16);
}
template <class V>
LSTM_FUSED_INLINE V load(const Half* p) {
  return half_to_float(in_lanes(p));
}

#if defined(LSTM_FUSED_BF16_PAIRS)
LSTM_FUSED_INLINE VUint16 narrow(VFloat v, BFloat16) {
  const VUint32 low = svreinterpret_u32_bf16(svcvt_bf16_f32_x(svptrue_b32(), v));
  return LSTM_FUSED_CONVERT(low, VUint16);
}
// acc + the two products of bfloat16 in each lane.
LSTM_FUSED_INLINE VFloat add_pairs(VFloat acc, VUint32 a, VUint32 b) {
  return svbfdot_f32(acc, svreinterpret_bf16_u32(a), svreinterpret_bf16_u32(b));
}
#endif

#else
LSTM_FUSED_INLINE VUint32 in_lanes(VUint16 raw) {
  return LSTM_FUSED_CONVERT(raw, VUint32);
}
LSTM_FUSED_INLINE VFloat clamp(VFloat v, float low, float high) {
  const float32x4_t x = vmaxq_f32(bit_cast<float32x4_t>(v), vdupq_n_f32(low));
  return bit_cast<VFloat>(vminq_f32(x, vdupq_n_f32(high)));
}
LSTM_FUSED_INLINE VDouble clamp(VDouble v, double low, double high) {
  const float64x2_t x = vmaxq_f64(bit_cast<float64x2_t>(v), vdupq_n_f64(low));
  return bit_cast<VDouble>(vminq_f64(x, vdupq_n_f64(high)));
}
LSTM_FUSED_INLINE VFloat widen(VUint16 raw, Half) {
  return bit_cast<VFloat>(vcvt_f32_f16(bit_cast<float16x4_t>(raw)));
}
LSTM_FUSED_INLINE VUint16 narrow(VFloat v, Half) {
  return bit_cast<VUint16>(vcvt_f16_f32(bit_cast<float32x4_t>(v)));
}

#if defined(LSTM_FUSED_BF16_PAIRS)
LSTM_FUSED_INLINE VUint16 narrow(VFloat v, BFloat16) {
  return bit_cast<VUint16>(vcvt_bf16_f32(bit_cast<float32x4_t>(v)));
}
// acc + the two products of bfloat16 in each lane.
LSTM_FUSED_INLINE VFloat add_pairs(VFloat acc, VUint32 a, VUint32 b) {
  return bit_cast<VFloat>(vbfdotq_f32(bit_cast<float32x4_t>(acc), bit_cast<bfloat16x8_t>(a),
                                      bit_cast<bfloat16x8_t>(b)));
}
#endif
#endif

}  // namespace
}  // namespace lstm_fused
