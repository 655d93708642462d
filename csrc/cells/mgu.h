// The minimal gated unit (Zhou et al. 2016): one gate, which resets the hidden state before the
// candidate's product and updates it.
#pragma once

#include "described.h"

namespace lstm_fused {
namespace {

struct Mgu : DescribedCell {
  static constexpr int kGates = 2, kPreacts = 2;  // f n
  static constexpr bool kKeepsHidden = true;

  template <class V>
  static constexpr V operand(const V* preact, const V*, const V*, const V* prev) {
    return sigmoid(preact[0]) * prev[0];
  }

  template <class V>
  static constexpr V forward(const V* preact, const V*, const V*, const V* prev, V*) {
    const V f = sigmoid(preact[0]);
    return prev[0] + f * (tanh(preact[1]) - prev[0]);
  }
};

}  // namespace
}  // namespace lstm_fused
