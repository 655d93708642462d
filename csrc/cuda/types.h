// Storage types and the conversions to and from the compute dtype. Those of a 16-bit dtype are in
// its .cu file.
#pragma once

#include "../params.h"
#include "ptx/threads.h"

namespace lstm_fused::cuda {

// The type that values of storage type S are computed and accumulated in.
template <class S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

// load(x): a stored value in the compute dtype. round_to<S>(x): rounded to the storage type.
LSTM_FUSED_DEVICE float load(const float& x) {
  return x;
}
LSTM_FUSED_DEVICE double load(const double& x) {
  return x;
}

template <class S>
LSTM_FUSED_DEVICE S round_to(Compute<S> x) {
  return x;
}

}  // namespace lstm_fused::cuda
