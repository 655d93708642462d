// The independently recurrent cell (Li et al. 2018, Independently Recurrent Neural Network): a unit
// sees no hidden unit but itself, so that w_hh has no column.
#pragma once

#include "described.h"

namespace lstm_fused {
namespace {

struct IndRnn : DescribedCell {
  static constexpr int kGates = 1, kPreacts = 1;
  static constexpr bool kKeepsHidden = true;
  static constexpr int kVectors = 1;  // u

  template <class V>
  static constexpr V forward(const V* preact, const V* vector, const V*, const V* prev, V*) {
    return relu(preact[0] + vector[0] * prev[0]);
  }
};

struct IndRnnTanh : IndRnn {
  template <class V>
  static constexpr V forward(const V* preact, const V* vector, const V*, const V* prev, V*) {
    return tanh(preact[0] + vector[0] * prev[0]);
  }
};

}  // namespace
}  // namespace lstm_fused
