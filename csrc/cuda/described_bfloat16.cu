#include "described.h"

namespace lstm_fused::cuda {

Launcher* const* const described_launchers_bfloat16 = kDescribedLaunchers<BFloat16>;

}  // namespace lstm_fused::cuda
