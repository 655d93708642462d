#include "described.h"

namespace lstm_fused::cuda {

Launcher* const* const described_launchers_float32 = kDescribedLaunchers<float>;

}  // namespace lstm_fused::cuda
