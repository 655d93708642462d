#include "launch.h"

namespace lstm_fused::cuda {

Launcher* const* const launchers_float32 =
    launchers<Arithmetic::kFloat32, FusedMultiplyAdd<float>>();

}  // namespace lstm_fused::cuda
