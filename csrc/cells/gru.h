// The GRU cell (Cho et al. 2014) as torch.nn.GRU has it, gates r, z, n: the reset gate multiplies
// what W_hh gives the candidate n, bias included, so that this part is summed separately.
#pragma once

#include "../params.h"

namespace lstm_fused {
namespace {

struct Gru {
  static constexpr int kGates = 3;
  static constexpr int kPreacts = 4;  // n from the input, r, z, n from the hidden state
  static constexpr Carry kCarry = Carry::kHidden;
  static constexpr int input_gate(int j) { return j == 0 ? 2 : j - 1; }
  static constexpr int hidden_gate(int j) { return j; }

  template <class V>
  static LSTM_FUSED_INLINE V forward(V (&preact)[kPreacts], const V& c_prev, V& c) {
    const V r = sigmoid(preact[1]), z = sigmoid(preact[2]), n = tanh(preact[0] + r * preact[3]);
    c = n + z * (c_prev - n);
    preact[0] = n;
    preact[1] = r;
    preact[2] = z;
    return c;
  }

  template <class V>
  static LSTM_FUSED_INLINE V backward(const V (&saved)[kPreacts], const V& c_prev, const V& c,
                                      const V& dh, V& dc, V (&d_preact)[kPreacts]) {
    const V n = saved[0], r = saved[1], z = saved[2];
    const V total = dh + dc;
    const V d_n = total * (1 - z) * (1 - n * n);
    d_preact[0] = d_n;
    d_preact[1] = d_n * saved[3] * r * (1 - r);
    d_preact[2] = total * (c_prev - n) * z * (1 - z);
    d_preact[3] = d_n * r;
    dc = total * z;
    return c;
  }

  template <class V>
  static LSTM_FUSED_INLINE V tangent(const V (&saved)[kPreacts], const V& c_prev, const V&,
                                     const V (&d_preact)[kPreacts], const V& dc_prev, V& dc) {
    const V n = saved[0], r = saved[1], z = saved[2];
    const V d_n =
        (1 - n * n) * (d_preact[0] + saved[3] * r * (1 - r) * d_preact[1] + r * d_preact[3]);
    dc = d_n + (c_prev - n) * z * (1 - z) * d_preact[2] + z * (dc_prev - d_n);
    return dc;
  }
};

}  // namespace
}  // namespace lstm_fused
