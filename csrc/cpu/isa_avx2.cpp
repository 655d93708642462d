#include "../compiler.h"

#if defined(__x86_64__)
LSTM_FUSED_TARGET("avx2,fma,f16c")
#define LSTM_FUSED_ISA kAvx2
#define LSTM_FUSED_VECTOR_BYTES 32
#define LSTM_FUSED_TILE_COLS 2
#define LSTM_FUSED_F16C
#include "instantiate.h"

const lstm_fused::Kernel* lstm_fused::kernels_avx2(CellKind cell, DType dtype) {
  return kernel_of(cell, dtype);
}
const lstm_fused::Kernel* lstm_fused::described_kernels_avx2(DType dtype) {
  return kernel_of_dtype<AnyCell>(dtype);
}
LSTM_FUSED_TARGET_END
#endif
