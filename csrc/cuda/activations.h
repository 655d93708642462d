// sigmoid, tanh, exp, log and log_sigmoid of scalars, which the cells call: csrc/cells/ must be
// included after this header. Exact at 0 and at infinities; NaN stays NaN.
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
LSTM_FUSED_INLINE float exp(float x) {
  return ::expf(x);
}
LSTM_FUSED_INLINE double exp(double x) {
  return ::exp(x);
}
LSTM_FUSED_INLINE float log(float x) {
  return ::logf(x);
}
LSTM_FUSED_INLINE double log(double x) {
  return ::log(x);
}
LSTM_FUSED_INLINE float log_sigmoid(float x) {
  return x > 0 ? -::log1pf(::expf(-x)) : x - ::log1pf(::expf(x));
}
LSTM_FUSED_INLINE double log_sigmoid(double x) {
  return x > 0 ? -::log1p(::exp(-x)) : x - ::log1p(::exp(x));
}

}  // namespace
}  // namespace lstm_fused
