#include "launch.h"

namespace lstm_fused::cuda {

struct Float16Mma {
  using Storage = Half;
  static constexpr bool kRounds = false;
  static LSTM_FUSED_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
    mma_float16(c, a, b);
  }
};

Launcher* const* const launchers_float16 =
    launchers<Arithmetic::kFloat16, TensorCores<Float16Mma>>();

}  // namespace lstm_fused::cuda
