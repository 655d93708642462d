// A described cell's forward function as a list of operations, made while the compiler runs:
// forward is called in a constant expression with numbers of the type Traced, each of which stands
// for a step of the trace. derive.h runs the trace, and its derivative.
#pragma once

#include <cstdint>

#include "../compiler.h"
#include "unit.h"

namespace lstm_fused {
namespace {

// The value of each, and its derivatives: rules.h.
enum class Operation : uint8_t {
  kInput,
  kConstant,
  kAdd,
  kSubtract,
  kMultiply,
  kDivide,
  kNegate,
  kSigmoid,
  kTanh,
  kExp,
  kLog,
  kLogSigmoid,
  kRelu,
  kAbs,
  kMax,
  kMin,
  kClip,
  kIfLess,
  kNormalize,
};

struct TraceStep {
  static constexpr int kMaxOperands = 4;
  Operation operation = Operation::kInput;
  int operands[kMaxOperands] = {};  // numbers of earlier steps
  int count = 0;                    // of operands
  double constant = 0;
  int group = 0;  // of kNormalize: those that share a mean
};

struct Trace {
  static constexpr int kMaxSteps = 512;
  TraceStep steps[kMaxSteps] = {};
  int count = 0;
  int groups = 0;

  constexpr int add(const TraceStep& step) {
    if (count == kMaxSteps) throw "this cell has more operations than Trace::kMaxSteps";
    steps[count] = step;
    return count++;
  }
};

// A number inside forward: a step of a trace, or a constant that has no step yet.
class Traced {
 public:
  constexpr Traced(double constant = 0) : constant_(constant) {}
  constexpr Traced(Trace* trace, int step) : trace_(trace), step_(step) {}

  // The number of the step in `trace`, to which a constant is added.
  constexpr int step_in(Trace& trace) const {
    if (!is_constant()) return step_;
    TraceStep step;
    step.operation = Operation::kConstant;
    step.constant = constant_;
    return trace.add(step);
  }

  template <class... Numbers>
  static constexpr Traced record(Operation operation, const Numbers&... operands) {
    Trace* trace = nullptr;
    ((trace = operands.is_constant() ? trace : operands.trace_), ...);
    if ((operands.is_constant() && ...))
      throw "a function of constants alone: compute it outside of forward";
    TraceStep step;
    step.operation = operation;
    ((step.operands[step.count++] = operands.step_in(*trace)), ...);
    return {trace, trace->add(step)};
  }

  // As one more group.
  template <int count>
  static constexpr void normalize(const Traced (&values)[count], Traced (&to)[count]) {
    Trace* trace = nullptr;
    bool constant = true;
    for (const Traced& value : values) {
      trace = value.is_constant() ? trace : value.trace_;
      constant = constant && value.is_constant();
    }
    if (constant) throw "normalize of constants alone";
    if (trace->groups == kMaxUnitGroups)
      throw "this cell normalizes more than kMaxUnitGroups times";
    int steps[count] = {};
    for (int k = 0; k < count; ++k) steps[k] = values[k].step_in(*trace);
    for (int k = 0; k < count; ++k) {
      TraceStep step;
      step.operation = Operation::kNormalize;
      step.operands[step.count++] = steps[k];
      step.group = trace->groups;
      to[k] = {trace, trace->add(step)};
    }
    ++trace->groups;
  }

  // By the number: g++ with its sanitizers knows no address that is not null in a constant.
  constexpr bool is_constant() const { return step_ < 0; }
  constexpr double constant() const { return constant_; }

 private:
  Trace* trace_ = nullptr;
  int step_ = -1;
  double constant_ = 0;
};

constexpr Traced operator+(const Traced& a, const Traced& b) {
  if (a.is_constant() && b.is_constant()) return a.constant() + b.constant();
  return Traced::record(Operation::kAdd, a, b);
}
constexpr Traced operator-(const Traced& a, const Traced& b) {
  if (a.is_constant() && b.is_constant()) return a.constant() - b.constant();
  return Traced::record(Operation::kSubtract, a, b);
}
constexpr Traced operator*(const Traced& a, const Traced& b) {
  if (a.is_constant() && b.is_constant()) return a.constant() * b.constant();
  return Traced::record(Operation::kMultiply, a, b);
}
constexpr Traced operator/(const Traced& a, const Traced& b) {
  if (a.is_constant() && b.is_constant()) return a.constant() / b.constant();
  return Traced::record(Operation::kDivide, a, b);
}
constexpr Traced operator-(const Traced& a) {
  if (a.is_constant()) return -a.constant();
  return Traced::record(Operation::kNegate, a);
}
constexpr Traced& operator+=(Traced& a, const Traced& b) {
  return a = a + b;
}
constexpr Traced& operator-=(Traced& a, const Traced& b) {
  return a = a - b;
}
constexpr Traced& operator*=(Traced& a, const Traced& b) {
  return a = a * b;
}
constexpr Traced& operator/=(Traced& a, const Traced& b) {
  return a = a / b;
}

constexpr Traced sigmoid(const Traced& x) {
  return Traced::record(Operation::kSigmoid, x);
}
constexpr Traced tanh(const Traced& x) {
  return Traced::record(Operation::kTanh, x);
}
constexpr Traced exp(const Traced& x) {
  return Traced::record(Operation::kExp, x);
}
constexpr Traced log(const Traced& x) {
  return Traced::record(Operation::kLog, x);
}
// log(sigmoid(x)), without overflow.
constexpr Traced log_sigmoid(const Traced& x) {
  return Traced::record(Operation::kLogSigmoid, x);
}
constexpr Traced relu(const Traced& x) {
  return Traced::record(Operation::kRelu, x);
}
constexpr Traced abs(const Traced& x) {
  return Traced::record(Operation::kAbs, x);
}
constexpr Traced max(const Traced& a, const Traced& b) {
  return Traced::record(Operation::kMax, a, b);
}
constexpr Traced min(const Traced& a, const Traced& b) {
  return Traced::record(Operation::kMin, a, b);
}
// x in [-bound, bound]; the bound may be infinite.
constexpr Traced clip(const Traced& x, const Traced& bound) {
  return Traced::record(Operation::kClip, x, bound);
}
// Layer normalisation: of all units of a row, `count` values each, every value less their mean and
// divided by their standard deviation, sqrt(variance + epsilon). The cell's last vector is epsilon.
template <int count>
constexpr void normalize(const Traced (&values)[count], Traced (&to)[count]) {
  Traced::normalize(values, to);
}
// a < b ? x : y
constexpr Traced if_less(const Traced& a, const Traced& b, const Traced& x, const Traced& y) {
  return Traced::record(Operation::kIfLess, a, b, x, y);
}

}  // namespace
}  // namespace lstm_fused
