// The simple recurrent unit (Lei et al. 2018, Simple Recurrent Units for Highly Parallelizable
// Recurrence): gates are of the input and of the unit's own cell state before the step, so that
// w_hh has no column.
#pragma once

#include "described.h"

namespace lstm_fused {
namespace {

struct Sru : DescribedCell {
  static constexpr int kGates = 4, kPreacts = 4;  // candidate, f, r, skip
  static constexpr int kCells = 1;
  static constexpr int kVectors = 2;  // v_f v_r

  template <class V>
  static constexpr V forward(const V* preact, const V* vector, const V*, const V* prev, V* next) {
    const V candidate = preact[0], skip = preact[3];
    const V f = sigmoid(preact[1] + vector[0] * prev[0]);
    const V r = sigmoid(preact[2] + vector[1] * prev[0]);
    const V c = candidate + f * (prev[0] - candidate);
    next[0] = c;
    return skip + r * (c - skip);
  }
};

}  // namespace
}  // namespace lstm_fused
