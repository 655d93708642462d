// What the files offer, one for each dtype and one for float32 in TF32.
#pragma once

#include "../cells/cells.h"
#include "params.h"
#include "plan.h"

namespace lstm_fused::cuda {

// A library's products, for the gemm plan.
class Gemm {
 public:
  virtual ~Gemm() = default;
  // Of a direction's `rows` rows of B at step s and all of A, of so many gates: (rows, gates *
  // units) in the compute dtype, there until the direction's next product.
  virtual const void* multiply(const Product& product, int gates, int64_t s, int d,
                               int64_t rows) = 0;
};

// Runs a plan on a stream: the recurrence's product and, with a projection, the second of a step.
// steps: on the host; params.steps: on the device, for a persistent plan. Null, or what went wrong.
using Run = const char*(const Plan& plan, const RecurrenceParams& params, const Product* second,
                        const Steps& steps, Gemm& gemm, void* stream);

// By cell (CellKind), each in the file of its name.
extern Run* const* const run_float32;
extern Run* const* const run_tf32;
extern Run* const* const run_float64;
extern Run* const* const run_bfloat16;
extern Run* const* const run_float16;

}  // namespace lstm_fused::cuda
