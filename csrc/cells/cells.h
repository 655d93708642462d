// Every cell: an include and a row in the list for each. The position in the list is the number by
// which operators know a cell.
//
// A cell is a struct of static members. V is the value a kernel computes with, SIMD lanes on a CPU
// and a scalar on a GPU; sigmoid(V) and tanh(V) are declared before this header is included.
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
#pragma once

#include "gru.h"
#include "lstm.h"
#include "rnn.h"

#define LSTM_FUSED_CELLS(CELL) \
  CELL(lstm, Lstm)             \
  CELL(gru, Gru)               \
  CELL(rnn_tanh, RnnTanh)      \
  CELL(rnn_relu, RnnRelu)

namespace lstm_fused {
namespace {

// A cell whose forward pass is that of tangents.
template <class Cell>
struct TangentOf : Cell {
  using Primal = Cell;
};

}  // namespace

enum class CellKind : int {
#define LSTM_FUSED_KIND(name, Cell) k##Cell,
  LSTM_FUSED_CELLS(LSTM_FUSED_KIND)
#undef LSTM_FUSED_KIND
      kCount
};

inline constexpr int kCellCount = static_cast<int>(CellKind::kCount);

struct CellInfo {
  const char* name;
  int gates, preacts;
  Carry carry;
};

inline constexpr CellInfo kCells[] = {
#define LSTM_FUSED_INFO(name, Cell) {#name, Cell::kGates, Cell::kPreacts, Cell::kCarry},
    LSTM_FUSED_CELLS(LSTM_FUSED_INFO)
#undef LSTM_FUSED_INFO
};

inline constexpr const CellInfo& info(CellKind cell) {
  return kCells[static_cast<int>(cell)];
}

// Of a row of ForwardParams::checkpoints.
inline constexpr int64_t checkpoint_width(CellKind cell, const LayerSizes& size) {
  return size.R + (info(cell).carry == Carry::kCell ? size.H : 0);
}

inline constexpr const char* name(CellKind cell) {
  return info(cell).name;
}

}  // namespace lstm_fused
