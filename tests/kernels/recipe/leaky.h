// A leaky integrator, the cell that tests/kernels/test_recipe.py adds by CONTRIBUTING's recipe:
// c = c_prev / 2 + tanh(preact) / 2, h = c.
#pragma once

#include "../params.h"

namespace lstm_fused {
namespace {

struct Leaky {
  static constexpr int kGates = 1;
  static constexpr int kPreacts = 1;
  static constexpr Carry kCarry = Carry::kCell;
  static constexpr int input_gate(int j) { return j; }
  static constexpr int hidden_gate(int j) { return j; }

  template <class V>
  static LSTM_FUSED_INLINE V forward(V (&preact)[kPreacts], const V& c_prev, V& c) {
    preact[0] = tanh(preact[0]);
    c = (c_prev + preact[0]) / 2;
    return c;
  }

  template <class V>
  static LSTM_FUSED_INLINE V backward(const V (&saved)[kPreacts], const V&, const V& c, const V& dh,
                                      V& dc, V (&d_preact)[kPreacts]) {
    const V total = (dh + dc) / 2;
    d_preact[0] = total * (1 - saved[0] * saved[0]);
    dc = total;
    return c;
  }

  template <class V>
  static LSTM_FUSED_INLINE V tangent(const V (&saved)[kPreacts], const V&, const V&,
                                     const V (&d_preact)[kPreacts], const V& dc_prev, V& dc) {
    dc = (dc_prev + (1 - saved[0] * saved[0]) * d_preact[0]) / 2;
    return dc;
  }
};

}  // namespace
}  // namespace lstm_fused
