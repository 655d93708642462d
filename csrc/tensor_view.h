// A tensor's memory, sizes and strides, without its owner: what torch's tensors and DLPack's have
// in common.
#pragma once

#include <initializer_list>
#include <string>

#include "check.h"
#include "params.h"

namespace lstm_fused {

inline constexpr int kOtherDType = -1, kUint8 = -2;
inline constexpr int kCpu = -1, kOtherDevice = -2;  // else the index of a CUDA device

struct TensorView {
  void* data = nullptr;
  int64_t dim = 0;
  const int64_t* sizes = nullptr;    // (dim,)
  const int64_t* strides = nullptr;  // (dim,), in elements
  int dtype = kOtherDType;           // a DType, kUint8 or kOtherDType
  int device = kCpu;

  int64_t size(int64_t i) const { return sizes[i]; }

  bool is_empty() const {
    for (int64_t i = 0; i < dim; ++i)
      if (sizes[i] == 0) return true;
    return false;
  }

  bool is_contiguous() const {
    int64_t pitch = 1;
    for (int64_t i = dim; i-- > 0;) {
      if (sizes[i] == 0) return true;
      if (sizes[i] != 1 && strides[i] != pitch) return false;
      pitch *= sizes[i];
    }
    return true;
  }

  // Entry i of the first dimension.
  TensorView at(int64_t i) const {
    TensorView entry = *this;
    if (data)
      entry.data =
          static_cast<char*>(data) + i * strides[0] * storage_bytes(static_cast<DType>(dtype));
    entry.dim = dim - 1;
    entry.sizes = sizes + 1;
    entry.strides = strides + 1;
    return entry;
  }
};

// "(2, 3)" of a shape.
inline std::string describe(const int64_t* sizes, int64_t count) {
  std::string s = "(";
  for (int64_t i = 0; i < count; ++i) {
    if (i) s += ", ";
    s += std::to_string(sizes[i]);
  }
  return s += ")";
}

inline std::string describe(const TensorView& t) {
  return describe(t.sizes, t.dim);
}

inline void check_shape(const TensorView& t, std::initializer_list<int64_t> shape,
                        const char* name) {
  bool same = t.dim == static_cast<int64_t>(shape.size());
  const int64_t* size = t.sizes;
  for (const int64_t wanted : shape) same = same && *size++ == wanted;
  LSTM_FUSED_CHECK(same, name, " has shape ", describe(t), " but must be ",
                   describe(shape.begin(), static_cast<int64_t>(shape.size())));
}

// Refuse t unless it is where x is and of x's dtype.
inline void check_like(const TensorView& t, const TensorView& x, const char* name) {
  LSTM_FUSED_CHECK(t.device == x.device, name, " must be on the device of x");
  LSTM_FUSED_CHECK(t.dtype == x.dtype, name, " must have the dtype of x");
}

}  // namespace lstm_fused
