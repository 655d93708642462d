// The LSTM cell (Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000), in
// torch's gate order i, f, g, o. V is the value a kernel computes with: SIMD lanes or a scalar.
// sigmoid(V) and tanh(V) must be declared before this header is included.
#pragma once

#include "../params.h"

namespace lstm_fused {
namespace {

struct Lstm {
  static constexpr int kGates = 4;
  static constexpr int kPreacts = 4;
  static constexpr Carry kCarry = Carry::kCell;
  static constexpr int input_gate(int j) { return j; }
  static constexpr int hidden_gate(int j) { return j; }

  template <class V>
  static LSTM_FUSED_INLINE V forward(V (&gate)[kPreacts], const V& c_prev, V& c) {
    gate[0] = sigmoid(gate[0]);
    gate[1] = sigmoid(gate[1]);
    gate[2] = tanh(gate[2]);
    gate[3] = sigmoid(gate[3]);
    c = gate[1] * c_prev + gate[0] * gate[2];
    return gate[3] * tanh(c);
  }

  template <class V>
  static LSTM_FUSED_INLINE V backward(const V (&gate)[kPreacts], const V& c_prev, const V& c,
                                      const V& dh, V& dc, V (&d_preact)[kPreacts]) {
    const V i = gate[0], f = gate[1], g = gate[2], o = gate[3];
    const V tanh_c = tanh(c);
    const V dc_total = dc + dh * o * (1 - tanh_c * tanh_c);
    d_preact[0] = dc_total * g * i * (1 - i);
    d_preact[1] = dc_total * c_prev * f * (1 - f);
    d_preact[2] = dc_total * i * (1 - g * g);
    d_preact[3] = dh * tanh_c * o * (1 - o);
    dc = dc_total * f;
    return o * tanh_c;
  }

  template <class V>
  static LSTM_FUSED_INLINE V tangent(const V (&gate)[kPreacts], const V& c_prev, const V& c,
                                     const V (&d_preact)[kPreacts], const V& dc_prev, V& dc) {
    const V i = gate[0], f = gate[1], g = gate[2], o = gate[3];
    const V tanh_c = tanh(c);
    dc = f * dc_prev + c_prev * f * (1 - f) * d_preact[1] + g * i * (1 - i) * d_preact[0] +
         i * (1 - g * g) * d_preact[2];
    return tanh_c * o * (1 - o) * d_preact[3] + o * (1 - tanh_c * tanh_c) * dc;
  }
};

}  // namespace
}  // namespace lstm_fused
