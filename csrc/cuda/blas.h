// A matrix product by the cuBLAS that torch has loaded. Torch's own product is not used: it takes
// TF32 by the switch of torch.matmul, where recurrent layers have a switch of their own.
#pragma once

#include "arithmetic.h"
#include "cublas.h"

namespace lstm_fused::cuda {

// A matrix in device memory. Its rows start `stride` values apart, or its columns if transposed.
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
  // Values of cublasOperation_t, cublasMath_t and cublasGemmAlgo_t.
  constexpr int not_transposed = 0, transposed = 1, default_math = 0, default_algorithm = -1;
  const double one = 1, zero = 0;
  const float one_float = 1, zero_float = 0;
  const bool wide = dtype == DType::kFloat64;
  const ArithmeticFacts row = facts(arithmetic_of(dtype, tf32));
  const DType compute_dtype = wide ? DType::kFloat64 : DType::kFloat32;
  const int type = row.cublas_type;
  const int out_type =
      out_in_storage ? type : facts(arithmetic_of(compute_dtype, false)).cublas_type;
  // Torch sets the mode by the switch of torch.matmul, before each of its own products.
  if (const char* error = cublas_error(cublasSetMathMode(handle, default_math))) return error;
  // cuBLAS is column-major: it computes the transpose of out, b^T a^T.
  return cublas_error(cublasGemmEx_64(handle, b.transposed ? transposed : not_transposed,
                                      a.transposed ? transposed : not_transposed, b.columns, a.rows,
                                      a.columns, wide ? static_cast<const void*>(&one) : &one_float,
                                      b.data, type, b.stride, a.data, type, a.stride,
                                      wide ? static_cast<const void*>(&zero) : &zero_float, out,
                                      out_type, b.columns, row.cublas_compute, default_algorithm));
}

}  // namespace lstm_fused::cuda
