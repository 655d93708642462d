#include "launch.h"
#include "ptx/conversions.h"

namespace lstm_fused::cuda {

// Operands are rounded to TF32: the instruction itself would truncate them.
struct Tf32Mma {
  using Storage = float;
  template <int kCount>
  static LSTM_FUSED_DEVICE void prepare(uint32_t (&r)[kCount]) {
    LSTM_FUSED_UNROLL
    for (int i = 0; i < kCount; ++i) r[i] = round_to_tf32(r[i]);
  }
  static LSTM_FUSED_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
    mma_tf32(c, a, b);
  }
};

Launcher* const* const launchers_tf32 = launchers<Arithmetic::kTf32, TensorCores<Tf32Mma>>();

}  // namespace lstm_fused::cuda
