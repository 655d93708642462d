// Conversions between float and the narrower formats.
#pragma once

#if defined(LSTM_FUSED_EMULATION)
#include "emulation/ptx/conversions.h"
#else

#include "threads.h"

namespace lstm_fused::cuda {

LSTM_FUSED_DEVICE float float_of_bits(uint32_t bits) {
  return __uint_as_float(bits);
}
LSTM_FUSED_DEVICE uint32_t bits_of_float(float x) {
  return __float_as_uint(x);
}
// Rounds the bits of a float32 to TF32's 10 bits of mantissa, ties away from zero.
LSTM_FUSED_DEVICE uint32_t round_to_tf32(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
}
LSTM_FUSED_DEVICE float float_of_bfloat16(uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}
LSTM_FUSED_DEVICE uint16_t bfloat16_of_float(float x) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
LSTM_FUSED_DEVICE float float_of_float16(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
LSTM_FUSED_DEVICE uint16_t float16_of_float(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

}  // namespace lstm_fused::cuda
#endif
