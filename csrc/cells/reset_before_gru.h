// The GRU of Cho et al. 2014, whose reset gate multiplies the hidden state before the candidate's
// product; Keras with reset_after=False, ONNX with linear_before_reset=0.
#pragma once

#include "described.h"

namespace lstm_fused {
namespace {

struct ResetBeforeGru : DescribedCell {
  static constexpr int kGates = 3, kPreacts = 3;  // r z n
  static constexpr bool kKeepsHidden = true;

  template <class V>
  static constexpr V operand(const V* preact, const V*, const V*, const V* prev) {
    return sigmoid(preact[0]) * prev[0];
  }

  template <class V>
  static constexpr V forward(const V* preact, const V*, const V*, const V* prev, V*) {
    const V z = sigmoid(preact[1]), n = tanh(preact[2]);
    return n + z * (prev[0] - n);
  }
};

}  // namespace
}  // namespace lstm_fused
