// Makes a CUDA device the current one for a scope; torch's current stream there.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "../cuda/runtime.h"
#include "stable.h"

namespace lstm_fused::cuda {

#if defined(LSTM_FUSED_EMULATION)
using Guard = DeviceGuard;
#else
// Torch's guard knows the devices that this process has not used yet; the CUDA runtime linked into
// this library is told too.
class Guard {
 public:
  explicit Guard(int device) : guard_(device) { make_current(device); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};
#endif

// Torch's current stream of the device that `like` is on.
inline void* stream_of([[maybe_unused]] const Tensor& like) {
  void* stream = nullptr;
#if !defined(LSTM_FUSED_EMULATION)
  const int device = like.get_device_index();
  LSTM_FUSED_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == TORCH_SUCCESS,
                   "torch has no current stream for device ", device);
#endif
  return stream;
}

}  // namespace lstm_fused::cuda
