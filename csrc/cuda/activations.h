// sigmoid and tanh of scalars, which the cells call: csrc/cells/ must be included after this
// header. Exact at 0 and at infinities; NaN stays NaN.
#pragma once

#include <cmath>

#include "../params.h"

namespace lstm_fused {
namespace {

LSTM_FUSED_INLINE float sigmoid(float x) {
  return 1.0f / (1.0f + ::expf(-x));
}
LSTM_FUSED_INLINE double sigmoid(double x) {
  return 1.0 / (1.0 + ::exp(-x));
}
LSTM_FUSED_INLINE float tanh(float x) {
  return ::tanhf(x);
}
LSTM_FUSED_INLINE double tanh(double x) {
  return ::tanh(x);
}

}  // namespace
}  // namespace lstm_fused
