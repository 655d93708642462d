// The arithmetics of the CUDA kernels: the code of one is in the file <name>.cu.
#pragma once

#include "../params.h"

namespace lstm_fused::cuda {

// Every arithmetic there is, a row each: its name, the dtype of its tensors, whether its products
// are in TF32, whether they run on tensor cores, whether it has persistent kernels, and its
// operands and its computation as cuBLAS numbers them (cudaDataType, cublasComputeType_t).
#define LSTM_FUSED_ARITHMETICS(ARITHMETIC)                             \
  ARITHMETIC(Float32, float32, kFloat32, false, false, true, 0, 68)    \
  ARITHMETIC(Tf32, tf32, kFloat32, true, true, true, 0, 77)            \
  ARITHMETIC(Float64, float64, kFloat64, false, false, false, 1, 70)   \
  ARITHMETIC(BFloat16, bfloat16, kBFloat16, false, true, true, 14, 68) \
  ARITHMETIC(Float16, float16, kFloat16, false, true, true, 2, 68)

enum class Arithmetic : int {
#define LSTM_FUSED_ROW(Name, name, dtype, tf32, tensor_cores, persistent, type, compute) k##Name,
  LSTM_FUSED_ARITHMETICS(LSTM_FUSED_ROW)
#undef LSTM_FUSED_ROW
      kCount
};
inline constexpr int kArithmeticCount = static_cast<int>(Arithmetic::kCount);

struct ArithmeticFacts {
  DType dtype;
  bool tf32;
  bool tensor_cores;
  bool persistent;
  int cublas_type;
  int cublas_compute;
};

constexpr ArithmeticFacts facts(Arithmetic arithmetic) {
  constexpr ArithmeticFacts all[] = {
#define LSTM_FUSED_ROW(Name, name, dtype, tf32, tensor_cores, persistent, type, compute) \
  {DType::dtype, tf32, tensor_cores, persistent, type, compute},
      LSTM_FUSED_ARITHMETICS(LSTM_FUSED_ROW)
#undef LSTM_FUSED_ROW
  };
  return all[static_cast<int>(arithmetic)];
}

// The arithmetic of a dtype. tf32: whether TF32 is allowed, for the dtypes that have it. kCount if
// there is none.
constexpr Arithmetic arithmetic_of(DType dtype, bool tf32) {
  Arithmetic found = Arithmetic::kCount;
  for (int i = 0; i < kArithmeticCount; ++i) {
    const ArithmeticFacts f = facts(static_cast<Arithmetic>(i));
    if (f.dtype == dtype && (tf32 || !f.tf32)) found = static_cast<Arithmetic>(i);
  }
  return found;
}

constexpr bool every_dtype_has_an_arithmetic() {
  for (int i = 0; i < kDTypeCount; ++i)
    if (arithmetic_of(static_cast<DType>(i), false) == Arithmetic::kCount) return false;
  return true;
}
static_assert(every_dtype_has_an_arithmetic());

}  // namespace lstm_fused::cuda
