// Plain vectors: SSE2 on x86-64, and what the compiler makes of them elsewhere.
#include "../compiler.h"

#if !defined(__aarch64__)
LSTM_FUSED_OPTIMIZE_LESS
#define LSTM_FUSED_ISA kBaseline
#define LSTM_FUSED_VECTOR_BYTES 16
#define LSTM_FUSED_TILE_COLS 2
#include "instantiate.h"

const lstm_fused::Kernel* lstm_fused::kernels_baseline(CellKind cell, DType dtype) {
  return kernel_of(cell, dtype);
}
const lstm_fused::Kernel* lstm_fused::described_kernels_baseline(DType dtype) {
  return kernel_of_dtype<AnyCell>(dtype);
}
#endif
