#include "launch.h"

namespace lstm_fused::cuda {

Run* const* const run_float64 = kRuns<Plain<double>>;

}  // namespace lstm_fused::cuda
