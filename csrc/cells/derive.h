// The functions of a described cell: its forward function, and the backward function that follows
// from it by reverse-mode differentiation. Both run the cell's trace (trace.h), which is known to
// the compiler, as is what each step adds to which gradient: the result is straight-line code whose
// arrays lie in registers.
//
// This header is included after the one that declares sigmoid, tanh, exp, log and log_sigmoid of V
// (cpu/activations.h, cuda/activations.h): V is SIMD lanes or a scalar.
#pragma once

#include <cstring>
#include <utility>

#include "described.h"
#include "rules.h"
#include "unit.h"

namespace lstm_fused {
namespace {

// What a step of a trace does to the gradient of an operand. The first that reaches a gradient
// assigns it: an addition to zero would remain in the code.
enum class Reach : uint8_t { kNone, kAssign, kAdd };

template <class Cell>
struct Derivation {
  static constexpr int kPreacts = Cell::kPreacts, kVectors = Cell::kVectors;
  static constexpr int kMasks = Cell::kMasks, kStates = Cell::kCells + Cell::kKeepsHidden;
  // Inputs are the first steps.
  static constexpr int kFirstVector = kPreacts, kFirstMask = kFirstVector + kVectors;
  static constexpr int kFirstPrev = kFirstMask + kMasks, kInputs = kFirstPrev + kStates;

  static_assert(1 <= Cell::kGates && Cell::kGates <= 4, "the cell's kGates must be 1 to 4");
  static_assert(Cell::kGates <= kPreacts && kPreacts <= 2 * Cell::kGates,
                "the cell's kPreacts must be kGates to 2 * kGates");
  static_assert(kVectors >= 0 && kMasks >= 0 && Cell::kCells >= 0,
                "the cell's counts must not be negative");

  Trace trace;
  int h = 0;
  int next[kStates + 1] = {};
  bool active[Trace::kMaxSteps] = {};  // depends on an input that has a gradient
  bool reached[Trace::kMaxSteps] = {};
  Reach h_reach = Reach::kNone, next_reach[kStates + 1] = {};
  Reach operand_reach[Trace::kMaxSteps][TraceStep::kMaxOperands] = {};
  int levels = 0;
  UnitGroup group[kMaxUnitGroups] = {};

  constexpr Derivation() {
    run_forward();
    for (int i = 0; i < trace.count; ++i) {
      const TraceStep& step = trace.steps[i];
      active[i] = i < kInputs && !(i >= kFirstMask && i < kFirstPrev);
      for (int k = 0; k < step.count; ++k)
        active[i] |= active[step.operands[k]] && has_gradient(step.operation, k);
    }
    find_levels();
    h_reach = reach(h);
    for (int k = 0; k < kStates; ++k) next_reach[k] = reach(next[k]);
    for (int i = trace.count - 1; i >= 0; --i)
      for (int k = 0; reached[i] && k < trace.steps[i].count; ++k)
        if (has_gradient(trace.steps[i].operation, k))
          operand_reach[i][k] = reach(trace.steps[i].operands[k]);
  }

  // The state that step i is, which backward reads instead of computing it again; or -1.
  constexpr int state_of(int i) const {
    for (int k = 0; k < kStates; ++k)
      if (next[k] == i && i >= kInputs) return k;
    return -1;
  }

 private:
  constexpr void run_forward() {
    Traced inputs[kInputs], values[kStates + 1];
    for (int i = 0; i < kInputs; ++i) inputs[i] = Traced(&trace, trace.add({}));
    const Traced* all = inputs;
    const Traced result = Cell::forward(all, all + kFirstVector, all + kFirstMask, all + kFirstPrev,
                                        static_cast<Traced*>(values));
    h = result.step_in(trace);
    for (int k = 0; k < kStates; ++k) next[k] = k < Cell::kCells ? values[k].step_in(trace) : h;
  }

  constexpr void find_levels() {
    int level[Trace::kMaxSteps] = {};
    for (int i = 0, known = 0; i < trace.count; ++i) {
      const TraceStep& step = trace.steps[i];
      if (step.operation != Operation::kNormalize) {
        for (int k = 0; k < step.count; ++k)
          level[i] = level[i] < level[step.operands[k]] ? level[step.operands[k]] : level[i];
        continue;
      }
      UnitGroup& own = group[step.group];
      for (int j = i; step.group == known && j < trace.count; ++j) {  // the first of its group
        const TraceStep& other = trace.steps[j];
        if (other.operation != Operation::kNormalize || other.group != known) continue;
        const int needed = level[other.operands[0]];
        own.level = own.level < needed ? needed : own.level;
        ++own.count;
      }
      known = step.group + 1;
      level[i] = own.level + 1;
      levels = levels < level[i] ? level[i] : levels;
    }
  }

