// Storage types and the conversions to and from the compute dtype.
#pragma once

#include "../params.h"
#include "ptx/conversions.h"
#include "ptx/threads.h"

namespace lstm_fused::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

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
LSTM_FUSED_DEVICE float load(const BFloat16& x) {
  return float_of_bfloat16(x.bits);
}
LSTM_FUSED_DEVICE float load(const Half& x) {
  return float_of_float16(x.bits);
}

template <class S>
LSTM_FUSED_DEVICE S round_to(Compute<S> x) {
  return x;
}
template <>
LSTM_FUSED_DEVICE BFloat16 round_to<BFloat16>(float x) {
  return {bfloat16_of_float(x)};
}
template <>
LSTM_FUSED_DEVICE Half round_to<Half>(float x) {
  return {float16_of_float(x)};
}

}  // namespace lstm_fused::cuda
