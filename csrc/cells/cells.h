// Every cell: an include and a row in one of two lists for each. The position in the lists is the
// number by which operators know a cell.
//
// A cell of the first list is compiled into the kernels, and is a struct of static members. V is
// the value a kernel computes with, SIMD lanes on a CPU and a scalar on a GPU; sigmoid(V) and
// tanh(V) are declared before this header is included.
//   kGates            blocks of H rows in w_ih, w_hh and the biases, 4 at most
//   kPreacts          pre-activations of a unit, kGates or more. The input's part of gate
//                     input_gate(j) adds to pre-activation j, the hidden state's part of
//                     hidden_gate(j) to pre-activation kPreacts - kGates + j: the first and the
//                     last of them, so that each part is one run of them. A unit saves as many
//                     values for backward, which gives as many gradients.
//   kCarry            what is carried from step to step beside the rounded h (params.h)
//   forward(preact, c_prev, c) -> h
//                     preact (kPreacts): pre-activations, replaced by what backward needs of them
//                     c_prev, c: the carried value, read and written
//   backward(saved, c_prev, c, dh, dc, d_preact) -> h
//                     saved (kPreacts), c_prev, c: as forward left them
//                     dh: gradient of h; dc: gradient of c from the step after, replaced by the one
//                     for the step before; d_preact (kPreacts): gradients of the pre-activations
//   tangent(saved, c_prev, c, d_preact, dc_prev, dc) -> dh
//                     as backward, with d_preact, dc_prev, dc and dh the tangents of preact,
//                     c_prev, c, h
//
// A described cell, of the second list, derives from DescribedCell (described.h) and has forward
// alone. The kernels, which are the same for all of them, call it through pointers (unit.h).
#pragma once

#include <deque>
#include <string>

#include "coupled_lstm.h"
#include "gru.h"
#include "ind_rnn.h"
#include "layer_norm.h"
#include "lstm.h"
#include "mgu.h"
#include "min_rnn.h"
#include "peephole_lstm.h"
#include "qrnn.h"
#include "regularized.h"
#include "reset_before_gru.h"
#include "rnn.h"
#include "slstm.h"
#include "sru.h"
#include "variational.h"

#define LSTM_FUSED_CELLS(CELL) \
  CELL(lstm, Lstm)             \
  CELL(gru, Gru)               \
  CELL(rnn_tanh, RnnTanh)      \
  CELL(rnn_relu, RnnRelu)

#if defined(LSTM_FUSED_FEW_CELLS)
// For tests that compile slowly: one cell for each thing that kernels do differently.
#define LSTM_FUSED_DESCRIBED_CELLS(CELL) \
  CELL(regularized_gru, RegularizedGru)  \
  CELL(ind_rnn, IndRnn)                  \
  CELL(mgu, Mgu)                         \
  CELL(slstm, Slstm)                     \
  CELL(layer_norm_lstm, LayerNormLstm)
#else
#define LSTM_FUSED_DESCRIBED_CELLS(CELL)              \
  CELL(peephole_lstm, PeepholeLstm)                   \
  CELL(regularized_lstm, RegularizedLstm)             \
  CELL(regularized_gru, RegularizedGru)               \
  CELL(coupled_lstm, CoupledLstm)                     \
  CELL(reset_before_gru, ResetBeforeGru)              \
  CELL(mgu, Mgu)                                      \
  CELL(ind_rnn, IndRnn)                               \
  CELL(ind_rnn_tanh, IndRnnTanh)                      \
  CELL(sru, Sru)                                      \
  CELL(qrnn, Qrnn)                                    \
  CELL(min_gru, MinGru)                               \
  CELL(min_lstm, MinLstm)                             \
  CELL(variational_lstm, VariationalLstm)             \
  CELL(variational_gru, VariationalGru)               \
  CELL(slstm, Slstm)                                  \
  CELL(layer_norm_lstm, LayerNormLstm)                \
  CELL(layer_norm_lstm_carried, LayerNormLstmCarried) \
  CELL(layer_norm_gru, LayerNormGru)
