#include "described.h"

namespace lstm_fused::cuda {

Launcher* const* const described_launchers_float16 = kDescribedLaunchers<Half>;

}  // namespace lstm_fused::cuda
