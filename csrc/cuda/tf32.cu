#include "launch.h"

namespace lstm_fused::cuda {

Run* const* const run_tf32 = kRuns<TensorCores<Tf32Cores>>;

}  // namespace lstm_fused::cuda
