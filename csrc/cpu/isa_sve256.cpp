// Needs the option -msve-vector-bits=256, which changes no other file.
#include "../compiler.h"

#if defined(LSTM_FUSED_SVE_VECTORS)
LSTM_FUSED_TARGET("arch=armv8.2-a+sve")
#define LSTM_FUSED_ISA kSve256
#define LSTM_FUSED_VECTOR_BYTES 32
#define LSTM_FUSED_TILE_COLS 4
#define LSTM_FUSED_SVE
#include "instantiate.h"

const lstm_fused::Kernel* lstm_fused::kernels_sve256(CellKind cell, DType dtype) {
  return kernel_of(cell, dtype);
}
const lstm_fused::Kernel* lstm_fused::described_kernels_sve256(DType dtype) {
  return kernel_of_dtype<AnyCell>(dtype);
}
LSTM_FUSED_TARGET_END
#endif
