#include "../compiler.h"

#if defined(__x86_64__)
LSTM_FUSED_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c")
#define LSTM_FUSED_ISA kAvx512Vnni
#define LSTM_FUSED_VECTOR_BYTES 64
#define LSTM_FUSED_TILE_COLS 4
#define LSTM_FUSED_F16C
#define LSTM_FUSED_VNNI
#include "instantiate.h"

const lstm_fused::Kernel* lstm_fused::kernels_avx512_vnni(CellKind cell, DType dtype) {
  return kernel_of(cell, dtype);
}
const lstm_fused::Kernel* lstm_fused::described_kernels_avx512_vnni(DType dtype) {
  return kernel_of_dtype<AnyCell>(dtype);
}
LSTM_FUSED_TARGET_END
#endif
