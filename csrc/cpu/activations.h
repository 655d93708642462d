// sigmoid, tanh, exp, log and log_sigmoid on vectors. All but log from one split of the exponential
// function:
//   z = n ln2 + r,  |r| <= ln2 / 2,  exp(z) = 2^n (1 + p),  p = expm1(r) by its Taylor series.
// At most 2.5 ulp in float32 (tests/kernels/test_activations.py, test_described.py); exact at 0 and
// +-inf; NaN stays NaN.
#pragma once

#include <limits>

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
  // Past these exp is 0 and infinite.
  static constexpr float exp_low = -110, exp_high = 90;
  static constexpr float smallest_normal = 0x1p-126f;
  static constexpr float sqrt_half = 0x1.6a09e6p-1f;
  // Of (atanh(s) / s - 1) / s^2, in powers of s^2.
  static constexpr float atanh_series[] = {1.0f / 3, 1.0f / 5, 1.0f / 7, 1.0f / 9};
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
  static constexpr double exp_low = -760, exp_high = 720;
  static constexpr double smallest_normal = 0x1p-1022;
  static constexpr double sqrt_half = 0x1.6a09e667f3bcdp-1;
  static constexpr double atanh_series[] = {1.0 / 3,  1.0 / 5,  1.0 / 7,  1.0 / 9,  1.0 / 11,
                                            1.0 / 13, 1.0 / 15, 1.0 / 17, 1.0 / 19, 1.0 / 21};
};

// exp(z) = 2^n * (1 + p), n in the lowest bits of what is returned.
template <class V>
LSTM_FUSED_INLINE typename ExpConstants<V>::Bits split_exp(V z, V& p) {
  using C = ExpConstants<V>;
  const V shifted = z * C::log2e + C::magic;
  const V n = shifted - C::magic;
  const V r = (z - n * C::ln2_hi) - n * C::ln2_lo;
  // Pairs (Estrin): the latency of a chain of multiply-adds bounds the time.
  constexpr int pairs = sizeof(C::series) / sizeof(C::series[0]);
  const V r2 = r * r;
  V q = r * C::series[pairs - 1][1] + C::series[pairs - 1][0];
  LSTM_FUSED_UNROLLED_FOR (int k = pairs - 2; k >= 0; --k)
    q = q * r2 + (r * C::series[k][1] + C::series[k][0]);
  p = q * r2 + r;
  return bit_cast<typename C::Bits>(shifted);
}

// exp(z) = 2^lift * scale * (1 + p).
template <int lift, class V>
LSTM_FUSED_INLINE void exp_parts(V z, V& scale, V& p) {
  using C = ExpConstants<V>;
  scale = bit_cast<V>((split_exp(z, p) + (C::bias - lift)) << C::mantissa);
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

template <class V>
LSTM_FUSED_INLINE V exp(V x) {
  using C = ExpConstants<V>;
  using Bits = typename C::Bits;
  V p;
  const Bits n = split_exp(clamp(x, C::exp_low, C::exp_high), p);
  // 2^n in two factors, since it may be subnormal or infinite where either is neither. `twice` is
  // n + 2 * bias, which has no sign.
  const Bits twice = n - bit_cast<Bits>(splat_of<V>(C::magic)) + 2 * C::bias;
  const Bits half = twice >> 1;
  const V scale = bit_cast<V>(half << C::mantissa);
  return (scale + scale * p) * bit_cast<V>((twice - half) << C::mantissa);
}

// n ln2 + log(1 + f), 1 + f from sqrt(1/2) to sqrt(2): by 2 atanh(s), s = f / (2 + f).
template <class V>
LSTM_FUSED_INLINE V log_of_parts(V n, V f) {
  using C = ExpConstants<V>;
  constexpr int terms = sizeof(C::atanh_series) / sizeof(C::atanh_series[0]);
  const V s = f / (2 + f), s2 = s * s, half = f * f / 2;
  V q = splat_of<V>(C::atanh_series[terms - 1]);
  LSTM_FUSED_UNROLLED_FOR (int k = terms - 2; k >= 0; --k) q = q * s2 + C::atanh_series[k];
  // 2s = f - s f, and s f = f^2 / 2 - s f^2 / 2.
  const V rest = s * (half + 2 * s2 * q) + n * C::ln2_lo;
  return n * C::ln2_hi - ((half - rest) - f);
}

template <class V>
LSTM_FUSED_INLINE V log(V x) {
  using C = ExpConstants<V>;
  using Bits = typename C::Bits;
  constexpr int lift = C::mantissa + 1;
  const auto subnormal = x < C::smallest_normal;
  const V normal = subnormal ? x * static_cast<decltype(C::unit)>(int64_t{1} << lift) : x;
  // The exponent of x / sqrt(1/2), and what is left of x when it is taken away.
  const Bits root = bit_cast<Bits>(splat_of<V>(C::sqrt_half));
  const Bits offset = bit_cast<Bits>(normal) - root;
  const Bits exponent = offset & ~(((Bits{} + 1) << C::mantissa) - 1);
  const V f = bit_cast<V>(bit_cast<Bits>(normal) - exponent) - 1;
  // An integer of either sign in the lowest bits of magic, which is then subtracted.
  const Bits biased = (exponent + ((Bits{} + C::bias) << C::mantissa)) >> C::mantissa;
  const V n = bit_cast<V>(biased + bit_cast<Bits>(splat_of<V>(C::magic))) -
              (C::magic + C::bias + (subnormal ? splat_of<V>(lift) : V{}));
  const V finite = log_of_parts(n, f);
  const V infinity = splat_of<V>(std::numeric_limits<decltype(V{}[0] + 0)>::infinity());
  V result = x < infinity ? finite : x;  // infinity and NaN stay
  result = x == V{} ? -infinity : result;
  return x < V{} ? infinity - infinity : result;
}

// log(sigmoid(x)) = min(x, 0) - log(1 + exp(-|x|))
template <class V>
LSTM_FUSED_INLINE V log_sigmoid(V x) {
  const V negative = x > V{} ? V{} : x;
  const V u = exp(V(negative - (x > V{} ? x : V{})));
  const auto large = u > 0.41f;  // 1 + u past sqrt(2): its half has a logarithm ln2 smaller
  const V f = large ? (u - 1) / 2 : u;
  return negative - log_of_parts(large ? V{} + 1 : V{}, f);
}

}  // namespace
}  // namespace lstm_fused
