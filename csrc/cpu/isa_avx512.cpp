#include "../compiler.h"

#if defined(__x86_64__)
LSTM_FUSED_TARGET("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
#define LSTM_FUSED_ISA kAvx512
#define LSTM_FUSED_VECTOR_BYTES 64
#define LSTM_FUSED_TILE_COLS 4
#define LSTM_FUSED_F16C
#include "instantiate.h"

const lstm_fused::Kernel* lstm_fused::kernels_avx512(CellKind cell, DType dtype) {
  return kernel_of(cell, dtype);
}
const lstm_fused::Kernel* lstm_fused::described_kernels_avx512(DType dtype) {
  return kernel_of_dtype<AnyCell>(dtype);
}
LSTM_FUSED_TARGET_END
#endif
