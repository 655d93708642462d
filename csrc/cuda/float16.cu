#include "launch.h"

namespace lstm_fused::cuda {

Run* const* const run_float16 = kRuns<TensorCores<HalfCores>>;

}  // namespace lstm_fused::cuda
