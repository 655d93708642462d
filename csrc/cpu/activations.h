// sigmoid and tanh on vectors, both from one split of the exponential function:
//   z = n ln2 + r,  |r| <= ln2 / 2,  exp(z) = 2^n (1 + p),  p = expm1(r) by its Taylor series.
// At most 2.5 ulp in float32 (tests/kernels/test_activations.py); exact at 0 and +-inf; NaN stays
// NaN.
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
  static constexpr int bias = 127;
  static constexpr float magic = 0x1.8p23f;  // adding it rounds to an integer in the low bits
  static constexpr float log2e = 0x1.715476p0f;
  static constexpr float ln2_hi = 0x1.62e4p-1f;
  static constexpr float ln2_lo = 0x1.7f7d1cp-20f;
  // sigmoid is carried 2^lift smaller than true: then no exp(-x) overflows before 1 / exp(-x)
  // underflows. Past these bounds of -x and of 2x sigmoid and tanh no longer change.
  static constexpr int lift = 64;
  static constexpr float unit = 0x1p-64f;
  static constexpr float sigmoid_low = -40, sigmoid_high = 110;
  static constexpr float tanh_bound = 20;
  // Of (exp(r) - 1 - r) / r^2, in pairs: the coefficients of r^2k and r^(2k + 1).
  static constexpr float series[][2] = {
      {1.0f / 2, 1.0f / 6}, {1.0f / 24, 1.0f / 120}, {1.0f / 720, 1.0f / 5040}};
};

template <>
struct ExpConstants<VDouble> {
  using Bits = VUint64;
  static constexpr int mantissa = 52;
  static constexpr int bias = 1023;
  static constexpr double magic = 0x1.8p52;
  static constexpr double log2e = 0x1.71547652b82fep0;
  static constexpr double ln2_hi = 0x1.62e42fefap-1;
  static constexpr double ln2_lo = 0x1.cf79abc9e3b3ap-40;
  static constexpr int lift = 512;
  static constexpr double unit = 0x1p-512;
  static constexpr double sigmoid_low = -50, sigmoid_high = 760;
  static constexpr double tanh_bound = 44;
  static constexpr double series[][2] = {{1.0 / 2, 1.0 / 6},
                                         {1.0 / 24, 1.0 / 120},
                                         {1.0 / 720, 1.0 / 5040},
                                         {1.0 / 40320, 1.0 / 362880},
                                         {1.0 / 3628800, 1.0 / 39916800},
                                         {1.0 / 479001600, 1.0 / 6227020800}};
};

// exp(z) = 2^lift * scale * (1 + p).
template <int lift, class V>
LSTM_FUSED_INLINE void exp_parts(V z, V& scale, V& p) {
  using C = ExpConstants<V>;
  using Bits = typename C::Bits;
  const V shifted = z * C::log2e + C::magic;
  const V n = shifted - C::magic;
  const V r = (z - n * C::ln2_hi) - n * C::ln2_lo;
  scale = bit_cast<V>((bit_cast<Bits>(shifted) + (C::bias - lift)) << C::mantissa);
  // Pairs (Estrin): the latency of a chain of multiply-adds bounds the time.
  constexpr int pairs = sizeof(C::series) / sizeof(C::series[0]);
  const V r2 = r * r;
  V q = r * C::series[pairs - 1][1] + C::series[pairs - 1][0];
  LSTM_FUSED_UNROLLED_FOR (int k = pairs - 2; k >= 0; --k)
    q = q * r2 + (r * C::series[k][1] + C::series[k][0]);
  p = q * r2 + r;
}

// 1 / (1 + exp(-x))
template <class V>
LSTM_FUSED_INLINE V sigmoid(V x) {
  using C = ExpConstants<V>;
  V scale, p;
  exp_parts<C::lift>(clamp(-x, C::sigmoid_low, C::sigmoid_high), scale, p);
  return C::unit / ((C::unit + scale) + scale * p);
}

// (exp(2x) - 1) / (exp(2x) + 1)
template <class V>
LSTM_FUSED_INLINE V tanh(V x) {
  using C = ExpConstants<V>;
  V scale, p;
  exp_parts<0>(clamp(2 * x, -C::tanh_bound, C::tanh_bound), scale, p);
  const V em1 = (scale - 1) + scale * p;
  return em1 / (em1 + 2);
}

}  // namespace
}  // namespace lstm_fused