  constexpr Reach reach(int step) {
    if (!active[step]) return Reach::kNone;
    const Reach how = reached[step] ? Reach::kAdd : Reach::kAssign;
    reached[step] = true;
    return how;
  }
};

template <class Cell>
inline constexpr Derivation<Cell> kDerivation;

// The function `operand` of a cell that has one as a cell, whose h is the operand.
template <class Cell>
struct OperandOf : Cell {
  template <class V>
  static constexpr V forward(const V* preact, const V* vector, const V* mask, const V* prev,
                             V* next) {
    for (int k = 0; k < Cell::kCells; ++k) next[k] = prev[k];
    return Cell::operand(preact, vector, mask, prev);
  }
};

template <class V>
LSTM_FUSED_INLINE auto scalar_of(const V& v) {
  return v[0] + 0;
}
LSTM_FUSED_INLINE float scalar_of(float s) {
  return s;
}
LSTM_FUSED_INLINE double scalar_of(double s) {
  return s;
}

template <class V>
using ScalarOf = decltype(scalar_of(V{}));

template <Reach how, class V>
LSTM_FUSED_INLINE void contribute(V& sum, const V& d) {
  if constexpr (how == Reach::kAssign) sum = d;
  if constexpr (how == Reach::kAdd) sum = sum + d;
}

template <int... i>
using Numbers = std::integer_sequence<int, i...>;
template <int count>
using FirstNumbers = std::make_integer_sequence<int, count>;

// Runs the steps of a cell's trace, and of its derivative, on values of V.
template <class Cell, class V>
struct TraceRunner {
  using D = Derivation<Cell>;
  using A = ScalarOf<V>;
  // Numbers of their own: of a GPU's code none reads the derivation, which is the host's.
  static constexpr int kSteps = kDerivation<Cell>.trace.count, kH = kDerivation<Cell>.h;
  template <int k>
  static constexpr int kNext = kDerivation<Cell>.next[k];
  template <int step>
  static constexpr bool kReached = kDerivation<Cell>.reached[step];

  V value[kSteps];
  V gradient[kSteps];
  const A* statistics;  // of the groups that are normalized (unit.h)

  LSTM_FUSED_INLINE void put_inputs(const V* preact, const V* vector, const V* mask,
                                    const V* prev) {
    LSTM_FUSED_UNROLLED_FOR (int k = 0; k < D::kPreacts; ++k) value[k] = preact[k];
    LSTM_FUSED_UNROLLED_FOR (int k = 0; k < D::kVectors; ++k)
      value[D::kFirstVector + k] = vector[k];
    LSTM_FUSED_UNROLLED_FOR (int k = 0; k < D::kMasks; ++k) value[D::kFirstMask + k] = mask[k];
    LSTM_FUSED_UNROLLED_FOR (int k = 0; k < D::kStates; ++k) value[D::kFirstPrev + k] = prev[k];
  }

  template <int i, int... k>
  LSTM_FUSED_INLINE void compute(Numbers<k...>) {
    constexpr TraceStep step = kDerivation<Cell>.trace.steps[i];
    if constexpr (step.operation == Operation::kNormalize) {
      const A* of_group = statistics + 4 * step.group;
      value[i] = (value[step.operands[0]] - of_group[0]) * of_group[1];
    } else {
      value[i] = Rule<step.operation>::value(value[step.operands[k]]...);
    }
  }
  // next: the states after the step where they are known, else null.
  template <bool known, int i>
  LSTM_FUSED_INLINE void compute_step(const V* next) {
    constexpr TraceStep step = kDerivation<Cell>.trace.steps[i];
    constexpr int state = kDerivation<Cell>.state_of(i);
    if constexpr (step.operation == Operation::kConstant) {
      value[i] = static_cast<A>(step.constant) - V{};  // of all lanes; V{} + -0.0 would be 0
    } else if constexpr (known && state >= 0) {
      value[i] = next[state];
    } else if constexpr (i >= D::kInputs) {
      compute<i>(FirstNumbers<step.count>());
    }
  }
  template <bool known, int... i>
  LSTM_FUSED_INLINE void compute_steps(Numbers<i...>, const V* next) {
    (compute_step<known, i>(next), ...);
  }
  template <bool known>
  LSTM_FUSED_INLINE void run(const V* next) {
    compute_steps<known>(FirstNumbers<kSteps>(), next);
  }

