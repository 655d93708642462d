// The quasi-recurrent cell with fo-pooling (Bradbury et al. 2017, Quasi-Recurrent Neural Networks):
// gates are of the input, or of a window of inputs, so that w_hh has no column.
#pragma once

#include "described.h"

namespace lstm_fused {
namespace {

struct Qrnn : DescribedCell {
  static constexpr int kGates = 3, kPreacts = 3;  // z f o
  static constexpr int kCells = 1;

  template <class V>
  static constexpr V forward(const V* preact, const V*, const V*, const V* prev, V* next) {
    const V z = tanh(preact[0]), c = z + sigmoid(preact[1]) * (prev[0] - z);
    next[0] = c;
    return sigmoid(preact[2]) * c;
  }
};

}  // namespace
}  // namespace lstm_fused
