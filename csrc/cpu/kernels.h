// The table of kernels, one for each ISA: how the rest of the library reaches the ISA files.
#pragma once

#include "plan.h"

namespace lstm_fused {

struct Kernel {
  // Scratch bytes the call needs, and the call. False: the OpenMP runtime granted fewer threads
  // than the plan has, and nothing was computed.
  int64_t (*forward_scratch)(const ForwardParams&, const Plan&);
  bool (*forward)(const ForwardParams&, const Plan&);
  int64_t (*backward_scratch)(const BackwardParams&, const Plan&);
  bool (*backward)(const BackwardParams&, const Plan&);
  int64_t (*backward_lasting)(const BackwardParams&, const Plan&);  // bytes of params.lasting
  // Null for the 16-bit dtypes: a tangent would lose digits in them.
  int64_t (*tangent_scratch)(const TangentParams&, const Plan&);
  bool (*tangent)(const TangentParams&, const Plan&);
  // Of a described cell, whose params get it, else null.
  const UnitInfo* unit;
};

// kernels_<isa>(cell, dtype), each in its ISA file; null for a dtype that is never planned for the
// ISA, and then some of a kernel's functions are, too.
#define LSTM_FUSED_ROW(Name, name, bytes, cols, products, available) \
  const Kernel* kernels_##name(CellKind cell, DType dtype);
LSTM_FUSED_ISAS(LSTM_FUSED_ROW)
#undef LSTM_FUSED_ROW

// Those of every described cell, without its functions.
#define LSTM_FUSED_ROW(Name, name, bytes, cols, products, available) \
  const Kernel* described_kernels_##name(DType dtype);
LSTM_FUSED_ISAS(LSTM_FUSED_ROW)
#undef LSTM_FUSED_ROW

// The fastest ISA this machine can run, and whether it can run a given one.
Isa best_isa();
bool runs(Isa isa);
const Kernel& kernel_for(Isa isa, CellKind cell, DType dtype);

}  // namespace lstm_fused
