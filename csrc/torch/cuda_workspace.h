// The memory that a pass works in on a CUDA device, beside its tensors: one allocation, parts of
// which are reserved first and have an address once it is made.
#pragma once

#include "../cuda/kernels.h"
#include "../poison.h"
#include "cuda_products.h"

namespace lstm_fused::cuda {

class Workspace {
 public:
  // An offset in bytes.
  using Slot = int64_t;

  // Parts that begin as zeros are reserved before those that need not.
  Slot reserve_zeros(int64_t bytes) {
    const Slot slot = reserve(bytes);
    zeros_ = total_;
    return slot;
  }
  Slot reserve(int64_t bytes) {
    const Slot slot = total_;
    total_ += round_up(bytes, 256);
    return slot;
  }

  void allocate(const Tensor& like, void* stream) {
    memory_ = lstm_fused::allocate({total_}, ScalarType::Byte, like);
    base_ = static_cast<char*>(memory_->data_ptr());
    check(fill_async(base_, 0, zeros_, stream), "workspace");
    if (poisoning()) check(fill_async(base_ + zeros_, 0xff, total_ - zeros_, stream), "poison");
  }

  char* at(Slot slot) const { return base_ + slot; }

 private:
  int64_t total_ = 0, zeros_ = 0;
  std::optional<Tensor> memory_;
  char* base_ = nullptr;
};

}  // namespace lstm_fused::cuda
