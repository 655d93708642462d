#include "launch.h"

namespace lstm_fused::cuda {

Launcher* const* const launchers_float64 =
    launchers<Arithmetic::kFloat64, FusedMultiplyAdd<double>>();

}  // namespace lstm_fused::cuda
