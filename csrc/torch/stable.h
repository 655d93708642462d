// The one place that sees torch's stable ABI (libtorch, target 2.10): allocation, views, and the
// conversions between a tensor and what kernels take.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <vector>

#include "../tensor_view.h"

namespace lstm_fused {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

inline int dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
#define LSTM_FUSED_CASE(Name, name, Storage, Compute, Torch) \
  case ScalarType::Torch: return static_cast<int>(DType::k##Name);
    LSTM_FUSED_DTYPES(LSTM_FUSED_CASE)
#undef LSTM_FUSED_CASE
    case ScalarType::Byte: return kUint8;
    default: return kOtherDType;
  }
}

inline ScalarType compute_dtype(DType dtype) {
  return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

// Valid as long as the tensor lives.
inline TensorView view_of(const Tensor& t) {
  const int device = t.is_cpu() ? kCpu : t.is_cuda() ? t.get_device_index() : kOtherDevice;
  return {const_cast<void*>(t.const_data_ptr()),
          t.dim(),
          t.sizes().data(),
          t.strides().data(),
          dtype_of(t),
          device};
}

inline Shape shape_of(const Tensor& t) {
  return {t.sizes().begin(), t.sizes().end()};
}

// Uninitialised, contiguous, on the device of `like`.
inline Tensor allocate(const Shape& shape, ScalarType dtype, const Tensor& like) {
  Shape strides(shape.size());
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
  LSTM_FUSED_CHECK(allocated, "out of memory for a tensor of shape ",
                   describe(shape.data(), static_cast<int64_t>(shape.size())));
  return Tensor(handle);
}

// A view of t's memory from `offset` elements after its first.
inline Tensor reinterpret(const Tensor& t, const Shape& sizes, const Shape& strides,
                          int64_t offset) {
  AtenTensorHandle handle;
  const bool viewed =
      aoti_torch__reinterpret_tensor(t.get(), static_cast<int64_t>(sizes.size()), sizes.data(),
                                     strides.data(), offset, &handle) == TORCH_SUCCESS;
  LSTM_FUSED_CHECK(viewed, "no view of a tensor of shape ", describe(view_of(t)));
  return Tensor(handle);
}

// Entry `i` of the first dimension.
inline Tensor select_first(const Tensor& t, int64_t i) {
  const auto sizes = t.sizes(), strides = t.strides();
  return reinterpret(t, {sizes.begin() + 1, sizes.end()}, {strides.begin() + 1, strides.end()},
                     i * strides[0]);
}

inline Tensor as_contiguous(const Tensor& t) {
  if (t.is_contiguous()) return t;
  try {
    return torch::stable::contiguous(t);
  } catch (const std::exception&) {
    refuse("out of memory for a contiguous copy of a tensor of shape ", describe(view_of(t)));
  }
}

}  // namespace lstm_fused
