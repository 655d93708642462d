// The LSTM with peepholes (Gers & Schmidhuber 2000, Recurrent Nets that Time and Count): the input
// and the forget gate see the cell state before the step, the output gate the one after it.
#pragma once

#include "described.h"

namespace lstm_fused {
namespace {

struct PeepholeLstm : DescribedCell {
  static constexpr int kGates = 4, kPreacts = 4;  // i f g o
  static constexpr int kCells = 1;
  static constexpr int kVectors = 3;  // p_i p_f p_o

  template <class V>
  static constexpr V forward(const V* preact, const V* vector, const V*, const V* prev, V* next) {
    const V i = sigmoid(preact[0] + vector[0] * prev[0]);
    const V f = sigmoid(preact[1] + vector[1] * prev[0]);
    const V c = f * prev[0] + i * tanh(preact[2]);
    next[0] = c;
    return sigmoid(preact[3] + vector[2] * c) * tanh(c);
  }
};

}  // namespace
}  // namespace lstm_fused
