// Tensors that Python holds, read and made past torch's dispatcher.
#pragma once

#include <cstring>
#include <new>
#include <span>
#include <utility>

#include "../poison.h"
#include "python_torch.h"
#include "stable.h"

namespace lstm_fused {

inline int dtype_of(const dlpack::Tensor& t) {
  for (int i = 0; i < kDTypeCount; ++i) {
    const DType dtype = static_cast<DType>(i);
    const uint8_t code = dtype == DType::kBFloat16 ? dlpack::kBfloat : dlpack::kFloat;
    if (t.type_code == code && t.type_bits == 8 * storage_bytes(dtype)) return i;
  }
  if (t.type_code == dlpack::kUint && t.type_bits == 8) return kUint8;
  return kOtherDType;
}

// The view of a tensor's memory, whatever the tensor's class; false for one without memory on the
// CPU and for any other object. Valid as long as the tensor keeps its memory and its shape.
inline bool read_tensor(const Torch& torch, PyObject* object, TensorView& to) {
  dlpack::Tensor t;
  if (torch.dlpack->dltensor_from_py_object_no_sync(object, &t) != 0) return false;
  to = {static_cast<char*>(t.data) + t.byte_offset, t.ndim, t.shape, t.strides, dtype_of(t)};
  return t.device_type == dlpack::kCpu && (t.data || to.is_empty());  // zeros may have no memory
}

// Whether the tensor may be a view of the negative of what lies there, z.conj().imag: that has no
// stride of 1, except in a dimension of one element.
inline bool may_be_negative(const TensorView& t) {
  for (int64_t i = 0; i < t.dim; ++i)
    if (t.sizes[i] > 1 && t.strides[i] == 1) return false;
  return true;
}

// The same of a plain tensor (Torch::is_plain); false for another. To ask torch for the sign lets
// the interpreter's lock go, so that it is asked where it matters only.
inline bool read_plain(const Torch& torch, PyObject* object, TensorView& to) {
  return torch.is_tensor(object) && read_tensor(torch, object, to) &&
         (!may_be_negative(to) || torch.is_plain(object));
}

// A new contiguous tensor on the CPU, poisoned where that is asked for, which becomes Python's.
class NewTensor {
 public:
  // shape: (dims,), at most 3. transposed: the tensor is that with its first two dimensions
  // exchanged. Throws std::bad_alloc.
  NewTensor(const int64_t* shape, int64_t dims, DType dtype, bool transposed = false) {
    int64_t sizes[3], strides[3], count = 1;
    for (int64_t i = dims; i-- > 0; count *= shape[i]) {
      sizes[i] = shape[i];
      strides[i] = count;
    }
    if (transposed) {
      std::swap(sizes[0], sizes[1]);
      std::swap(strides[0], strides[1]);
    }
    if (aoti_torch_empty_strided(dims, sizes, strides, number_of(dtype),
                                 aoti_torch_device_type_cpu(), 0, &handle_) != TORCH_SUCCESS)
      throw std::bad_alloc();
    aoti_torch_get_data_ptr(handle_, &data_);
    if (poisoning()) std::memset(data_, 0xff, count * storage_bytes(dtype));
  }
  NewTensor(NewTensor&& other) : handle_(other.handle_), data_(other.data_) {
    other.handle_ = nullptr;
  }
  NewTensor& operator=(NewTensor&& other) {
    std::swap(handle_, other.handle_);
    data_ = other.data_;
    return *this;
  }
  ~NewTensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }

  void* data() const { return data_; }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }

 private:
  static int32_t number_of(DType dtype) {
    switch (dtype) {
#define LSTM_FUSED_CASE(Name, name, Storage, Compute, Torch) \
  case DType::k##Name: return aoti_torch_dtype_##name();
      LSTM_FUSED_DTYPES(LSTM_FUSED_CASE)
#undef LSTM_FUSED_CASE
      default: return -1;
    }
  }

  AtenTensorHandle handle_ = nullptr;
  void* data_;
};

// A list of Python's tensors, in one call for all of them, which takes the handles; null with a
// Python error.
inline PyObject* to_python(const Torch& torch, std::span<const AtenTensorHandle> handles) {
  const Owned capsules(PyList_New(handles.size()));
  for (size_t i = 0; i < handles.size(); ++i) {
    PyObject* capsule = capsules.p ? PyCapsule_New(handles[i], nullptr, nullptr) : nullptr;
    if (!capsule) return nullptr;
    PyList_SetItem(capsules.p, i, capsule);
  }
  return PyObject_CallFunctionObjArgs(torch.from_handles, capsules.p, nullptr);
}

}  // namespace lstm_fused
