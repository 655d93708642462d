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
  using Values = UnitValues<Cell, C>;
  static constexpr int kGates = Cell::kGates;
  static constexpr int kOut = 1;
  static constexpr bool kBackward = false;

  struct Unit : Values {
    S h;
  };

  static LSTM_FUSED_DEVICE int64_t gate(int m) { return m; }
  static LSTM_FUSED_INLINE int64_t row_count(const StepRows& rows) { return rows.active; }

  static LSTM_FUSED_DEVICE void fetch(const RecurrenceParams& p, const StepRows& rows, int d,
                                      int64_t n, int64_t u, Unit& f) {
    const C* pre = as<C>(p.pre) + saved_row(p, rows, d, n) * kGates * p.H + u;
    LSTM_FUSED_UNROLL
    for (int j = 0; j < Cell::kPreacts; ++j) f.preact[j] = 0;
    LSTM_FUSED_UNROLL
    for (int j = 0; j < kGates; ++j) f.preact[j] = pre[Values::input_gate(j) * p.H];
    if (p.b_ih[d]) {
      const S* b_ih = as<S>(p.b_ih[d]) + u;
      const S* b_hh = as<S>(p.b_hh[d]) + u;
      LSTM_FUSED_UNROLL
      for (int j = 0; j < kGates; ++j) {
        f.preact[j] += load(b_ih[Values::input_gate(j) * p.H]);
        f.preact[Values::kFirstHidden + j] += load(b_hh[j * p.H]);
      }
    }
    fetch_state(p, rows, d, n, u, f);
  }

  static LSTM_FUSED_DEVICE void fetch_state(const RecurrenceParams& p, const StepRows& rows, int d,
                                            int64_t n, int64_t u, Unit& f) {
    fetch_constants<Cell, S>(p, rows, d, n, u, f);
    f.prev[0] = 0;
    if constexpr (Values::kCarried > 0) {
      const bool reset = reset_before(p, rows, d == 1, n);
      const bool carried = n < rows.active_prev && !reset;
      LSTM_FUSED_UNROLL
      for (int k = 0; k < Values::kCarried; ++k) {
        if (carried)
          f.prev[k] = carry_of<Cell, S>(p, d, n, u, k);
        else
          f.prev[k] = initial_carried<Cell, S>(p, d, n, u, k, reset);
      }
    }
  }

  static LSTM_FUSED_DEVICE void add(Unit& f, const C (&product)[kGates]) {
    LSTM_FUSED_UNROLL
    for (int j = 0; j < kGates; ++j) f.preact[Values::kFirstHidden + j] += product[j];
  }

  // The cell, once the product is added. statistics: of a cell that normalizes, else null.
  static LSTM_FUSED_DEVICE void finish(const RecurrenceParams& p, const StepRows& rows, int d,
                                       int64_t n, int64_t u, Unit& f, const C* statistics,
                                       S (&out)[kOut]) {
    f.next[0] = 0;
    f.h = round_to<S>(f.forward(statistics));
    out[0] = p.projection ? f.h : passed_on<S>(p, rows, d, n, u, f.h);
  }

  static LSTM_FUSED_DEVICE bool apply(const RecurrenceParams& p, const StepRows& rows, int d,
                                      int64_t n, int64_t u, Unit& f, const C (&product)[kGates],
                                      S (&out)[kOut]) {
    add(f, product);
    finish(p, rows, d, n, u, f, nullptr, out);
    return true;
  }

  static LSTM_FUSED_DEVICE void store(const RecurrenceParams& p, const StepRows& rows, int d,
                                      int64_t n, int64_t u, const Unit& f) {
    const int64_t row = saved_row(p, rows, d, n);
    const bool last = n >= rows.active_next;
    LSTM_FUSED_UNROLL
    for (int k = 0; k < Values::kCarried; ++k) {
      carry_of<Cell, S>(p, d, n, u, k) = f.next[k];
      if (p.saved_states) as<C>(p.saved_states)[(row * Values::kSaved + k) * p.H + u] = f.next[k];
    }
    if (p.y) {
      const int64_t width = Values::kCells * p.H;
      LSTM_FUSED_UNROLL
      for (int k = 0; k < Values::kCells; ++k) {
        const S c = round_to<S>(f.next[k]);
        const int64_t at = k * p.H + u;
        if (last) as<S>(p.c_n)[(d * p.N + n) * width + at] = c;
        if (p.cell_states) as<S>(p.y)[cell_at(p, rows, d, n, width, at)] = c;
      }
      if (!p.projection) {
        as<S>(p.y)[hidden_at(p, rows, d, n, u)] = f.h;
        if (last) as<S>(p.h_n)[(d * p.N + n) * p.H + u] = f.h;
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
