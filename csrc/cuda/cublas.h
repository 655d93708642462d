// The cuBLAS that torch has loaded. Its functions are declared here, with the types of their ABI,
// since nvcc comes without cuBLAS; they are weak, since a torch without CUDA has none.
#pragma once

#if defined(LSTM_FUSED_EMULATION)
#include "emulation/cublas.h"
#else

#include <cstdint>

extern "C" {
[[gnu::weak]] int cublasSetMathMode(void* handle, int mode);
[[gnu::weak]] int cublasGemmEx_64(void* handle, int transpose_a, int transpose_b, int64_t m,
                                  int64_t n, int64_t k, const void* alpha, const void* a,
                                  int a_type, int64_t a_stride, const void* b, int b_type,
                                  int64_t b_stride, const void* beta, void* c, int c_type,
                                  int64_t c_stride, int compute, int algorithm);
[[gnu::weak]] const char* cublasGetStatusString(int status);
// Torch's handle for the current device, set to the current stream.
[[gnu::weak]] int32_t torch_get_current_cuda_blas_handle(void** handle);
}

namespace lstm_fused::cuda {

inline bool has_cublas() {
  return cublasSetMathMode && cublasGemmEx_64 && cublasGetStatusString &&
         torch_get_current_cuda_blas_handle;
}

// Null on success.
inline const char* cublas_error(int status) {
  return status == 0 ? nullptr : cublasGetStatusString(status);
}

}  // namespace lstm_fused::cuda
#endif