  template <int i, int k, int... other>
  LSTM_FUSED_INLINE void propagate_to(Numbers<other...>) {
    constexpr TraceStep step = kDerivation<Cell>.trace.steps[i];
    constexpr Reach how = kDerivation<Cell>.operand_reach[i][k];
    if constexpr (step.operation == Operation::kNormalize) {
      const A* of_group = statistics + 4 * step.group;
      contribute<how>(gradient[step.operands[0]],
                      of_group[1] * (gradient[i] - of_group[2] - value[i] * of_group[3]));
    } else if constexpr (how != Reach::kNone)
      contribute<how>(gradient[step.operands[k]],
                      Rule<step.operation>::template gradient<k>(gradient[i], value[i],
                                                                 value[step.operands[other]]...));
  }
  template <int i, int... k>
  LSTM_FUSED_INLINE void propagate(Numbers<k...> all) {
    (propagate_to<i, k>(all), ...);
  }
  template <int... i>
  LSTM_FUSED_INLINE void propagate_steps(Numbers<i...>) {
    (propagate<kSteps - 1 - i>(FirstNumbers<kDerivation<Cell>.trace.steps[kSteps - 1 - i].count>()),
     ...);
  }
  template <int... k>
  LSTM_FUSED_INLINE void seed(Numbers<k...>, const V& dh, const V* d_next) {
    contribute<kDerivation<Cell>.h_reach>(gradient[kH], dh);
    (contribute<kDerivation<Cell>.next_reach[k]>(gradient[kNext<k>], d_next[k]), ...);
  }
  // gradient[i] for each input i, from those of h and next.
  LSTM_FUSED_INLINE void run_backward(const V& dh, const V* d_next) {
    seed(FirstNumbers<D::kStates>(), dh, d_next);
    propagate_steps(FirstNumbers<kSteps - D::kInputs>());
  }
  template <int first, int... k>
  LSTM_FUSED_INLINE void take(Numbers<k...>, V* to) const {
    ((to[k] = kReached<first + k> ? gradient[first + k] : V{}), ...);
  }
  template <int... k>
  LSTM_FUSED_INLINE void take_next(Numbers<k...>, V* next) const {
    ((next[k] = value[kNext<k>]), ...);
  }
};

// preact (kPreacts), vector (kVectors), mask (kMasks), prev and next (kCells + kKeepsHidden) -> h.
template <class Cell, class V>
LSTM_FUSED_INLINE V described_forward(const V* preact, const V* vector, const V* mask,
                                      const V* prev, V* next,
                                      const ScalarOf<V>* statistics = nullptr) {
  TraceRunner<Cell, V> runner;
  runner.statistics = statistics;
  runner.put_inputs(preact, vector, mask, prev);
  runner.template run<false>(nullptr);
  runner.take_next(FirstNumbers<Derivation<Cell>::kStates>(), next);
  return runner.value[runner.kH];
}

// next: as forward left it. d_state: gradients of next from later steps, replaced by those of prev.
// -> h.
template <class Cell, class V>
LSTM_FUSED_INLINE V described_backward(const V* preact, const V* vector, const V* mask,
                                       const V* prev, const V* next, const V& dh, V* d_state,
                                       V* d_preact, V* d_vector,
                                       const ScalarOf<V>* statistics = nullptr) {
  using D = Derivation<Cell>;
  TraceRunner<Cell, V> runner;
  runner.statistics = statistics;
  runner.put_inputs(preact, vector, mask, prev);
  runner.template run<true>(next);
  runner.run_backward(dh, d_state);
  runner.template take<0>(FirstNumbers<D::kPreacts>(), d_preact);
  runner.template take<D::kFirstVector>(FirstNumbers<D::kVectors>(), d_vector);
  runner.template take<D::kFirstPrev>(FirstNumbers<D::kStates>(), d_state);
  return runner.value[runner.kH];
}

// Adds what the gradient of the operand gives to the gradients of the inputs. -> the operand.
template <class Cell, class V>
LSTM_FUSED_INLINE V operand_backward(const V* preact, const V* vector, const V* mask, const V* prev,
                                     const V& d_operand, V* d_state, V* d_preact, V* d_vector) {
  using D = Derivation<OperandOf<Cell>>;
  static_assert(!kDerivation<OperandOf<Cell>>.reached[D::kPreacts - 1],
                "the cell's operand must not use the last pre-activation");
  static_assert(kDerivation<Cell>.trace.groups + kDerivation<OperandOf<Cell>>.trace.groups == 0,
                "the cell has an operand, so that it must not normalize");
  TraceRunner<OperandOf<Cell>, V> runner;
  runner.put_inputs(preact, vector, mask, prev);
  runner.template run<false>(nullptr);
  const V no_next[D::kStates + 1] = {};
  runner.run_backward(d_operand, no_next);
  V own[D::kInputs + 1];
  runner.template take<0>(FirstNumbers<D::kInputs>(), own);
  LSTM_FUSED_UNROLLED_FOR (int k = 0; k < D::kPreacts; ++k) d_preact[k] = d_preact[k] + own[k];
  LSTM_FUSED_UNROLLED_FOR (int k = 0; k < D::kVectors; ++k)
    d_vector[k] = d_vector[k] + own[D::kFirstVector + k];
  LSTM_FUSED_UNROLLED_FOR (int k = 0; k < D::kStates; ++k)
    d_state[k] = d_state[k] + own[D::kFirstPrev + k];
  return runner.value[runner.kH];
}

template <int count, class V, class A>
LSTM_FUSED_INLINE void load_values(V* to, const A* from, int64_t stride) {
  if constexpr (count > 0) {
    LSTM_FUSED_UNROLLED_FOR (int k = 0; k < count; ++k)
      std::memcpy(to + k, from + k * stride, sizeof(V));
  }
}
template <int count, class V, class A>
LSTM_FUSED_INLINE void store_values(A* to, int64_t stride, const V* from) {
  if constexpr (count > 0) {
    LSTM_FUSED_UNROLLED_FOR (int k = 0; k < count; ++k)
      std::memcpy(to + k * stride, from + k, sizeof(V));
  }
}

// The inputs of a unit's functions, loaded.
template <class Cell, class V>
struct UnitInputs {
  using D = Derivation<Cell>;
  static constexpr int64_t lanes = sizeof(V) / sizeof(ScalarOf<V>);
  V preact[D::kPreacts], vector[D::kVectors + 1], mask[D::kMasks + 1], prev[D::kStates + 1];

