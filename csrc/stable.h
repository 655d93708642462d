// The one place that sees torch's stable ABI (libtorch, target 2.10): allocation, checks, and the
// conversions between a tensor and what kernels take.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "params.h"

// A RuntimeError in Python whose message is what follows the condition, and nothing else: torch's
// own STD_TORCH_CHECK puts the function, file and line before it. A macro, so that the message is
// made only when it is needed.
#define LSTM_FUSED_CHECK(condition, ...) \
  if (!(condition)) ::lstm_fused::refuse(__VA_ARGS__)

namespace lstm_fused {

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: refuse(name, " must be float32, float64, bfloat16 or float16");
  }
}

inline ScalarType compute_dtype(DType dtype) {
  return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

inline std::vector<int64_t> shape_of(const Tensor& t) {
  return {t.sizes().begin(), t.sizes().end()};
}

inline std::string describe(const std::vector<int64_t>& shape) {
  std::string s = "(";
  for (size_t i = 0; i < shape.size(); ++i) s += (i ? ", " : "") + std::to_string(shape[i]);
  return s + ")";
}

inline std::string describe(const Tensor& t) {
  return describe(shape_of(t));
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
  AtenTensorHandle handle;
  const bool allocated = aoti_torch_get_device_type(like.get(), &device_type) == TORCH_SUCCESS &&
                         aoti_torch_empty_strided(
                             static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                             torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
                             device_type, like.get_device_index(), &handle) == TORCH_SUCCESS;
  LSTM_FUSED_CHECK(allocated, "out of memory: no room for a tensor of shape ", describe(shape));
  return Tensor(handle);
}

inline void check_shape(const Tensor& t, const std::vector<int64_t>& shape, const char* name) {
  bool same = t.dim() == static_cast<int64_t>(shape.size());
  int64_t i = 0;
  for (const int64_t size : shape) same = same && t.size(i++) == size;
  LSTM_FUSED_CHECK(same, name, " has shape ", describe(t), " but must be ", describe(shape));
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.is_cuda() == b.is_cuda() &&
         a.get_device_index() == b.get_device_index();
}

inline void check_like(const Tensor& t, const Tensor& x, const char* name) {
  LSTM_FUSED_CHECK(same_device(t, x), name, " must be on the device of x");
  LSTM_FUSED_CHECK(t.scalar_type() == x.scalar_type(), name, " must have the dtype of x");
}

// Entry `i` of the first dimension, as a view of the same memory.
inline Tensor select_first(const Tensor& t, int64_t i) {
  const auto sizes = t.sizes(), strides = t.strides();
  AtenTensorHandle handle;
  const bool viewed =
      aoti_torch__reinterpret_tensor(t.get(), t.dim() - 1, sizes.data() + 1, strides.data() + 1,
                                     i * strides[0], &handle) == TORCH_SUCCESS;
  LSTM_FUSED_CHECK(viewed, "there is no model ", i, " in a tensor of shape ", describe(t));
  return Tensor(handle);
}

inline Tensor as_contiguous(const Tensor& t) {
  if (t.is_contiguous()) return t;
  try {
    return torch::stable::contiguous(t);
  } catch (const std::exception&) {
    refuse("out of memory: no room for a contiguous copy of a tensor of shape ", describe(t));
  }
}

}  // namespace lstm_fused
