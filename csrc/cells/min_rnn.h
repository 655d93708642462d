// minGRU and minLSTM (Feng et al. 2024, Were RNNs All We Needed?): gates are of the input alone, so
// that w_hh has no column. As in the paper's computation by logarithms, the candidate is g(x),
// which is positive.
#pragma once

#include "described.h"

namespace lstm_fused {
namespace {

struct MinGru : DescribedCell {
  static constexpr int kGates = 2, kPreacts = 2;  // z, candidate
  static constexpr bool kKeepsHidden = true;

  template <class V>
  static constexpr V forward(const V* preact, const V*, const V*, const V* prev, V*) {
    return prev[0] + sigmoid(preact[0]) * (g(preact[1]) - prev[0]);
  }

  template <class V>
  static constexpr V g(const V& x) {
    return if_less(x, 0, sigmoid(x), x + 0.5);
  }
};

struct MinLstm : DescribedCell {
  static constexpr int kGates = 3, kPreacts = 3;  // f i, candidate
  static constexpr bool kKeepsHidden = true;

  template <class V>
  static constexpr V forward(const V* preact, const V*, const V*, const V* prev, V*) {
    // sigmoid(f) / (sigmoid(f) + sigmoid(i)), which would be 0 / 0 where both are far below 0.
    const V f = sigmoid(log_sigmoid(preact[0]) - log_sigmoid(preact[1]));
    const V candidate = MinGru::g(preact[2]);
    return candidate + f * (prev[0] - candidate);
  }
};

}  // namespace
}  // namespace lstm_fused
