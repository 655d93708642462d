// An epilogue is what a kernel does with the product of a step (params.h), unit by unit. Each is a
// struct of static members:
//   kGates     rows of A for each unit: gate(m) * units + unit, m < kGates
//   kOut       values of a unit that the next product takes
//   kBackward  whether it belongs to the backward pass
//   row_count      how many rows the product is computed for; the host calls it too
//   Unit       the state of one unit of one row, from fetch to store
//   fetch      loads what does not depend on the product: a prefetch, where the kernel can call it
//              before the barrier
//   apply      computes the outputs from the product; false: there are none for the next product
//   store      writes what only later launches read
// Their arguments are n (row of the batch), u (unit) and d (direction).
#pragma once

#include "activations.h"
#include "params.h"
#include "types.h"
// The cells call the functions of activations.h.
#include "../cells/cells.h"

namespace lstm_fused::cuda {

template <class T>
LSTM_FUSED_DEVICE T* as(void* p) {
  return static_cast<T*>(p);
}
template <class T>
LSTM_FUSED_DEVICE const T* as(const void* p) {
  return static_cast<const T*>(p);
}

// Row n of this step in a tensor (S, D, ...).
LSTM_FUSED_DEVICE int64_t data_row(const RecurrenceParams& p, const StepRows& rows, int d,
                                   int64_t n) {
  return (rows.offset + n) * p.D + d;
}

}  // namespace lstm_fused::cuda
