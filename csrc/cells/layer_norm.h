// The LSTM and the GRU with layer normalisation (Ba, Kiros & Hinton 2016): the input's and the
// hidden state's products are normalized each on its own, over all gates, and the LSTM's cell state
// before its tanh.
#pragma once

#include "described.h"

namespace lstm_fused {
namespace {

// Vectors: the weights of the four gates for the input's product, those for the hidden state's, the
// four biases, the weight and the bias of the cell state, epsilon.
//   kCarriesNormalized   whether the next step continues the normalized cell state, as in torch's
//                        benchmarks/fastrnns and in TensorFlow Addons, or the one before it, as in
//                        Ba et al. and haste
template <bool kCarriesNormalized>
struct LayerNormLstmOf : DescribedCell {
  static constexpr int kGates = 4, kPreacts = 8;  // i f g o from the input, from the hidden state
  static constexpr int kCells = 1;
  static constexpr int kVectors = 15;

  template <class V>
  static constexpr V forward(const V* preact, const V* vector, const V*, const V* prev, V* next) {
    V x[4] = {preact[0], preact[1], preact[2], preact[3]};
    V h[4] = {preact[4], preact[5], preact[6], preact[7]};
    normalize(x, x);
    normalize(h, h);
    V gate[4];
    for (int j = 0; j < 4; ++j) gate[j] = vector[j] * x[j] + vector[4 + j] * h[j] + vector[8 + j];
    const V i = sigmoid(gate[0]), f = sigmoid(gate[1]), g = tanh(gate[2]), o = sigmoid(gate[3]);
    V c[1] = {f * prev[0] + i * g};
    next[0] = c[0];
    normalize(c, c);
    c[0] = vector[12] * c[0] + vector[13];
    if (kCarriesNormalized) next[0] = c[0];
    return o * tanh(c[0]);
  }
};

struct LayerNormLstm : LayerNormLstmOf<false> {};
struct LayerNormLstmCarried : LayerNormLstmOf<true> {};

// As in haste, the reset gate multiplies the hidden state's part of the candidate. Vectors: the
// weights of the gates r, z, n for the input's product, those for the hidden state's, the biases of
// the one and of the other, epsilon.
struct LayerNormGru : DescribedCell {
  static constexpr int kGates = 3, kPreacts = 6;  // r z n from the input, from the hidden state
  static constexpr bool kKeepsHidden = true;
  static constexpr int kVectors = 13;

  template <class V>
  static constexpr V forward(const V* preact, const V* vector, const V*, const V* prev, V* next) {
    V x[3] = {preact[0], preact[1], preact[2]}, h[3] = {preact[3], preact[4], preact[5]};
    normalize(x, x);
    normalize(h, h);
    for (int j = 0; j < 3; ++j) {
      x[j] = vector[j] * x[j] + vector[6 + j];
      h[j] = vector[3 + j] * h[j] + vector[9 + j];
    }
    const V r = sigmoid(x[0] + h[0]), z = sigmoid(x[1] + h[1]), n = tanh(x[2] + r * h[2]);
    return next[0] = n + z * (prev[0] - n);
  }
};

}  // namespace
}  // namespace lstm_fused
