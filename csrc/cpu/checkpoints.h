// The backward pass of a call whose forward pass kept states at checkpoints alone (ForwardParams).
#pragma once

#include "kernels.h"
#include "scratch.h"

namespace lstm_fused {

// From the last checkpoint to the first: the forward pass of the steps between two of them again,
// then their backward pass. False as of Kernel::backward. Throws std::bad_alloc.
bool backward_from_checkpoints(const Problem& problem, const Plan& forward, const Plan& backward,
                               const BackwardParams& params, Scratch& scratch);

}  // namespace lstm_fused
