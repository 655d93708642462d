#include "launch.h"

namespace lstm_fused::cuda {

Run* const* const run_float32 = kRuns<Plain<float>>;

}  // namespace lstm_fused::cuda
