#include "../compiler.h"

#if defined(LSTM_FUSED_SVE_VECTORS)
LSTM_FUSED_TARGET("arch=armv8.2-a+sve+bf16")
#define LSTM_FUSED_ISA kSve256Bf16
#define LSTM_FUSED_VECTOR_BYTES 32
#define LSTM_FUSED_TILE_COLS 4
#define LSTM_FUSED_SVE
#define LSTM_FUSED_BF16_PAIRS
#include "instantiate.h"

const lstm_fused::Kernel* lstm_fused::kernels_sve256_bf16(CellKind cell, DType dtype) {
  return kernel_of(cell, dtype);
}
const lstm_fused::Kernel* lstm_fused::described_kernels_sve256_bf16(DType dtype) {
  return kernel_of_dtype<AnyCell>(dtype);
}
LSTM_FUSED_TARGET_END
#endif
