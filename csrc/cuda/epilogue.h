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

#include "cell.h"
#include "params.h"
#include "types.h"

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

// The same of pre, gates and saved_states.
LSTM_FUSED_DEVICE int64_t saved_row(const RecurrenceParams& p, const StepRows& rows, int d,
                                    int64_t n) {
  return data_row(p, rows, d, n) + d * p.saved_shift;
}

// Element u of row n's hidden state, or of its cell states, `width` in all, in y or dy.
LSTM_FUSED_DEVICE int64_t hidden_at(const RecurrenceParams& p, const StepRows& rows, int d,
                                    int64_t n, int64_t u) {
  return (rows.offset + n) * p.y_width + d * p.R + u;
}
LSTM_FUSED_DEVICE int64_t cell_at(const RecurrenceParams& p, const StepRows& rows, int d, int64_t n,
                                  int64_t width, int64_t u) {
  return (rows.offset + n) * p.y_width + p.D * p.R + d * width + u;
}

// Whether a reset parts row n's step from the one before it in the order of the pass, and from the
// one after it. Of two steps the later one in time has the flag: in a reversed pass the one before.
LSTM_FUSED_DEVICE bool reset_before(const RecurrenceParams& p, const StepRows& rows, bool reversed,
                                    int64_t n) {
  if (!p.resets || n >= (reversed ? rows.active_prev : rows.active)) return false;
  return p.resets[rows.offset + (reversed ? rows.active : 0) + n] != 0;
}
LSTM_FUSED_DEVICE bool reset_after(const RecurrenceParams& p, const StepRows& rows, bool reversed,
                                   int64_t n) {
  if (!p.resets || n >= (reversed ? rows.active : rows.active_next)) return false;
  return p.resets[rows.offset + (reversed ? 0 : rows.active) + n] != 0;
}

// What row n begins with, of h0 or c0: the initial state, or the reset state.
template <class S>
LSTM_FUSED_DEVICE S initial_state(const RecurrenceParams& p, const void* state, int d, int64_t n,
                                  int64_t width, int64_t u, bool reset) {
  if (!state || (reset && p.state_rows == p.N)) return S{};
  return as<S>(state)[(d * p.state_rows + (reset ? p.N : 0) + n) * width + u];
}
// The same of carried state k of unit u: of c0, or of h0 where that is what is carried.
template <class Cell, class S>
LSTM_FUSED_DEVICE Compute<S> initial_carried(const RecurrenceParams& p, int d, int64_t n, int64_t u,
                                             int k, bool reset) {
  constexpr int kCells = CellNumbers<Cell>::kCells;
  return load(k < kCells ? initial_state<S>(p, p.c0, d, n, kCells * p.H, k * p.H + u, reset)
                         : initial_state<S>(p, p.h0, d, n, p.H, u, reset));
}

// Carried state k of unit u of row n in p.carry.
template <class Cell, class S>
LSTM_FUSED_DEVICE Compute<S>& carry_of(const RecurrenceParams& p, int d, int64_t n, int64_t u,
                                       int k) {
  constexpr int kCarried = UnitValues<Cell, Compute<S>>::kCarried;
  return as<Compute<S>>(p.carry)[((d * p.N + n) * kCarried + k) * p.H + u];
}

// Loads a unit's parameters, and its masks of this step.
template <class Cell, class S>
LSTM_FUSED_DEVICE void fetch_constants(const RecurrenceParams& p, const StepRows& rows, int d,
                                       int64_t n, int64_t u, UnitValues<Cell, Compute<S>>& f) {
  constexpr int kVectors = CellNumbers<Cell>::kVectors, kMasks = CellNumbers<Cell>::kMasks;
  LSTM_FUSED_UNROLL
  for (int j = 0; j < kVectors; ++j) f.vector[j] = load(as<S>(p.vectors[d])[j * p.H + u]);
  LSTM_FUSED_UNROLL
  for (int j = 0; j < kMasks; ++j)
    f.mask[j] = load(as<S>(p.masks[d])[((rows.offset + n) * kMasks + j) * p.H + u]);
}

}  // namespace lstm_fused::cuda
