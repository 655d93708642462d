// csrc/cuda/cublas.h for the host: a plain product with cuBLAS's arguments. Matrices are
// column-major, transposed where transpose_a or transpose_b says so.
#pragma once

#include <vector>

#include "ptx/conversions.h"

namespace lstm_fused::cuda {

inline int& math_mode() {
  static int mode;
  return mode;
}
// The handle comes in the mode that allows TF32, in which torch may leave it.
inline int32_t torch_get_current_cuda_blas_handle(void** handle) {
  math_mode() = 3;
  *handle = nullptr;
  return 0;
}
inline int cublasSetMathMode(void*, int mode) {
  math_mode() = mode;
  return 0;
}
inline double value_at(const void* data, int type, int64_t i, bool tf32) {
  switch (type) {
    case 1: return static_cast<const double*>(data)[i];
    case 14: return float_of_bfloat16(static_cast<const uint16_t*>(data)[i]);
    case 2: return float_of_float16(static_cast<const uint16_t*>(data)[i]);
    default: {
      const float x = static_cast<const float*>(data)[i];
      return tf32 ? float_of_bits(round_to_tf32(bits_of_float(x))) : x;
    }
  }
}
inline void store_value(void* data, int type, int64_t i, double value) {
  const float narrow = static_cast<float>(value);
  switch (type) {
    case 1: static_cast<double*>(data)[i] = value; break;
    case 14: static_cast<uint16_t*>(data)[i] = bfloat16_of_float(narrow); break;
    case 2: static_cast<uint16_t*>(data)[i] = float16_of_float(narrow); break;
    default: static_cast<float*>(data)[i] = narrow;
  }
}
inline int cublasGemmEx_64(void*, int transpose_a, int transpose_b, int64_t m, int64_t n, int64_t k,
                           const void* alpha, const void* a, int a_type, int64_t a_stride,
                           const void* b, int b_type, int64_t b_stride, const void* beta, void* c,
                           int c_type, int64_t c_stride, int compute, int) {
  const bool wide = compute == 70, tf32 = compute == 77 || math_mode() == 3;
  const double one = wide ? *static_cast<const double*>(alpha) : *static_cast<const float*>(alpha);
  const double zero = wide ? *static_cast<const double*>(beta) : *static_cast<const float*>(beta);
  const bool fits =
      a_stride >= (transpose_a ? k : m) && b_stride >= (transpose_b ? n : k) && c_stride >= m;
  if (!fits || one != 1 || zero != 0 || a_type != b_type || (c_type != wide && c_type != a_type))
    return 7;
  std::vector<double> left(m * k), right(k * n);
  for (int64_t i = 0; i < m * k; ++i) {
    const int64_t at = transpose_a ? i / k * a_stride + i % k : i % k * a_stride + i / k;
    left[i] = value_at(a, a_type, at, tf32);
  }
  for (int64_t i = 0; i < k * n; ++i) {
    const int64_t at = transpose_b ? i % k * b_stride + i / k : i / k * b_stride + i % k;
    right[i] = value_at(b, b_type, at, tf32);
  }
  for (int64_t j = 0; j < n; ++j)
    for (int64_t i = 0; i < m; ++i) {
      double sum = 0;
      for (int64_t l = 0; l < k; ++l) sum += left[i * k + l] * right[j * k + l];
      store_value(c, c_type, j * c_stride + i, sum);
    }
  return 0;
}
inline bool has_cublas() {
  return true;
}
inline const char* cublas_error(int status) {
  return status == 0 ? nullptr : "a parameter is not valid";
}

}  // namespace lstm_fused::cuda
