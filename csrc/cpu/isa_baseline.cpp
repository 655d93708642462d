// What every machine of the architecture runs: SSE2 on x86-64, NEON on arm64.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
// Hardly any x86-64 processor lacks AVX2: less optimisation halves the time this file compiles.
#pragma GCC optimize("O1")
#endif
#define LSTM_FUSED_ISA kBaseline
#define LSTM_FUSED_VECTOR_BYTES 16
#if defined(__aarch64__)
#define LSTM_FUSED_TILE_COLS 4
#else
#define LSTM_FUSED_TILE_COLS 2
#endif
#include "instantiate.h"

const lstm_fused::Kernel* lstm_fused::kernels_baseline(CellKind cell, DType dtype) {
  return kernel_of(cell, dtype);
}
