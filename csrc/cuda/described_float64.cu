#include "described.h"

namespace lstm_fused::cuda {

Launcher* const* const described_launchers_float64 = kDescribedLaunchers<double>;

}  // namespace lstm_fused::cuda
