// csrc/cuda/ptx/conversions.h for the host.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace lstm_fused::cuda {

inline float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t bits_of_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of_bfloat16(uint16_t bits) {
  return float_of_bits(static_cast<uint32_t>(bits) << 16);
}
inline uint16_t bfloat16_of_float(float x) {
  const uint32_t bits = bits_of_float(x);
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float float_of_float16(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign * std::ldexp(static_cast<float>(exponent ? mantissa | 1024 : mantissa),
                           (exponent ? exponent : 1) - 25);
}
inline uint16_t float16_of_float(float x) {
  const uint16_t sign = static_cast<uint16_t>(bits_of_float(x) >> 16 & 0x8000);
  const float size = std::fabs(x);
  if (x != x) return 0x7e00;
  if (size == 0) return sign;
  if (size >= 65520) return sign | 0x7c00;
  int exponent;
  std::frexp(size, &exponent);
  const int last = exponent < -13 ? -24 : exponent - 11;  // exponent of the last bit's value
  const int units = static_cast<int>(std::nearbyint(std::ldexp(size, -last)));
  // The addition carries into the exponent where the mantissa rounds up to the next power of two.
  return static_cast<uint16_t>(sign | (((last + 24) << 10) + units));
}
inline uint32_t round_to_tf32(uint32_t bits) {
  return float_of_bits(bits) != float_of_bits(bits) ? bits : (bits + 0x1000) & 0xffffe000u;
}

}  // namespace lstm_fused::cuda
