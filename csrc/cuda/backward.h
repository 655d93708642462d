// Epilogues of the backward pass.
#pragma once

#include "epilogue.h"

namespace lstm_fused::cuda {

// The gradient of h that comes from outside the layer: of y, and of h_n at a row's last time step,
// where its backward pass starts.
template <class S>
LSTM_FUSED_DEVICE Compute<S> outer_gradient(const RecurrenceParams& p, const StepRows& rows, int d,
                                            int64_t n, int64_t u) {
  Compute<S> dh = 0;
  if (p.dy) dh += load(as<S>(p.dy)[data_row(p, rows, d, n) * p.R + u]);
  if (p.dh_n && n >= rows.active_prev) dh += load(as<S>(p.dh_n)[(d * p.N + n) * p.R + u]);
  return dh;
}

// Stores h of the time step before, which the gradient of w_hh is a product of.
template <class S>
LSTM_FUSED_DEVICE void store_h_prev(const RecurrenceParams& p, const StepRows& rows, int d,
                                    int64_t n, int64_t u) {
  if (!p.h_prev) return;
  S h{};
  if (n < rows.active_next)
    h = as<S>(p.h)[((rows.offset_next + n) * p.D + d) * p.R + u];
  else if (p.h0)
    h = as<S>(p.h0)[(d * p.N + n) * p.R + u];
  as<S>(p.h_prev)[data_row(p, rows, d, n) * p.R + u] = h;
}

// Active rows, and those whose backward pass ended with the previous step: the product of that
// step's d_gates is the gradient of their h0.
LSTM_FUSED_INLINE int64_t backward_row_count(const StepRows& rows) {
  return rows.active > rows.active_prev ? rows.active : rows.active_prev;
}

// The product with w_hh^T, and the cell's gradients: a unit is one of H.
template <class Cell, class S>
struct BackwardCell {
  using C = Compute<S>;
  static constexpr int kGates = 1;
  static constexpr int kOut = Cell::kGates;
  static constexpr bool kBackward = true;
  static constexpr int kFirstHidden = Cell::kPreacts - Cell::kGates;

  struct Unit {
    C saved[Cell::kPreacts];
    C c_prev, c, dh, dc;  // dh is the gradient of h0 for a row that is no longer active
    C d_preact[Cell::kPreacts];
    C h;
  };

  static LSTM_FUSED_DEVICE int64_t gate(int) { return 0; }
  static LSTM_FUSED_INLINE int64_t row_count(const StepRows& rows) {
    return backward_row_count(rows);
  }

  static LSTM_FUSED_DEVICE void fetch(const RecurrenceParams& p, const StepRows& rows, int d,
                                      int64_t n, int64_t u, Unit& f) {
    const int64_t state = (d * p.N + n) * p.H + u;
    f.dc = 0;
    if constexpr (Cell::kCarry != Carry::kNone) {
      if (n < rows.active_prev)
        f.dc = as<C>(p.carry)[state];
      else if (Cell::kCarry == Carry::kCell && p.dc_n)
        f.dc = load(as<S>(p.dc_n)[state]);
    }
    if (n >= rows.active) return;
    const C* saved = as<C>(p.gates) + data_row(p, rows, d, n) * Cell::kPreacts * p.H + u;
    LSTM_FUSED_UNROLL
    for (int j = 0; j < Cell::kPreacts; ++j) f.saved[j] = saved[j * p.H];
    f.c = f.c_prev = 0;
    if constexpr (Cell::kCarry != Carry::kNone) {
      const C* cells = as<C>(p.saved_states) + u;
      const void* initial = Cell::kCarry == Carry::kCell ? p.c0 : p.h0;
      f.c = cells[data_row(p, rows, d, n) * p.H];
      if (n < rows.active_next)
        f.c_prev = cells[((rows.offset_next + n) * p.D + d) * p.H];
      else if (initial)
        f.c_prev = load(as<S>(initial)[state]);
    }
    f.dh = p.projection ? C(0) : outer_gradient<S>(p, rows, d, n, u);
  }

  static LSTM_FUSED_DEVICE bool apply(const StepRows& rows, int64_t n, Unit& f,
                                      const C (&product)[1], S (&out)[kOut]) {
    if (n >= rows.active) {
      f.dh = Cell::kCarry == Carry::kHidden ? product[0] + f.dc : product[0];
      return false;
    }
    f.h = Cell::backward(f.saved, f.c_prev, f.c, f.dh + product[0], f.dc, f.d_preact);
    LSTM_FUSED_UNROLL
    for (int j = 0; j < kOut; ++j)
      out[Cell::hidden_gate(j)] = round_to<S>(f.d_preact[kFirstHidden + j]);
    return true;
  }

  static LSTM_FUSED_DEVICE void store(const RecurrenceParams& p, const StepRows& rows, int d,
                                      int64_t n, int64_t u, const Unit& f) {
    const int64_t state = (d * p.N + n) * p.H + u;
    if (n >= rows.active) {
      if (p.dh0 && !p.projection) as<S>(p.dh0)[state] = round_to<S>(f.dh);
      if (p.dc0) as<S>(p.dc0)[state] = round_to<S>(f.dc);
      return;
    }
    if constexpr (Cell::kCarry != Carry::kNone) as<C>(p.carry)[state] = f.dc;
    const int64_t row = data_row(p, rows, d, n);
    if (p.hidden) as<S>(p.hidden)[row * p.H + u] = round_to<S>(f.h);
    S* d_gates = as<S>(p.d_gates) + row * Cell::kPreacts * p.H + u;
    LSTM_FUSED_UNROLL
    for (int j = 0; j < Cell::kPreacts; ++j) d_gates[j * p.H] = round_to<S>(f.d_preact[j]);
    if (!p.projection) store_h_prev<S>(p, rows, d, n, u);
  }
};

// With a projection, the product with w_hh^T gives the gradient of the projected h: a unit is one
// of R. The product with w_hr^T follows, whose epilogue is BackwardCell.
template <class S>
struct ProjectedGradient {
  using C = Compute<S>;
  static constexpr int kGates = 1;
  static constexpr int kOut = 1;
  static constexpr bool kBackward = true;
  struct Unit {
    C dh;
    S dh_total;
  };

  static LSTM_FUSED_DEVICE int64_t gate(int) { return 0; }
  static LSTM_FUSED_INLINE int64_t row_count(const StepRows& rows) {
    return backward_row_count(rows);
  }

  static LSTM_FUSED_DEVICE void fetch(const RecurrenceParams& p, const StepRows& rows, int d,
                                      int64_t n, int64_t u, Unit& f) {
    f.dh = n < rows.active ? outer_gradient<S>(p, rows, d, n, u) : C(0);
  }

  static LSTM_FUSED_DEVICE bool apply(const StepRows& rows, int64_t n, Unit& f,
                                      const C (&product)[1], S (&out)[1]) {
    out[0] = f.dh_total = round_to<S>(f.dh + product[0]);
    return n < rows.active;
  }

  static LSTM_FUSED_DEVICE void store(const RecurrenceParams& p, const StepRows& rows, int d,
                                      int64_t n, int64_t u, const Unit& f) {
    if (n >= rows.active) {
      if (p.dh0) as<S>(p.dh0)[(d * p.N + n) * p.R + u] = f.dh_total;
      return;
    }
    as<S>(p.d_hidden)[data_row(p, rows, d, n) * p.R + u] = f.dh_total;
    store_h_prev<S>(p, rows, d, n, u);
  }
};

}  // namespace lstm_fused::cuda
