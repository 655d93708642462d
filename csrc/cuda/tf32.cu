#include "launch.h"
#include "ptx/conversions.h"

namespace lstm_fused::cuda {

// Operands are rounded to TF32: the instruction itself would truncate them.
struct Tf32Mma {
  using Storage = float;
  static constexpr bool kRounds = true;
  static LSTM_FUSED_DEVICE uint32_t round_bits(uint32_t bits) { return round_to_tf32(bits); }
  static LSTM_FUSED_DEVICE float round(float x) {
    return float_of_bits(round_to_tf32(bits_of_float(x)));
  }
  static LSTM_FUSED_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
    mma_tf32(c, a, b);
  }
};

Launcher* const* const launchers_tf32 = launchers<Arithmetic::kTf32, TensorCores<Tf32Mma>>();

}  // namespace lstm_fused::cuda
