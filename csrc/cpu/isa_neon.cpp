#include "../compiler.h"

#if defined(__aarch64__)
LSTM_FUSED_KEEP_ORDER_OF_LOADS
#define LSTM_FUSED_ISA kNeon
#define LSTM_FUSED_VECTOR_BYTES 16
#define LSTM_FUSED_TILE_COLS 4
#define LSTM_FUSED_NEON
#include "instantiate.h"

const lstm_fused::Kernel* lstm_fused::kernels_neon(CellKind cell, DType dtype) {
  return kernel_of(cell, dtype);
}
const lstm_fused::Kernel* lstm_fused::described_kernels_neon(DType dtype) {
  return kernel_of_dtype<AnyCell>(dtype);
}
#endif
