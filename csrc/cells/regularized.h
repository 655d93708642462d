// LSTM and GRU with what people add to them: peepholes (Gers & Schmidhuber 2000), clips of the
// pre-activations (ONNX) and of the cell state (TensorFlow, cuDNN), dropout of the candidate
// (Semeniuta et al. 2016, Recurrent Dropout without Memory Loss) and zoneout (Krueger et al. 2017).
//
// A unit that is zoned out keeps its state: the mask is 1 or 0 in training, the probability in
// evaluation. Zoneout of c and of h are independent, as in Krueger et al.: h is of the cell state
// that the step computed, whether or not that state was then zoned out.
#pragma once

#include "described.h"

namespace lstm_fused {
namespace {

struct RegularizedLstm : DescribedCell {
  static constexpr int kGates = 4, kPreacts = 4;  // i f g o
  static constexpr int kCells = 1;
  static constexpr bool kKeepsHidden = true;
  static constexpr int kVectors = 5;  // p_i p_f p_o, and the bounds clip and cell_clip
  static constexpr int kMasks = 3;    // update, zone_c, zone_h

  template <class V>
  static constexpr V forward(const V* preact, const V* vector, const V* mask, const V* prev,
                             V* next) {
    const V bound = vector[3], c_prev = prev[0], h_prev = prev[1];
    const V i = sigmoid(clip(preact[0] + vector[0] * c_prev, bound));
    const V f = sigmoid(clip(preact[1] + vector[1] * c_prev, bound));
    const V g = tanh(clip(preact[2], bound));
    const V c = clip(f * c_prev + i * (mask[0] * g), vector[4]);
    const V o = sigmoid(clip(preact[3] + vector[2] * c, bound));
    // Not c + zone * (c_prev - c), which for zone = 1 is rounded.
    next[0] = mask[1] * c_prev + (1 - mask[1]) * c;
    return mask[2] * h_prev + (1 - mask[2]) * (o * tanh(c));
  }
};

struct RegularizedGru : DescribedCell {
  static constexpr int kGates = 3;    // r z n
  static constexpr int kPreacts = 4;  // n from the input, r, z, n from the hidden state
  static constexpr bool kKeepsHidden = true;
  static constexpr int kVectors = 1;  // clip
  static constexpr int kMasks = 2;    // update, zone_h

  template <class V>
  static constexpr V forward(const V* preact, const V* vector, const V* mask, const V* prev, V*) {
    const V bound = vector[0], h_prev = prev[0];
    const V r = sigmoid(clip(preact[1], bound)), z = sigmoid(clip(preact[2], bound));
    const V n = mask[0] * tanh(clip(preact[0] + r * preact[3], bound));
    return mask[1] * h_prev + (1 - mask[1]) * (n + z * (h_prev - n));
  }
};

}  // namespace
}  // namespace lstm_fused
