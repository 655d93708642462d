#include "../compiler.h"

#if defined(__aarch64__)
LSTM_FUSED_TARGET("arch=armv8.2-a+bf16")
LSTM_FUSED_KEEP_ORDER_OF_LOADS
#define LSTM_FUSED_ISA kNeonBf16
#define LSTM_FUSED_VECTOR_BYTES 16
#define LSTM_FUSED_TILE_COLS 4
#define LSTM_FUSED_NEON
#define LSTM_FUSED_BF16_PAIRS
#include "instantiate.h"

const lstm_fused::Kernel* lstm_fused::kernels_neon_bf16(CellKind cell, DType dtype) {
  return kernel_of(cell, dtype);
}
const lstm_fused::Kernel* lstm_fused::described_kernels_neon_bf16(DType dtype) {
  return kernel_of_dtype<AnyCell>(dtype);
}
LSTM_FUSED_TARGET_END
#endif
