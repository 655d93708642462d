// What the header of a described cell includes. Such a cell is a struct that derives from
// DescribedCell and has its number of gates and its forward function; kernels reach it through two
// functions (unit.h) that derive.h makes of it, backward included.
//
//   struct MyCell : DescribedCell {
//     static constexpr int kGates = 1;    // 1 to 4 blocks of H rows in w_ih, w_hh and the biases
//     static constexpr int kPreacts = 1;  // pre-activations of a unit, kGates to 2 * kGates
//     template <class V>
//     static constexpr V forward(const V* preact, const V* vector, const V* mask, const V* prev,
//                                V* next) {
//       return tanh(preact[0]);
//     }
//   };
//
// With q = kPreacts - kGates, the hidden state's part of gate j adds to preact[q + j]. The input's
// parts of the last q gates are preact[0] to preact[q - 1], those of the others add to preact[q +
// j] as well. So where q = 0, preact[j] is gate j; where q = 1, the last gate is in two parts, as
// the GRU's candidate is: preact[0] from the input and preact[kPreacts - 1] from the hidden state.
//
//   preact (kPreacts), vector (kVectors), mask (kMasks), prev and next (kCells + kKeepsHidden)
//   forward returns h and writes next.
//
// A step may have a second product, after the first: of a cell that has a function `operand`, with
// forward's arguments but next, the last gate's rows of W_hh multiply its result in the place of
// the hidden state. operand does not see the last pre-activation, to which the product adds. Such a
// cell does not normalize.
//
// V is Traced (trace.h): a number with + - * /, of which forward knows no value, so that it cannot
// be compared or decide a branch. Its functions are sigmoid, tanh, exp, log, log_sigmoid, relu,
// abs, max, min, clip(x, bound) and if_less(a, b, x, y). Constants are numbers of any type.
// Gradients where a function has none are those of torch: 0 for relu(0) and abs(0), half for each
// of two equal operands of max and min, 1 on the bounds of clip. The bound of clip, and a and b of
// if_less, have none.
#pragma once

#include "trace.h"

namespace lstm_fused {
namespace {

struct DescribedCell {
  // States carried from step to step: c_0 and c_n are (D, N, kCells * H).
  static constexpr int kCells = 0;
  // prev[kCells] is h of the step before, not rounded to the storage dtype; next[kCells] need not
  // be written.
  static constexpr bool kKeepsHidden = false;
  // Parameters of a unit, with gradients: a weight (kVectors, H).
  static constexpr int kVectors = 0;
  // Values of a unit for each step, without gradients: (T, N, kMasks * H).
  static constexpr int kMasks = 0;
};

template <class Cell>
concept HasOperand = requires(const Traced* in) { Cell::template operand<Traced>(in, in, in, in); };

// How often forward normalizes.
template <class Cell>
constexpr int groups_of() {
  constexpr int kStates = Cell::kCells + Cell::kKeepsHidden;
  constexpr int kFirst[] = {Cell::kPreacts, Cell::kPreacts + Cell::kVectors,
                            Cell::kPreacts + Cell::kVectors + Cell::kMasks};
  Trace trace;
  Traced inputs[kFirst[2] + kStates], next[kStates + 1];
  for (Traced& input : inputs) input = Traced(&trace, trace.add({}));
  const Traced* all = inputs;
  Cell::forward(all, all + kFirst[0], all + kFirst[1], all + kFirst[2], static_cast<Traced*>(next));
  return trace.groups;
}

}  // namespace
}  // namespace lstm_fused
