// Matrix products on a CUDA device that torch's cuBLAS takes: of the input before the recurrence,
// of gradients after it, and of every step of the gemm plan.
#pragma once

#include "../cuda/blas.h"
#include "../cuda/kernels.h"
#include "stable.h"

namespace lstm_fused::cuda {

inline void check(const char* error, const char* what) {
  LSTM_FUSED_CHECK(error == nullptr, "lstm_fused, ", what, ": ", error);
}

inline void check_cublas() {
  LSTM_FUSED_CHECK(has_cublas(), "lstm_fused: torch came without cuBLAS of CUDA 12 or later");
}

// out (a.rows, b.columns) = a (n, k) b (k, m), accumulated in the compute dtype. out's rows are
// contiguous; its values are of the compute dtype, or of the storage dtype.
inline void multiply_into(void* out, bool out_in_storage, const Matrix& a, const Matrix& b,
                          DType dtype, bool tf32) {
  check_cublas();
  void* handle = nullptr;
  LSTM_FUSED_CHECK(torch_get_current_cuda_blas_handle(&handle) == TORCH_SUCCESS,
                   "torch has no cuBLAS handle for this device");
  check(multiply(handle, dtype, tf32, a, b, out, out_in_storage), "cuBLAS");
}

// A new tensor of the compute dtype on the device of `like`.
inline Tensor product(const Matrix& a, const Matrix& b, DType dtype, bool tf32,
                      const Tensor& like) {
  Tensor out = allocate({a.rows, b.columns}, compute_dtype(dtype), like);
  multiply_into(out.data_ptr(), false, a, b, dtype, tf32);
  return out;
}

// The products of the gemm plan, one a step and direction.
class StepProducts final : public Gemm {
 public:
  StepProducts(DType dtype, bool tf32, const Tensor& like)
      : dtype_(dtype), tf32_(tf32), like_(like) {}

  const void* multiply(const Product& p, int gates, int64_t s, int d, int64_t rows) override {
    const int64_t columns = p.in.bytes / storage_bytes(dtype_);
    const Matrix b{p.in.at(s, d, 0), rows, columns, columns, false};
    const Matrix a{p.a[d], columns, gates * p.units, columns, true};
    results_[d] = product(b, a, dtype_, tf32_, like_);
    return results_[d]->data_ptr();
  }

 private:
  const DType dtype_;
  const bool tf32_;
  const Tensor& like_;
  std::optional<Tensor> results_[2];
};

}  // namespace lstm_fused::cuda
