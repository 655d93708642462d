// csrc/cuda/device.h for the host.
#pragma once

#include "cuda/plan.h"

namespace lstm_fused::cuda {

// A device with few SMs and clusters of 4 CTAs, so that small problems already use several of each.
inline const char* read_device(int, Device& device) {
  device = {9, 0, 32, 227 << 10, 4, 8};
  return nullptr;
}

}  // namespace lstm_fused::cuda
