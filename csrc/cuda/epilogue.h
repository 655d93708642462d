// An epilogue is what a kernel does with the product of a step (params.h), unit by unit. Each is a
// struct of static members:
//   kGates     rows of A for each unit: gate(m) * units + unit, m < kGates
//   kOut       values of a unit that the next product takes
//   kBackward  whether it belongs to the backward pass
//   row_count  how many rows the product is computed for; the host calls it too
//   Constants  what a unit has for all rows and steps
//   Unit       the state of one unit of one row, from fetch to store
//   fetch      loads what does not depend on the product: a prefetch, where the kernel can call it
//              before the barrier. It uses nothing that it loads, since that would wait there for
//              memory. follows: f is what the step before this one left of the same element, so
//              that what the cell carries never leaves the thread's registers.
//   apply      computes the outputs from the product; false: there are none for the next product
//   store      writes what only later launches read. followed: the next step's fetch gets f, so
//              that what the cell carries need not be written.
#pragma once

#include "cell.h"
#include "params.h"
#include "types.h"

namespace lstm_fused::cuda {

// The product of two indices that are not negative. Of ints it is a single instruction.
LSTM_FUSED_DEVICE int64_t wide_product(int a, int b) {
  return static_cast<int64_t>(uint64_t{static_cast<uint32_t>(a)} * static_cast<uint32_t>(b));
}
LSTM_FUSED_DEVICE int64_t wide_product(int64_t a, int64_t b) {
  return a * b;
}

// What an epilogue is called for: unit u of row n in direction d, at a step with these rows.
template <class I>
struct Element {
  const StepRowsOf<I>& rows;
  int d;
  I n, u;

  // Row n of this step in a tensor (S, D, ...).
  LSTM_FUSED_DEVICE I data_row(const RecurrenceParams& p) const {
    return (rows.offset + n) * I(p.D) + I(d);
  }
  // The same of pre, gates and saved_states.
  LSTM_FUSED_DEVICE I saved_row(const RecurrenceParams& p) const {
    return data_row(p) + I(d) * I(p.saved_shift);
  }
  // Row n in a tensor (D, N, ...), and in one (D, state_rows, ...).
  LSTM_FUSED_DEVICE I batch_row(const RecurrenceParams& p) const { return I(d) * I(p.N) + n; }
  LSTM_FUSED_DEVICE I state_row(const RecurrenceParams& p, bool reset) const {
    return I(d) * I(p.state_rows) + (reset ? I(p.N) : I(0)) + n;
  }
  // Unit u of entry k of a row that has `count` entries of H values each.
  LSTM_FUSED_DEVICE int64_t unit_at(const RecurrenceParams& p, I row, int count, int k = 0) const {
    return wide_product(row, I(p.H) * I(count)) + (I(k) * I(p.H) + u);
  }
  // Unit u's hidden state in y or dy, and its cell state k of kCells.
  LSTM_FUSED_DEVICE int64_t hidden_at(const RecurrenceParams& p) const {
    return wide_product(rows.offset + n, I(p.y_width)) + (I(d) * I(p.R) + u);
  }
  LSTM_FUSED_DEVICE int64_t cell_at(const RecurrenceParams& p, int cells, int k) const {
    return wide_product(rows.offset + n, I(p.y_width)) +
           (I(p.D) * I(p.R) + (I(d) * I(cells) + I(k)) * I(p.H) + u);
  }
};

// Of an epilogue that has none.
struct NoConstants {
  template <class I>
  LSTM_FUSED_DEVICE void load(const RecurrenceParams&, int, I) {}
};

template <class T>
LSTM_FUSED_DEVICE T* as(void* p) {
  return static_cast<T*>(p);
}
template <class T>
LSTM_FUSED_DEVICE const T* as(const void* p) {
  return static_cast<const T*>(p);
}

// Not 0 where a reset parts row n's step from the one before it in the order of the pass, and from
// the one after it. Of two steps the later one in time has the flag: in a reversed pass the one
// before.
template <class I>
LSTM_FUSED_DEVICE uint8_t reset_before(const RecurrenceParams& p, const Element<I>& e,
                                       bool reversed) {
  const StepRowsOf<I>& rows = e.rows;
  if (!p.resets || e.n >= (reversed ? rows.active_prev : rows.active)) return 0;
  return p.resets[rows.offset + (reversed ? rows.active : 0) + e.n];
}
template <class I>
LSTM_FUSED_DEVICE uint8_t reset_after(const RecurrenceParams& p, const Element<I>& e,
                                      bool reversed) {
  const StepRowsOf<I>& rows = e.rows;
  if (!p.resets || e.n >= (reversed ? rows.active : rows.active_next)) return 0;
  return p.resets[rows.offset + (reversed ? 0 : rows.active) + e.n];
}

// What row n begins with, of h0: the initial state, or the reset state.
template <class S, class I>
LSTM_FUSED_DEVICE S initial_hidden(const RecurrenceParams& p, const Element<I>& e, bool reset) {
  if (!p.h0 || (reset && p.state_rows == p.N)) return S{};
  return as<S>(p.h0)[wide_product(e.state_row(p, reset), I(p.R)) + e.u];
}
// The same of carried state k of unit u: of c0, or of h0 where that is what is carried.
template <class Cell, class S, class I>
LSTM_FUSED_DEVICE Compute<S> initial_carried(const RecurrenceParams& p, const Element<I>& e, int k,
                                             bool reset) {
  constexpr int kCells = CellNumbers<Cell>::kCells;
  if (k >= kCells) return load(initial_hidden<S>(p, e, reset));
  if (!p.c0 || (reset && p.state_rows == p.N)) return 0;
  return load(as<S>(p.c0)[e.unit_at(p, e.state_row(p, reset), kCells, k)]);
}

// Carried state k of unit u of row n in p.carry.
template <class Cell, class S, class I>
LSTM_FUSED_DEVICE Compute<S>& carry_of(const RecurrenceParams& p, const Element<I>& e, int k) {
  constexpr int kCarried = UnitValues<Cell, Compute<S>>::kCarried;
  return as<Compute<S>>(p.carry)[e.unit_at(p, e.batch_row(p), kCarried, k)];
}

// Loads a unit's parameters, and its masks of this step.
template <class Cell, class S, class I>
LSTM_FUSED_DEVICE void fetch_constants(const RecurrenceParams& p, const Element<I>& e,
                                       UnitValues<Cell, Compute<S>>& f) {
  constexpr int kVectors = CellNumbers<Cell>::kVectors, kMasks = CellNumbers<Cell>::kMasks;
  LSTM_FUSED_UNROLL
  for (int j = 0; j < kVectors; ++j)
    f.vector[j] = load(as<S>(p.vectors[e.d])[int64_t{j} * p.H + e.u]);
  LSTM_FUSED_UNROLL
  for (int j = 0; j < kMasks; ++j)
    f.mask[j] = load(as<S>(p.masks[e.d])[e.unit_at(p, e.rows.offset + e.n, kMasks, j)]);
}

}  // namespace lstm_fused::cuda
