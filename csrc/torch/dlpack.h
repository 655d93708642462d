// The part of DLPack's C exchange API that inference.cpp uses, as DLPack 1.3 fixes its layout: a
// view of a torch.Tensor's memory for a few nanoseconds, without torch's headers.
#pragma once

#include <cstdint>

namespace lstm_fused::dlpack {

inline constexpr int32_t kCpu = 1;
inline constexpr uint8_t kUint = 1, kFloat = 2, kBfloat = 4;  // type codes

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

// What the capsule torch.Tensor.__dlpack_c_exchange_api__ points to.
inline constexpr const char* kCapsule = "dlpack_exchange_api";
struct ExchangeApi {
  uint32_t major, minor;
  const ExchangeApi* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  // Fills a view that lives as long as the object does; not 0 with a Python error set.
  int (*dltensor_from_py_object_no_sync)(void* py_object, Tensor* out);
  void* current_work_stream;
};

}  // namespace lstm_fused::dlpack
