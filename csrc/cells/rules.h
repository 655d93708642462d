// The value of each operation of a trace, and its gradients by the rules of torch's autograd. V is
// SIMD lanes or a scalar; sigmoid, tanh, exp, log and log_sigmoid of V must be declared before this
// header is included.
//   value(operands...)
//   gradient<k>(d, y, operands...)  d times the derivative by operand k, where y is the value
#pragma once

#include "trace.h"

namespace lstm_fused {
namespace {

// Of operand k; kClip's bound and the numbers that kIfLess compares have none.
constexpr bool has_gradient(Operation operation, int k) {
  return operation == Operation::kClip ? k == 0 : operation == Operation::kIfLess ? k >= 2 : true;
}

template <Operation>
struct Rule;

template <>
struct Rule<Operation::kAdd> {
  template <class V>
  static LSTM_FUSED_INLINE V value(const V& a, const V& b) {
    return a + b;
  }
  template <int k, class V>
  static LSTM_FUSED_INLINE V gradient(const V& d, const V&, const V&, const V&) {
    return d;
  }
};

template <>
struct Rule<Operation::kSubtract> {
  template <class V>
  static LSTM_FUSED_INLINE V value(const V& a, const V& b) {
    return a - b;
  }
  template <int k, class V>
  static LSTM_FUSED_INLINE V gradient(const V& d, const V&, const V&, const V&) {
    return k == 0 ? d : -d;
  }
};

template <>
struct Rule<Operation::kMultiply> {
  template <class V>
  static LSTM_FUSED_INLINE V value(const V& a, const V& b) {
    return a * b;
  }
  template <int k, class V>
  static LSTM_FUSED_INLINE V gradient(const V& d, const V&, const V& a, const V& b) {
    return k == 0 ? d * b : d * a;
  }
};

template <>
struct Rule<Operation::kDivide> {
  template <class V>
  static LSTM_FUSED_INLINE V value(const V& a, const V& b) {
    return a / b;
  }
  template <int k, class V>
  static LSTM_FUSED_INLINE V gradient(const V& d, const V& y, const V&, const V& b) {
    return k == 0 ? d / b : -(d / b) * y;
  }
};

template <>
struct Rule<Operation::kNegate> {
  template <class V>
  static LSTM_FUSED_INLINE V value(const V& x) {
    return -x;
  }
  template <int k, class V>
  static LSTM_FUSED_INLINE V gradient(const V& d, const V&, const V&) {
    return -d;
  }
};

template <>
struct Rule<Operation::kSigmoid> {
  template <class V>
  static LSTM_FUSED_INLINE V value(const V& x) {
    return sigmoid(x);
  }
  template <int k, class V>
  static LSTM_FUSED_INLINE V gradient(const V& d, const V& y, const V&) {
    return d * y * (1 - y);
  }
};

template <>
struct Rule<Operation::kTanh> {
  template <class V>
  static LSTM_FUSED_INLINE V value(const V& x) {
    return tanh(x);
  }
  template <int k, class V>
  static LSTM_FUSED_INLINE V gradient(const V& d, const V& y, const V&) {
    return d * (1 - y * y);
  }
};

template <>
struct Rule<Operation::kExp> {
  template <class V>
  static LSTM_FUSED_INLINE V value(const V& x) {
    return exp(x);
  }
  template <int k, class V>
  static LSTM_FUSED_INLINE V gradient(const V& d, const V& y, const V&) {
    return d * y;
  }
};

template <>
struct Rule<Operation::kLog> {
  template <class V>
  static LSTM_FUSED_INLINE V value(const V& x) {
    return log(x);
  }
  template <int k, class V>
  static LSTM_FUSED_INLINE V gradient(const V& d, const V&, const V& x) {
    return d / x;
  }
};

template <>
struct Rule<Operation::kLogSigmoid> {
  template <class V>
  static LSTM_FUSED_INLINE V value(const V& x) {
    return log_sigmoid(x);
  }
  template <int k, class V>
  static LSTM_FUSED_INLINE V gradient(const V& d, const V&, const V& x) {
    return d * sigmoid(V(-x));
  }
};

// NaN stays NaN in the values below: a comparison with it is false.
template <>
struct Rule<Operation::kRelu> {
  template <class V>
  static LSTM_FUSED_INLINE V value(const V& x) {
    return x <= V{} ? V{} : x;
  }
  template <int k, class V>
  static LSTM_FUSED_INLINE V gradient(const V& d, const V& y, const V&) {
    return y <= V{} ? V{} : d;
  }
};

template <>
struct Rule<Operation::kAbs> {
  template <class V>
  static LSTM_FUSED_INLINE V value(const V& x) {
    return x <= V{} ? 0 - x : x;  // 0 - 0, so that no zero has a sign
  }
  template <int k, class V>
  static LSTM_FUSED_INLINE V gradient(const V& d, const V&, const V& x) {
    const V one = 1 - V{}, below = x < V{} ? -one : V{};
    return d * (x > V{} ? one : below);
  }
};

template <>
struct Rule<Operation::kMax> {
  template <class V>
  static LSTM_FUSED_INLINE V value(const V& a, const V& b) {
    const V largest = a < b ? b : a;
    return b == b ? largest : b;
  }
  template <int k, class V>
  static LSTM_FUSED_INLINE V gradient(const V& d, const V&, const V& a, const V& b) {
    const V shared = a == b ? d / 2 : d;
    return k == 0 ? (a < b ? V{} : shared) : (a > b ? V{} : shared);
  }
};

template <>
struct Rule<Operation::kMin> {
  template <class V>
  static LSTM_FUSED_INLINE V value(const V& a, const V& b) {
    const V smallest = a > b ? b : a;
    return b == b ? smallest : b;
  }
  template <int k, class V>
  static LSTM_FUSED_INLINE V gradient(const V& d, const V&, const V& a, const V& b) {
    const V shared = a == b ? d / 2 : d;
    return k == 0 ? (a > b ? V{} : shared) : (a < b ? V{} : shared);
  }
};

template <>
struct Rule<Operation::kClip> {
  template <class V>
  static LSTM_FUSED_INLINE V value(const V& x, const V& bound) {
    const V above = x < -bound ? -bound : x, clipped = above > bound ? bound : above;
    return bound == bound ? clipped : bound;
  }
  template <int k, class V>
  static LSTM_FUSED_INLINE V gradient(const V& d, const V&, const V& x, const V& bound) {
    const V above = x >= -bound ? d : V{};
    return x <= bound ? above : V{};
  }
};

template <>
struct Rule<Operation::kIfLess> {
  template <class V>
  static LSTM_FUSED_INLINE V value(const V& a, const V& b, const V& x, const V& y) {
    return a < b ? x : y;
  }
  template <int k, class V>
  static LSTM_FUSED_INLINE V gradient(const V& d, const V&, const V& a, const V& b, const V&,
                                      const V&) {
    return k == 2 ? (a < b ? d : V{}) : (a < b ? V{} : d);
  }
};

}  // namespace
}  // namespace lstm_fused
