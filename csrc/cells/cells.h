// Every cell there is: an include and a line in the list for each. The list's order is the number
// the operators know a cell by.
#pragma once

#include "lstm.h"

#define LSTM_FUSED_CELLS(CELL) CELL(lstm, Lstm)

namespace lstm_fused {

enum class CellKind : int {
#define LSTM_FUSED_KIND(name, Cell) k##Cell,
  LSTM_FUSED_CELLS(LSTM_FUSED_KIND)
#undef LSTM_FUSED_KIND
      kCount
};

inline constexpr int kCellCount = static_cast<int>(CellKind::kCount);

inline constexpr const char* kCellNames[] = {
#define LSTM_FUSED_NAME(name, Cell) #name,
    LSTM_FUSED_CELLS(LSTM_FUSED_NAME)
#undef LSTM_FUSED_NAME
};

inline constexpr int kCellGates[] = {
#define LSTM_FUSED_GATES(name, Cell) Cell::kGates,
    LSTM_FUSED_CELLS(LSTM_FUSED_GATES)
#undef LSTM_FUSED_GATES
};

}  // namespace lstm_fused
