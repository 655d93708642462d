// Epilogues of the forward pass.
#pragma once

#include "epilogue.h"

namespace lstm_fused::cuda {

// What the next step takes for h: the reset state if it begins anew. The flag is read only here,
// since one more value that a unit keeps during the product would spill.
template <class S>
LSTM_FUSED_DEVICE S passed_on(const RecurrenceParams& p, const StepRows& rows, int d, int64_t n,
                              int64_t u, S h) {
  return reset_after(p, rows, d == 1, n) ? initial_state<S>(p, p.h0, d, n, p.R, u, true) : h;
}

// The product with w_hh, and the cell: a unit is one of H.
template <class Cell, class S>
struct ForwardCell {
  using C = Compute<S>;
  static constexpr int kGates = Cell::kGates;
  static constexpr int kOut = 1;
  static constexpr bool kBackward = false;
  static constexpr int kFirstHidden = Cell::kPreacts - Cell::kGates;

  struct Unit {
    C preact[Cell::kPreacts];
    C c_prev, c;
    S h;
  };

  static LSTM_FUSED_DEVICE int64_t gate(int m) { return Cell::hidden_gate(m); }
  static LSTM_FUSED_INLINE int64_t row_count(const StepRows& rows) { return rows.active; }

  static LSTM_FUSED_DEVICE void fetch(const RecurrenceParams& p, const StepRows& rows, int d,
                                      int64_t n, int64_t u, Unit& f) {
    const C* pre = as<C>(p.pre) + saved_row(p, rows, d, n) * kGates * p.H + u;
    LSTM_FUSED_UNROLL
    for (int j = 0; j < Cell::kPreacts; ++j) f.preact[j] = 0;
    LSTM_FUSED_UNROLL
    for (int j = 0; j < kGates; ++j) f.preact[j] = pre[Cell::input_gate(j) * p.H];
    if (p.b_ih[d]) {
      const S* b_ih = as<S>(p.b_ih[d]) + u;
      const S* b_hh = as<S>(p.b_hh[d]) + u;
      LSTM_FUSED_UNROLL
      for (int j = 0; j < kGates; ++j) {
        f.preact[j] += load(b_ih[Cell::input_gate(j) * p.H]);
        f.preact[kFirstHidden + j] += load(b_hh[Cell::hidden_gate(j) * p.H]);
      }
    }
    f.c_prev = 0;
    if constexpr (Cell::kCarry != Carry::kNone) {
      const bool reset = reset_before(p, rows, d == 1, n);
      if (n < rows.active_prev && !reset)
        f.c_prev = as<C>(p.carry)[(d * p.N + n) * p.H + u];
      else
        f.c_prev = load(
            initial_state<S>(p, Cell::kCarry == Carry::kCell ? p.c0 : p.h0, d, n, p.H, u, reset));
    }
  }

  static LSTM_FUSED_DEVICE bool apply(const RecurrenceParams& p, const StepRows& rows, int d,
                                      int64_t n, int64_t u, Unit& f, const C (&product)[kGates],
                                      S (&out)[kOut]) {
    LSTM_FUSED_UNROLL
    for (int j = 0; j < kGates; ++j) f.preact[kFirstHidden + j] += product[j];
    f.c = 0;
    f.h = round_to<S>(Cell::forward(f.preact, f.c_prev, f.c));
    out[0] = p.projection ? f.h : passed_on<S>(p, rows, d, n, u, f.h);
    return true;
  }

  static LSTM_FUSED_DEVICE void store(const RecurrenceParams& p, const StepRows& rows, int d,
                                      int64_t n, int64_t u, const Unit& f) {
    const int64_t state = (d * p.N + n) * p.H + u, row = saved_row(p, rows, d, n);
    const bool last = n >= rows.active_next;
    if constexpr (Cell::kCarry != Carry::kNone) {
      as<C>(p.carry)[state] = f.c;
      if (p.saved_states) as<C>(p.saved_states)[row * p.H + u] = f.c;
    }
    if (p.y) {
      if constexpr (Cell::kCarry == Carry::kCell) {
        if (last) as<S>(p.c_n)[state] = round_to<S>(f.c);
        if (p.cell_states) as<S>(p.y)[cell_at(p, rows, d, n, u)] = round_to<S>(f.c);
      }
      if (!p.projection) {
        as<S>(p.y)[hidden_at(p, rows, d, n, u)] = f.h;
        if (last) as<S>(p.h_n)[state] = f.h;
      }
    }
    if (p.gates) {
      C* gates = as<C>(p.gates) + row * Cell::kPreacts * p.H + u;
      LSTM_FUSED_UNROLL
      for (int j = 0; j < Cell::kPreacts; ++j) gates[j * p.H] = f.preact[j];
    }
  }
};

// The projection of h by w_hr: a unit is one of R.
template <class S>
struct Project {
  using C = Compute<S>;
  static constexpr int kGates = 1;
  static constexpr int kOut = 1;
  static constexpr bool kBackward = false;
  struct Unit {
    S h;
  };

  static LSTM_FUSED_DEVICE int64_t gate(int) { return 0; }
  static LSTM_FUSED_INLINE int64_t row_count(const StepRows& rows) { return rows.active; }
  static LSTM_FUSED_DEVICE void fetch(const RecurrenceParams&, const StepRows&, int, int64_t,
                                      int64_t, Unit&) {}

  static LSTM_FUSED_DEVICE bool apply(const RecurrenceParams& p, const StepRows& rows, int d,
                                      int64_t n, int64_t u, Unit& f, const C (&product)[1],
                                      S (&out)[1]) {
    f.h = round_to<S>(product[0]);
    out[0] = passed_on<S>(p, rows, d, n, u, f.h);
    return true;
  }

  static LSTM_FUSED_DEVICE void store(const RecurrenceParams& p, const StepRows& rows, int d,
                                      int64_t n, int64_t u, const Unit& f) {
    if (!p.y) return;
    as<S>(p.y)[hidden_at(p, rows, d, n, u)] = f.h;
    if (n >= rows.active_next) as<S>(p.h_n)[(d * p.N + n) * p.R + u] = f.h;
  }
};

}  // namespace lstm_fused::cuda
