// The products that do not recur, and those of the gemm plan, by the cuBLAS that torch has loaded.
// Torch's own product would take TF32 by the switch of torch.matmul, and not by that of recurrent
// layers.
#pragma once

#include "cublas.h"
#include "plan.h"

namespace lstm_fused::cuda {

// In device memory, its rows `stride` values apart, or its columns if transposed.
struct Matrix {
  const void* data;
  int64_t rows, columns, stride;
  bool transposed;
};

// out (a.rows, b.columns) = a b, accumulated in the compute dtype and stored in it, or in the
// storage dtype; rows are contiguous. handle: torch's of cuBLAS, which is on the stream already.
// Null, or what went wrong.
inline const char* multiply(void* handle, DType dtype, bool tf32, const Matrix& a, const Matrix& b,
                            void* out, bool out_in_storage) {
  // Of cudaDataType, cublasComputeType_t, cublasOperation_t, cublasMath_t and cublasGemmAlgo_t.
  constexpr int types[kDTypeCount] = {/* R_32F */ 0, /* R_64F */ 1, /* R_16BF */ 14, /* R_16F */ 2};
  constexpr int in_float64 = 70, in_float32 = 68, in_tf32 = 77;
  constexpr int not_transposed = 0, transposed = 1, default_math = 0, default_algorithm = -1;
  const double one = 1, zero = 0;
  const float one_float = 1, zero_float = 0;
  const bool wide = dtype == DType::kFloat64;
  const int type = types[static_cast<int>(dtype)], out_type = out_in_storage ? type : types[wide];
  const int compute = wide ? in_float64 : tf32 && dtype == DType::kFloat32 ? in_tf32 : in_float32;
  // Torch left it as the switch of torch.matmul is, and sets it anew for each product of its own.
  if (const char* error = cublas_error(cublasSetMathMode(handle, default_math))) return error;
  // cuBLAS has columns where we have rows: the transpose of out is that of b times that of a.
  return cublas_error(cublasGemmEx_64(handle, b.transposed ? transposed : not_transposed,
                                      a.transposed ? transposed : not_transposed, b.columns, a.rows,
                                      a.columns, wide ? static_cast<const void*>(&one) : &one_float,
                                      b.data, type, b.stride, a.data, type, a.stride,
                                      wide ? static_cast<const void*>(&zero) : &zero_float, out,
                                      out_type, b.columns, compute, default_algorithm));
}

}  // namespace lstm_fused::cuda
