#include "launch.h"

namespace lstm_fused::cuda {

Run* const* const run_bfloat16 = kRuns<TensorCores<BFloat16Cores>>;

}  // namespace lstm_fused::cuda
