// The table of kernels: how the rest of the library reaches the .cu files, one of each arithmetic.
#pragma once

#include "../cells/cells.h"
#include "arithmetic.h"
#include "params.h"
#include "plan.h"

namespace lstm_fused::cuda {

// The products of the gemm plan.
class Gemm {
 public:
  virtual ~Gemm() = default;
  // The product of the first `rows` rows of B of direction d at step s with all of A: (rows, gates
  // * units) in the compute dtype, valid until the next product of that direction.
  virtual const void* multiply(const Product& product, int gates, int64_t s, int d,
                               int64_t rows) = 0;
};

// Launches a plan on a stream. second: the second product of a step, with a projection, else null.
// steps holds host pointers; params.steps holds device pointers, for a persistent plan. Returns
// null, or the error's text.
using Launcher = const char*(const Plan& plan, const RecurrenceParams& params,
                             const Product* second, const Steps& steps, Gemm& gemm, void* stream);

// The launchers of each arithmetic, by cell (CellKind); of each dtype, by described cell.
#define LSTM_FUSED_ROW(Name, name, dtype, tf32, tensor_cores, persistent, type, compute) \
  extern Launcher* const* const launchers_##name;
LSTM_FUSED_ARITHMETICS(LSTM_FUSED_ROW)
#undef LSTM_FUSED_ROW
#define LSTM_FUSED_DTYPE(Name, name, Storage, Compute, Torch) \
  extern Launcher* const* const described_launchers_##name;
LSTM_FUSED_DTYPES(LSTM_FUSED_DTYPE)
#undef LSTM_FUSED_DTYPE

#define LSTM_FUSED_COUNT(name, Cell) +1
inline constexpr int kFirstDescribed = 0 LSTM_FUSED_CELLS(LSTM_FUSED_COUNT);
#undef LSTM_FUSED_COUNT

inline Launcher* described_launcher_of(CellKind cell, DType dtype) {
  const int kind = static_cast<int>(cell) - kFirstDescribed;
  switch (dtype) {
#define LSTM_FUSED_DTYPE(Name, name, Storage, Compute, Torch) \
  case DType::k##Name: return described_launchers_##name[kind];
    LSTM_FUSED_DTYPES(LSTM_FUSED_DTYPE)
#undef LSTM_FUSED_DTYPE
    case DType::kCount: break;
  }
  return nullptr;
}

inline Launcher* launcher_of(CellKind cell, Arithmetic arithmetic) {
  const int kind = static_cast<int>(cell);
  if (kind >= kFirstDescribed) return described_launcher_of(cell, facts(arithmetic).dtype);
  switch (arithmetic) {
#define LSTM_FUSED_ROW(Name, name, dtype, tf32, tensor_cores, persistent, type, compute) \
  case Arithmetic::k##Name: return launchers_##name[kind];
    LSTM_FUSED_ARITHMETICS(LSTM_FUSED_ROW)
#undef LSTM_FUSED_ROW
    case Arithmetic::kCount: break;
  }
  return nullptr;
}

}  // namespace lstm_fused::cuda
