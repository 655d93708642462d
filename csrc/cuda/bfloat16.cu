#include "launch.h"

namespace lstm_fused::cuda {

struct BFloat16Mma {
  using Storage = BFloat16;
  static constexpr bool kRounds = false;
  static LSTM_FUSED_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
    mma_bfloat16(c, a, b);
  }
};

Launcher* const* const launchers_bfloat16 =
    launchers<Arithmetic::kBFloat16, TensorCores<BFloat16Mma>>();

}  // namespace lstm_fused::cuda
