// The same as simd_x86_64.h by arithmetic on plain vectors, for every machine. Part of simd.h.
#pragma once

#include "simd.h"

namespace lstm_fused {
namespace {

// The 16 bits of each lane from a vector half as long.
LSTM_FUSED_INLINE VUint32 in_lanes(VUint16 raw) {
  return LSTM_FUSED_CONVERT(raw, VUint32);
}

// v clamped to [low, high]; NaN stays NaN.
template <class V>
LSTM_FUSED_INLINE V clamp(V v, decltype(V{}[0] + 0) low, decltype(V{}[0] + 0) high) {
  v = v < low ? splat_of<V>(low) : v;
  return v > high ? splat_of<V>(high) : v;
}

LSTM_FUSED_INLINE VFloat widen(VUint16 raw, Half) {
  const VUint32 h = LSTM_FUSED_CONVERT(raw, VUint32);
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
  return LSTM_FUSED_CONVERT(h | ((bits >> 16) & 0x8000), VUint16);
}

}  // namespace
}  // namespace lstm_fused
