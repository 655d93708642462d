// The simple recurrent cells (Elman 1990) of torch.nn.RNN: h = tanh or relu of one sum.
#pragma once

#include "../params.h"

namespace lstm_fused {
namespace {

struct RnnTanh {
  static constexpr int kGates = 1;
  static constexpr int kSums = 1;
  static constexpr Memory kMemory = Memory::kNone;
  static constexpr int input_gate(int j) { return j; }
  static constexpr int hidden_gate(int j) { return j; }

  template <class V>
  static LSTM_FUSED_INLINE V forward(V (&sum)[kSums], const V&, V&) {
    return sum[0] = tanh(sum[0]);
  }

  template <class V>
  static LSTM_FUSED_INLINE V backward(const V (&saved)[kSums], const V&, const V&, const V& dh, V&,
                                      V (&d_sum)[kSums]) {
    d_sum[0] = dh * (1 - saved[0] * saved[0]);
    return saved[0];
  }

  template <class V>
  static LSTM_FUSED_INLINE V tangent(const V (&saved)[kSums], const V&, const V&,
                                     const V (&d_sum)[kSums], const V&, V&) {
    return (1 - saved[0] * saved[0]) * d_sum[0];
  }
};

struct RnnRelu : RnnTanh {
  // Written so that NaN stays NaN.
  template <class V>
  static LSTM_FUSED_INLINE V forward(V (&sum)[kSums], const V&, V&) {
    return sum[0] = sum[0] <= V{} ? V{} : sum[0];
  }

  template <class V>
  static LSTM_FUSED_INLINE V backward(const V (&saved)[kSums], const V&, const V&, const V& dh, V&,
                                      V (&d_sum)[kSums]) {
    d_sum[0] = saved[0] <= V{} ? V{} : dh;
    return saved[0];
  }

  template <class V>
  static LSTM_FUSED_INLINE V tangent(const V (&saved)[kSums], const V&, const V&,
                                     const V (&d_sum)[kSums], const V&, V&) {
    return saved[0] <= V{} ? V{} : d_sum[0];
  }
};

}  // namespace
}  // namespace lstm_fused
