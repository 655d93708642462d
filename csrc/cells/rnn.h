// The simple recurrent cells (Elman 1990) of torch.nn.RNN: h = tanh or relu of one sum.
#pragma once

#include "../params.h"

namespace lstm_fused {
namespace {

struct RnnTanh {
  static constexpr int kGates = 1;
  static constexpr int kPreacts = 1;
  static constexpr Carry kCarry = Carry::kNone;
  static constexpr int input_gate(int j) { return j; }
  static constexpr int hidden_gate(int j) { return j; }

  template <class V>
  static LSTM_FUSED_INLINE V forward(V (&preact)[kPreacts], const V&, V&) {
    return preact[0] = tanh(preact[0]);
  }

  template <class V>
  static LSTM_FUSED_INLINE V backward(const V (&saved)[kPreacts], const V&, const V&, const V& dh,
                                      V&, V (&d_preact)[kPreacts]) {
    d_preact[0] = dh * (1 - saved[0] * saved[0]);
    return saved[0];
  }

  template <class V>
  static LSTM_FUSED_INLINE V tangent(const V (&saved)[kPreacts], const V&, const V&,
                                     const V (&d_preact)[kPreacts], const V&, V&) {
    return (1 - saved[0] * saved[0]) * d_preact[0];
  }
};

struct RnnRelu : RnnTanh {
  // Written so that NaN stays NaN.
  template <class V>
  static LSTM_FUSED_INLINE V forward(V (&preact)[kPreacts], const V&, V&) {
    return preact[0] = preact[0] <= V{} ? V{} : preact[0];
  }

  template <class V>
  static LSTM_FUSED_INLINE V backward(const V (&saved)[kPreacts], const V&, const V&, const V& dh,
                                      V&, V (&d_preact)[kPreacts]) {
    d_preact[0] = saved[0] <= V{} ? V{} : dh;
    return saved[0];
  }

  template <class V>
  static LSTM_FUSED_INLINE V tangent(const V (&saved)[kPreacts], const V&, const V&,
                                     const V (&d_preact)[kPreacts], const V&, V&) {
    return saved[0] <= V{} ? V{} : d_preact[0];
  }
};

}  // namespace
}  // namespace lstm_fused
