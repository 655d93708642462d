// The LSTM with a coupled input and forget gate, f = 1 - i (CIFG of Greff et al. 2017, LSTM: A
// Search Space Odyssey; ONNX's input_forget).
#pragma once

#include "described.h"

namespace lstm_fused {
namespace {

struct CoupledLstm : DescribedCell {
  static constexpr int kGates = 3, kPreacts = 3;  // i g o
  static constexpr int kCells = 1;

  template <class V>
  static constexpr V forward(const V* preact, const V*, const V*, const V* prev, V* next) {
    const V c = prev[0] + sigmoid(preact[0]) * (tanh(preact[1]) - prev[0]);
    next[0] = c;
    return sigmoid(preact[2]) * tanh(c);
  }
};

}  // namespace
}  // namespace lstm_fused