  template <class Unit>
  LSTM_FUSED_INLINE UnitInputs(const Unit& unit, int64_t preacts_stride) {
    load_values<D::kPreacts>(preact, unit.preacts, preacts_stride);
    load_values<D::kVectors>(vector, unit.vectors, lanes);
    load_values<D::kMasks>(mask, unit.masks, lanes);
    load_values<D::kStates>(prev, unit.prev, unit.prev_stride);
  }
};

// The values and gradients of a unit's trace, where nothing is written yet.
template <class Cell, class V>
struct BackwardOf {
  using D = Derivation<Cell>;
  TraceRunner<Cell, V> runner;

  template <class Unit>
  LSTM_FUSED_INLINE BackwardOf(const Unit& unit) {
    const UnitInputs<Cell, V> in(unit, unit.preacts_stride);
    V next[D::kStates + 1], d_state[D::kStates + 1], dh;
    load_values<D::kStates>(next, unit.next, unit.next_stride);
    load_values<1>(&dh, unit.dh, in.lanes);
    load_values<D::kStates>(d_state, unit.d_state, unit.d_state_stride);
    runner.statistics = unit.statistics;
    runner.put_inputs(in.preact, in.vector, in.mask, in.prev);
    runner.template run<true>(next);
    runner.run_backward(dh, d_state);
  }
};

template <class Cell, class V, class A>
void unit_forward(const UnitForward<A>& unit) {
  using D = Derivation<Cell>;
  constexpr int64_t lanes = sizeof(V) / sizeof(A);
  const UnitInputs<Cell, V> in(unit, lanes);
  V next[D::kStates + 1];
  const V h =
      described_forward<Cell>(in.preact, in.vector, in.mask, in.prev, next, unit.statistics);
  store_values<D::kStates>(unit.next, unit.next_stride, next);
  store_values<1>(unit.h, lanes, &h);
}

template <class Cell, class V, class A>
void unit_backward(const UnitBackward<A>& unit) {
  using D = Derivation<Cell>;
  constexpr int64_t lanes = sizeof(V) / sizeof(A);
  const UnitInputs<Cell, V> in(unit, unit.preacts_stride);
  V next[D::kStates + 1], d_state[D::kStates + 1], d_preact[D::kPreacts];
  V d_vector[D::kVectors + 1], dh;
  load_values<D::kStates>(next, unit.next, unit.next_stride);
  load_values<1>(&dh, unit.dh, lanes);
  load_values<D::kStates>(d_state, unit.d_state, unit.d_state_stride);
  const V h = described_backward<Cell>(in.preact, in.vector, in.mask, in.prev, next, dh, d_state,
                                       d_preact, d_vector, unit.statistics);
  if constexpr (HasOperand<Cell>) {
    V d_operand;
    load_values<1>(&d_operand, unit.d_operand, lanes);
    const V operand = operand_backward<Cell>(in.preact, in.vector, in.mask, in.prev, d_operand,
                                             d_state, d_preact, d_vector);
    store_values<1>(unit.operand, lanes, &operand);
  }
  store_values<D::kPreacts>(unit.d_preacts, lanes, d_preact);
  store_values<D::kVectors>(unit.d_vectors, lanes, d_vector);
  store_values<D::kStates>(unit.d_state, unit.d_state_stride, d_state);
  store_values<1>(unit.h, lanes, &h);
}

// UnitFunctions::operand and last_gradient.
template <class Cell, class V, class A>
void unit_operand(const UnitForward<A>& unit) {
  constexpr int64_t lanes = sizeof(V) / sizeof(A);
  const UnitInputs<Cell, V> in(unit, lanes);
  V next[Derivation<Cell>::kStates + 1];
  const V operand =
      described_forward<OperandOf<Cell>>(in.preact, in.vector, in.mask, in.prev, next);
  store_values<1>(unit.h, lanes, &operand);
}

template <class Cell, class V, class A>
void unit_last_gradient(const UnitBackward<A>& unit, A* to) {
  using D = Derivation<Cell>;
  const BackwardOf<Cell, V> found(unit);
  V d_preact[D::kPreacts];
  found.runner.template take<0>(FirstNumbers<D::kPreacts>(), d_preact);
  store_values<1>(to, sizeof(V) / sizeof(A), d_preact + D::kPreacts - 1);
}

// UnitFunctions::values and sums of a level. What the level does not need is dead code.
template <class Cell, int level, class V, class A>
void unit_values(const UnitForward<A>& unit, A* to) {
  constexpr int64_t lanes = sizeof(V) / sizeof(A);
  constexpr const Derivation<Cell>& d = kDerivation<Cell>;
  const UnitInputs<Cell, V> in(unit, lanes);
  TraceRunner<Cell, V> runner;
  runner.statistics = unit.statistics;
  runner.put_inputs(in.preact, in.vector, in.mask, in.prev);
  runner.template run<false>(nullptr);
  const auto put = [&]<int i>() {
    constexpr TraceStep step = d.trace.steps[i];
    if constexpr (step.operation == Operation::kNormalize) {
      if constexpr (d.group[step.group].level == level) {
        store_values<1>(to, lanes, &runner.value[step.operands[0]]);
        to += lanes;
      }
    }
  };
  [&]<int... i>(Numbers<i...>) {
    (put.template operator()<i>(), ...);
  }(FirstNumbers<d.trace.count>());
}

template <class Cell, int level, class V, class A>
void unit_sums(const UnitBackward<A>& unit, A* to) {
  using D = Derivation<Cell>;
  constexpr int64_t lanes = sizeof(V) / sizeof(A);
  constexpr const D& d = kDerivation<Cell>;
  const BackwardOf<Cell, V> found(unit);
  const TraceRunner<Cell, V>& runner = found.runner;
  V sums[kMaxUnitGroups][2] = {};
  const auto add = [&]<int i>() {
    constexpr TraceStep step = d.trace.steps[i];
    if constexpr (step.operation == Operation::kNormalize) {
      sums[step.group][0] += runner.gradient[i];
      sums[step.group][1] += runner.gradient[i] * runner.value[i];
    }
  };
  [&]<int... i>(Numbers<i...>) {
    (add.template operator()<i>(), ...);
  }(FirstNumbers<d.trace.count>());
  for (int g = 0; g < d.trace.groups; ++g) {
    if (d.group[g].level != level) continue;
    store_values<2>(to, lanes, sums[g]);
    to += 2 * lanes;
  }
}

template <class Cell, class V, class A>
constexpr UnitFunctions<A> unit_functions() {
  constexpr const Derivation<Cell>& d = kDerivation<Cell>;
  UnitFunctions<A> found = {unit_forward<Cell, V, A>, unit_backward<Cell, V, A>};
  found.groups = d.trace.groups;
  found.levels = d.levels;
  if constexpr (HasOperand<Cell>) {
    found.operand = unit_operand<Cell, V, A>;
    found.last_gradient = unit_last_gradient<Cell, V, A>;
  }
  for (int g = 0; g < d.trace.groups; ++g) found.group[g] = d.group[g];
  const auto put = [&]<int level>() {
    if constexpr (level < d.levels) {
      found.values[level] = unit_values<Cell, level, V, A>;
      found.sums[level] = unit_sums<Cell, level, V, A>;
    }
  };
  static_assert(kMaxUnitGroups == 3);
  put.template operator()<0>();
  put.template operator()<1>();
  put.template operator()<2>();
  return found;
}

}  // namespace
}  // namespace lstm_fused
