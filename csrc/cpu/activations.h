// sigmoid and tanh on vectors, both from one expm1 core on z <= 0:
//   z = n ln2 + r,  |r| <= ln2 / 2,  exp(z) = 2^n (1 + p),  p = expm1(r) by its Taylor series.
// At most 2.5 ulp in float32 (tests/test_activations.py); exact at 0 and +-inf; NaN stays NaN.
#pragma once

#include "simd.h"

namespace lstm_fused {
namespace {

template <class V>
struct ExpConstants;

template <>
struct ExpConstants<VFloat> {
  using Bits = VUint32;
  static constexpr int mantissa = 23;
  static constexpr uint32_t bias = 127;
  static constexpr int lift = 64;  // exponents are carried 2^lift higher than true
  static constexpr float unlift = 0x1p-64f;
  static constexpr float lowest = -126.0f;   // exp(lowest) is below half the least subnormal
  static constexpr float magic = 0x1.8p23f;  // adding it rounds to an integer in the low bits
  static constexpr float log2e = 0x1.715476p0f;
  static constexpr float ln2_hi = 0x1.62e4p-1f;
  static constexpr float ln2_lo = 0x1.7f7d1cp-20f;
  static constexpr float sign = -0.0f;

  static LSTM_FUSED_INLINE VFloat expm1(VFloat r) {
    VFloat q = r * (1.0f / 5040) + (1.0f / 720);
    q = q * r + (1.0f / 120);
    q = q * r + (1.0f / 24);
    q = q * r + (1.0f / 6);
    q = q * r + 0.5f;
    return r * r * q + r;
  }
};

template <>
struct ExpConstants<VDouble> {
  using Bits = VUint64;
  static constexpr int mantissa = 52;
  static constexpr uint64_t bias = 1023;
  static constexpr int lift = 512;
  static constexpr double unlift = 0x1p-512;
  static constexpr double lowest = -1000.0;
  static constexpr double magic = 0x1.8p52;
  static constexpr double log2e = 0x1.71547652b82fep0;
  static constexpr double ln2_hi = 0x1.62e42fefap-1;
  static constexpr double ln2_lo = 0x1.cf79abc9e3b3ap-40;
  static constexpr double sign = -0.0;

  static LSTM_FUSED_INLINE VDouble expm1(VDouble r) {
    VDouble q = r * (1.0 / 6227020800) + (1.0 / 479001600);
    q = q * r + (1.0 / 39916800);
    q = q * r + (1.0 / 3628800);
    q = q * r + (1.0 / 362880);
    q = q * r + (1.0 / 40320);
    q = q * r + (1.0 / 5040);
    q = q * r + (1.0 / 720);
    q = q * r + (1.0 / 120);
    q = q * r + (1.0 / 24);
    q = q * r + (1.0 / 6);
    q = q * r + 0.5;
    return r * r * q + r;
  }
};

// Splits exp(z) = scale * 2^-lift * (1 + p) for z <= 0.
template <class V>
LSTM_FUSED_INLINE void exp_parts(V z, V& scale, V& p) {
  using C = ExpConstants<V>;
  using Bits = typename C::Bits;
  z = z < C::lowest ? splat_of<V>(C::lowest) : z;  // keeps NaN
  const V shifted = z * C::log2e + C::magic;
  const V n = shifted - C::magic;
  const V r = (z - n * C::ln2_hi) - n * C::ln2_lo;
  scale = bit_cast<V>((bit_cast<Bits>(shifted) + (C::bias + C::lift)) << C::mantissa);
  p = C::expm1(r);
}

template <class V>
LSTM_FUSED_INLINE V negative_magnitude(V x) {
  using Bits = typename ExpConstants<V>::Bits;
  return bit_cast<V>(bit_cast<Bits>(x) | bit_cast<Bits>(splat_of<V>(1) * ExpConstants<V>::sign));
}

template <class V>
LSTM_FUSED_INLINE V sigmoid(V x) {
  V scale, p;
  exp_parts(negative_magnitude(x), scale, p);
  const V e = (scale + scale * p) * ExpConstants<V>::unlift;
  return (x < 0 ? e : splat_of<V>(1)) / (1 + e);
}

template <class V>
LSTM_FUSED_INLINE V tanh(V x) {
  using Bits = typename ExpConstants<V>::Bits;
  V scale, p;
  exp_parts(2 * negative_magnitude(x), scale, p);
  scale *= ExpConstants<V>::unlift;
  const V minus_em1 = (1 - scale) - scale * p;
  const V magnitude = minus_em1 / (2 - minus_em1);
  const Bits sign = bit_cast<Bits>(splat_of<V>(1) * ExpConstants<V>::sign);
  return bit_cast<V>(bit_cast<Bits>(magnitude) | (bit_cast<Bits>(x) & sign));
}

}  // namespace
}  // namespace lstm_fused
