// The cells of regularized.h with one mask of the hidden state for all steps of a row (Gal &
// Ghahramani 2016, A Theoretically Grounded Application of Dropout in Recurrent Neural Networks).
//
// What a step returns is the masked h, which is what W_hh multiplies. The h that is the layer's
// output is the last cell state.
#pragma once

#include "described.h"

namespace lstm_fused {
namespace {

struct VariationalLstm : DescribedCell {
  static constexpr int kGates = 4, kPreacts = 4;  // i f g o
  static constexpr int kCells = 2;                // c, h
  static constexpr int kVectors = 5;              // p_i p_f p_o, and the bounds clip and cell_clip
  static constexpr int kMasks = 4;                // update, zone_c, zone_h, hidden

  template <class V>
  static constexpr V forward(const V* preact, const V* vector, const V* mask, const V* prev,
                             V* next) {
    const V bound = vector[3], c_prev = prev[0], h_prev = prev[1];
    const V i = sigmoid(clip(preact[0] + vector[0] * c_prev, bound));
    const V f = sigmoid(clip(preact[1] + vector[1] * c_prev, bound));
    const V g = tanh(clip(preact[2], bound));
    const V c = clip(f * c_prev + i * (mask[0] * g), vector[4]);
    const V o = sigmoid(clip(preact[3] + vector[2] * c, bound));
    next[0] = mask[1] * c_prev + (1 - mask[1]) * c;
    next[1] = mask[2] * h_prev + (1 - mask[2]) * (o * tanh(c));
    return mask[3] * next[1];
  }
};

struct VariationalGru : DescribedCell {
  static constexpr int kGates = 3;    // r z n
  static constexpr int kPreacts = 4;  // n from the input, r, z, n from the hidden state
  static constexpr int kCells = 1;    // h
  static constexpr int kVectors = 1;  // clip
  static constexpr int kMasks = 3;    // update, zone_h, hidden

  template <class V>
  static constexpr V forward(const V* preact, const V* vector, const V* mask, const V* prev,
                             V* next) {
    const V bound = vector[0], h_prev = prev[0];
    const V r = sigmoid(clip(preact[1], bound)), z = sigmoid(clip(preact[2], bound));
    const V n = mask[0] * tanh(clip(preact[0] + r * preact[3], bound));
    next[0] = mask[1] * h_prev + (1 - mask[1]) * (n + z * (h_prev - n));
    return mask[2] * next[0];
  }
};

}  // namespace
}  // namespace lstm_fused
