#include "launch.h"

namespace lstm_fused::cuda {

const char* run_float16(CellKind cell, const Plan& plan, const RecurrenceParams& params,
                        const Product* second, const Steps& steps, Gemm& gemm, void* stream) {
  return run_cell<TensorCores<HalfCores>>(cell, plan, params, second, steps, gemm, stream);
}

}  // namespace lstm_fused::cuda