#endif

namespace lstm_fused {
namespace {

// A cell whose forward pass is that of tangents.
template <class Cell>
struct TangentOf : Cell {
  using Primal = Cell;
};

// input_gate(j) of every cell of G gates and P pre-activations; hidden_gate(j) is j. The last P - G
// gates have two pre-activations each, one for the input's part, which come first, and one for the
// hidden state's, which come last.
constexpr int input_gate_of(int G, int P, int j) {
  return j < P - G ? 2 * G - P + j : j - (P - G);
}

}  // namespace

// Every described cell, in the kernels: its numbers are known at run time, and are at most these.
struct AnyCell {
  static constexpr int kGates = 4;
  static constexpr int kPreacts = 8;
};

template <class Cell>
inline constexpr bool kIsAny = false;
template <>
inline constexpr bool kIsAny<AnyCell> = true;

enum class CellKind : int {
#define LSTM_FUSED_KIND(name, Cell) k##Cell,
  LSTM_FUSED_CELLS(LSTM_FUSED_KIND) LSTM_FUSED_DESCRIBED_CELLS(LSTM_FUSED_KIND)
#undef LSTM_FUSED_KIND
      kCount
};

inline constexpr int kCellCount = static_cast<int>(CellKind::kCount);

struct CellInfo {
  const char* name;
  int gates, preacts;
  bool described;
  int cells;          // cell states of a unit: c0 and c_n are (D, N, cells * H)
  bool keeps_hidden;  // whether h is carried before it is rounded
  int vectors, masks;
  int groups;    // of values that are normalized over all units of a row
  bool operand;  // whether the last gate's rows of w_hh multiply an operand of the cell's own

  constexpr int carried() const { return cells + keeps_hidden; }
  constexpr int saved() const { return carried() + groups; }
  // Of a cell of the first list.
  constexpr Carry carry() const {
    return cells > 0 ? Carry::kCell : keeps_hidden ? Carry::kHidden : Carry::kNone;
  }
};

inline constexpr CellInfo kCells[] = {
#define LSTM_FUSED_INFO(name, Cell) \
  {#name,                           \
   Cell::kGates,                    \
   Cell::kPreacts,                  \
   false,                           \
   Cell::kCarry == Carry::kCell,    \
   Cell::kCarry == Carry::kHidden,  \
   0,                               \
   0,                               \
   0,                               \
   false},
    LSTM_FUSED_CELLS(LSTM_FUSED_INFO)
#undef LSTM_FUSED_INFO
#define LSTM_FUSED_INFO(name, Cell) \
  {#name,                           \
   Cell::kGates,                    \
   Cell::kPreacts,                  \
   true,                            \
   Cell::kCells,                    \
   Cell::kKeepsHidden,              \
   Cell::kVectors,                  \
   Cell::kMasks,                    \
   groups_of<Cell>(),               \
   HasOperand<Cell>},
        LSTM_FUSED_DESCRIBED_CELLS(LSTM_FUSED_INFO)
#undef LSTM_FUSED_INFO
};

// Cells of the user, whose numbers follow those of the lists. Every library has its own.
inline std::deque<CellInfo>& registered_cells() {
  static std::deque<CellInfo> cells;
  return cells;
}

inline int cell_count() {
  return kCellCount + static_cast<int>(registered_cells().size());
}

inline const CellInfo& info(CellKind cell) {
  const int k = static_cast<int>(cell);
  return k < kCellCount ? kCells[k] : registered_cells()[k - kCellCount];
}

inline UnitInfo unit_info(CellKind cell, const void* functions) {
  const CellInfo& known = info(cell);
  return {known.gates, known.preacts, known.cells,   known.keeps_hidden, known.vectors,
          known.masks, known.groups,  known.operand, functions};
}

inline const char* name(CellKind cell) {
  return info(cell).name;
}

}  // namespace lstm_fused
