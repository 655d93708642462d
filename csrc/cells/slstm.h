// sLSTM (Beck et al. 2024, xLSTM: Extended Long Short-Term Memory): exponential gates. c and n are
// kept divided by exp(m), so that they do not overflow, and h does not depend on m. Heads are in
// w_hh, which is block-diagonal.
//
// Before the first step c, n and m are 0, and that m is not compared with i, as in the authors'
// packages xlstm and FlashRNN. After a step n is at least 1.
#pragma once

#include "described.h"

namespace lstm_fused {
namespace {

struct Slstm : DescribedCell {
  static constexpr int kGates = 4, kPreacts = 4;  // i f z o
  static constexpr int kCells = 3;                // c n m

  template <class V>
  static constexpr V forward(const V* preact, const V*, const V*, const V* prev, V* next) {
    const V forget = log_sigmoid(preact[1]) + prev[2];
    const V m = if_less(0, abs(prev[1]), max(preact[0], forget), preact[0]);
    // A first step may have forget above m, by as much as the exponential overflows.
    const V i = exp(min(preact[0] - m, 0)), f = exp(min(forget - m, 0));
    const V c = f * prev[0] + i * tanh(preact[2]), n = f * prev[1] + i;
    next[0] = c;
    next[1] = n;
    next[2] = m;
    return sigmoid(preact[3]) * c / n;
  }
};

}  // namespace
}  // namespace lstm_fused
