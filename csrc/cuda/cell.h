// What the epilogues need of a cell of either list (cells/cells.h): its numbers, and one call for
// its arithmetic.
#pragma once

#include <type_traits>

#include "activations.h"
#include "ptx/threads.h"
// The cells call the functions of activations.h.
#include "../cells/cells.h"
#include "../cells/derive.h"

namespace lstm_fused::cuda {

// kCells: cell states; kHidden: 1 if h is carried before it is rounded, else 0; kVectors and
// kMasks: parameters and masks of a unit; kGroups: of values that are normalized over a row.
template <class Cell, bool kIsDescribed = std::is_base_of_v<DescribedCell, Cell>>
struct CellNumbers {
  static constexpr bool kDescribed = false;
  static constexpr int kCells = Cell::kCarry == Carry::kCell;
  static constexpr int kHidden = Cell::kCarry == Carry::kHidden;
  static constexpr int kVectors = 0, kMasks = 0, kGroups = 0;
};
template <class Cell>
struct CellNumbers<Cell, true> {
  static constexpr bool kDescribed = true;
  static constexpr int kCells = Cell::kCells, kHidden = Cell::kKeepsHidden;
  static constexpr int kVectors = Cell::kVectors, kMasks = Cell::kMasks;
  static constexpr int kGroups = kDerivation<Cell>.trace.groups;
};

// The values of a unit at one step. next: what is carried after the step.
template <class Cell, class C>
struct UnitValues : CellNumbers<Cell> {
  using CellNumbers<Cell>::kCells, CellNumbers<Cell>::kHidden;
  static constexpr int kCarried = kCells + kHidden;
  static constexpr int kSaved = kCarried + CellNumbers<Cell>::kGroups;
  static constexpr int kPreacts = Cell::kPreacts, kGates = Cell::kGates;
  static constexpr int kFirstHidden = kPreacts - kGates;  // of the hidden state's part

  C preact[kPreacts];
  C vector[CellNumbers<Cell>::kVectors + 1], mask[CellNumbers<Cell>::kMasks + 1];
  C prev[kCarried + 1], next[kCarried + 1];

  // The gate of pre-activation j that the input adds to.
  static LSTM_FUSED_INLINE constexpr int input_gate(int j) {
    return input_gate_of(kGates, kPreacts, j);
  }

  // Computes next, and returns h. statistics: of a cell that normalizes (cells/unit.h).
  LSTM_FUSED_DEVICE C forward(const C* statistics) {
    if constexpr (CellNumbers<Cell>::kDescribed)
      return described_forward<Cell, C>(preact, vector, mask, prev, next, statistics);
    else
      return Cell::forward(preact, prev[0], next[0]);
  }

  // The operand of a cell that has one (cells/described.h).
  LSTM_FUSED_DEVICE C operand() const {
    C none[kCarried + 1];
    return described_forward<OperandOf<Cell>, C>(preact, vector, mask, prev, none);
  }

  // d_state: the gradients of next, replaced by those of prev. Returns h.
  LSTM_FUSED_DEVICE C backward(const C& dh, C* d_state, C (&d_preact)[kPreacts], C* d_vector,
                               const C* statistics) const {
    if constexpr (CellNumbers<Cell>::kDescribed)
      return described_backward<Cell, C>(preact, vector, mask, prev, next, dh, d_state, d_preact,
                                         d_vector, statistics);
    else
      return Cell::backward(preact, prev[0], next[0], dh, d_state[0], d_preact);
  }

  // Of a cell with an operand: the gradient of the last pre-activation, from which that of the
  // operand follows; then as backward, but returns the operand.
  LSTM_FUSED_DEVICE C last_gradient(const C& dh, const C* d_state) const {
    C d_before[kCarried + 1], d_preact[kPreacts], d_vector[CellNumbers<Cell>::kVectors + 1];
    LSTM_FUSED_UNROLL
    for (int k = 0; k < kCarried; ++k) d_before[k] = d_state[k];
    described_backward<Cell, C>(preact, vector, mask, prev, next, dh, d_before, d_preact, d_vector);
    return d_preact[kPreacts - 1];
  }
  LSTM_FUSED_DEVICE C backward_with_operand(const C& dh, const C& d_operand, C* d_state,
                                            C (&d_preact)[kPreacts], C* d_vector) const {
    backward(dh, d_state, d_preact, d_vector, nullptr);
    return operand_backward<Cell, C>(preact, vector, mask, prev, d_operand, d_state, d_preact,
                                     d_vector);
  }
};

}  // namespace lstm_fused::cuda
