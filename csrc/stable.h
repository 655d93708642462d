// The one place that sees torch's stable ABI (libtorch, target 2.10): allocation, checks, and the
// conversions between a tensor and what kernels take.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "params.h"

namespace lstm_fused {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16");
  }
  return DType::kFloat32;
}

inline ScalarType compute_dtype(DType dtype) {
  return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

// On the device of `like`.
inline Tensor allocate(const std::vector<int64_t>& shape, ScalarType dtype, const Tensor& like) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= shape[i] > 0 ? shape[i] : 1;
  }
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
      like.get_device_index(), &handle));
  return Tensor(handle);
}

inline std::string describe(const Tensor& t) {
  std::string s = "(";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + ")";
}

inline void check_shape(const Tensor& t, const std::vector<int64_t>& shape, const char* name) {
  bool same = t.dim() == static_cast<int64_t>(shape.size());
  std::string wanted = "(";
  int64_t i = 0;
  for (const int64_t size : shape) {
    same = same && t.size(i) == size;
    wanted += (i ? ", " : "") + std::to_string(size);
    ++i;
  }
  STD_TORCH_CHECK(same, name, " has shape ", describe(t), " but must be ", wanted + ")");
}

inline std::vector<int64_t> shape_of(const Tensor& t) {
  return {t.sizes().begin(), t.sizes().end()};
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.is_cuda() == b.is_cuda() &&
         a.get_device_index() == b.get_device_index();
}

inline void check_like(const Tensor& t, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(same_device(t, x), name, " must be on the device of x");
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, " must have the dtype of x");
}

// Entry `i` of the first dimension, as a view of the same memory.
inline Tensor select_first(const Tensor& t, int64_t i) {
  const auto sizes = t.sizes(), strides = t.strides();
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
      t.get(), t.dim() - 1, sizes.data() + 1, strides.data() + 1, i * strides[0], &handle));
  return Tensor(handle);
}

inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

}  // namespace lstm_fused
