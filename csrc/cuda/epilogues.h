// What is done with a unit's sums, for each product of params.h. An epilogue has
//   kGates     m-tiles of a unit: rows gate(m) * units + unit of A
//   kOut       values a unit publishes for the next product
//   kBackward  whether the walk is the backward one
//   reach      rows the product is wanted for, which the host asks too
//   Unit       what is known of a unit of a row, from fetch to store
//   fetch      reads what is there before the product is known
//   apply      from the product to what the next one needs; false where nothing is published
//   store      writes what only later launches need
// n: row, u: unit, d: direction.
#pragma once

#include "arithmetic.h"
// The cells need sigmoid and tanh declared before them.
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

// Row n of this step in what lies as (S, D, ...).
LSTM_FUSED_DEVICE int64_t data_row(const RecurrenceParams& p, const StepRows& rows, int d,
                                   int64_t n) {
  return (rows.offset + n) * p.D + d;
}

template <class Cell, class S>
struct ForwardCell {
  using C = Compute<S>;
  static constexpr int kGates = Cell::kGates;
  static constexpr int kOut = 1;
  static constexpr bool kBackward = false;
  static constexpr int kFirstHidden = Cell::kPreacts - Cell::kGates;

  struct Unit {
    C sum[Cell::kPreacts];
    C c_prev, c;
    S h;
  };

  static LSTM_FUSED_DEVICE int64_t gate(int m) { return Cell::hidden_gate(m); }
  static LSTM_FUSED_INLINE int64_t reach(const StepRows& rows) { return rows.active; }

  static LSTM_FUSED_DEVICE void fetch(const RecurrenceParams& p, const StepRows& rows, int d,
                                      int64_t n, int64_t u, Unit& f) {
    const C* pre = as<C>(p.pre) + data_row(p, rows, d, n) * kGates * p.H + u;
    LSTM_FUSED_UNROLL
    for (int j = 0; j < Cell::kPreacts; ++j) f.sum[j] = 0;
    LSTM_FUSED_UNROLL
    for (int j = 0; j < kGates; ++j) f.sum[j] = pre[Cell::input_gate(j) * p.H];
    if (p.b_ih[d]) {
      const S* b_ih = as<S>(p.b_ih[d]) + u;
      const S* b_hh = as<S>(p.b_hh[d]) + u;
      LSTM_FUSED_UNROLL
      for (int j = 0; j < kGates; ++j) {
        f.sum[j] += load(b_ih[Cell::input_gate(j) * p.H]);
        f.sum[kFirstHidden + j] += load(b_hh[Cell::hidden_gate(j) * p.H]);
      }
    }
    f.c_prev = 0;
    if constexpr (Cell::kCarry != Carry::kNone) {
      const void* start = Cell::kCarry == Carry::kCell ? p.c0 : p.h0;
      const int64_t at = (d * p.N + n) * p.H + u;
      if (n < rows.before)
        f.c_prev = as<C>(p.carry)[at];
      else if (start)
        f.c_prev = load(as<S>(start)[at]);
    }
  }

  static LSTM_FUSED_DEVICE bool apply(const StepRows&, int64_t, Unit& f, const C (&total)[kGates],
                                      S (&out)[kOut]) {
    LSTM_FUSED_UNROLL
    for (int j = 0; j < kGates; ++j) f.sum[kFirstHidden + j] += total[j];
    f.c = 0;
    f.h = round_to<S>(Cell::forward(f.sum, f.c_prev, f.c));
    out[0] = f.h;
    return true;
  }

  static LSTM_FUSED_DEVICE void store(const RecurrenceParams& p, const StepRows& rows, int d,
                                      int64_t n, int64_t u, const Unit& f) {
    const int64_t state = (d * p.N + n) * p.H + u, row = data_row(p, rows, d, n);
    const bool ends = n >= rows.after;
    if constexpr (Cell::kCarry != Carry::kNone) {
      as<C>(p.carry)[state] = f.c;
      if (p.cells) as<C>(p.cells)[row * p.H + u] = f.c;
    }
    if constexpr (Cell::kCarry == Carry::kCell)
      if (ends) as<S>(p.c_n)[state] = round_to<S>(f.c);
    if (!p.projection) {
      as<S>(p.y)[row * p.R + u] = f.h;
      if (ends) as<S>(p.h_n)[state] = f.h;
    }
    if (p.gates) {
      C* gates = as<C>(p.gates) + row * Cell::kPreacts * p.H + u;
      LSTM_FUSED_UNROLL
      for (int j = 0; j < Cell::kPreacts; ++j) gates[j * p.H] = f.sum[j];
    }
  }
};

// h after the projection: a unit is one of R.
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
  static LSTM_FUSED_INLINE int64_t reach(const StepRows& rows) { return rows.active; }
  static LSTM_FUSED_DEVICE void fetch(const RecurrenceParams&, const StepRows&, int, int64_t,
                                      int64_t, Unit&) {}

  static LSTM_FUSED_DEVICE bool apply(const StepRows&, int64_t, Unit& f, const C (&total)[1],
                                      S (&out)[1]) {
    out[0] = f.h = round_to<S>(total[0]);
    return true;
  }

  static LSTM_FUSED_DEVICE void store(const RecurrenceParams& p, const StepRows& rows, int d,
                                      int64_t n, int64_t u, const Unit& f) {
    as<S>(p.y)[data_row(p, rows, d, n) * p.R + u] = f.h;
    if (n >= rows.after) as<S>(p.h_n)[(d * p.N + n) * p.R + u] = f.h;
  }
};

// The gradient of h from outside: that of y, and of h_n where a row begins its walk back.
template <class S>
LSTM_FUSED_DEVICE Compute<S> outer_gradient(const RecurrenceParams& p, const StepRows& rows, int d,
                                            int64_t n, int64_t u) {
  Compute<S> dh = 0;
  if (p.dy) dh += load(as<S>(p.dy)[data_row(p, rows, d, n) * p.R + u]);
  if (p.dh_n && n >= rows.before) dh += load(as<S>(p.dh_n)[(d * p.N + n) * p.R + u]);
  return dh;
}

// What the gradient of w_hh is a product with.
template <class S>
LSTM_FUSED_DEVICE void store_before(const RecurrenceParams& p, const StepRows& rows, int d,
                                    int64_t n, int64_t u) {
  if (!p.before) return;
  S h{};
  if (n < rows.after)
    h = as<S>(p.h)[((rows.offset_after + n) * p.D + d) * p.R + u];
  else if (p.h0)
    h = as<S>(p.h0)[(d * p.N + n) * p.R + u];
  as<S>(p.before)[data_row(p, rows, d, n) * p.R + u] = h;
}

// Rows alive, and those whose walk back ended with the step before: what d_gates pass on to them is
// the gradient of h0.
LSTM_FUSED_INLINE int64_t backward_reach(const StepRows& rows) {
  return rows.active > rows.before ? rows.active : rows.before;
}

template <class Cell, class S>
struct BackwardCell {
  using C = Compute<S>;
  static constexpr int kGates = 1;
  static constexpr int kOut = Cell::kGates;
  static constexpr bool kBackward = true;
  static constexpr int kFirstHidden = Cell::kPreacts - Cell::kGates;

  struct Unit {
    C saved[Cell::kPreacts];
    C c_prev, c, dh, dc;  // of h0, where a row's walk has ended: dh
    C d_sum[Cell::kPreacts];
    C h;
  };

  static LSTM_FUSED_DEVICE int64_t gate(int) { return 0; }
  static LSTM_FUSED_INLINE int64_t reach(const StepRows& rows) { return backward_reach(rows); }

  static LSTM_FUSED_DEVICE void fetch(const RecurrenceParams& p, const StepRows& rows, int d,
                                      int64_t n, int64_t u, Unit& f) {
    const int64_t state = (d * p.N + n) * p.H + u;
    f.dc = 0;
    if constexpr (Cell::kCarry != Carry::kNone) {
      if (n < rows.before)
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
      const C* cells = as<C>(p.cells) + u;
      const void* start = Cell::kCarry == Carry::kCell ? p.c0 : p.h0;
      f.c = cells[data_row(p, rows, d, n) * p.H];
      if (n < rows.after)
        f.c_prev = cells[((rows.offset_after + n) * p.D + d) * p.H];
      else if (start)
        f.c_prev = load(as<S>(start)[state]);
    }
    f.dh = p.projection ? C(0) : outer_gradient<S>(p, rows, d, n, u);
  }

  static LSTM_FUSED_DEVICE bool apply(const StepRows& rows, int64_t n, Unit& f, const C (&total)[1],
                                      S (&out)[kOut]) {
    if (n >= rows.active) {
      f.dh = Cell::kCarry == Carry::kHidden ? total[0] + f.dc : total[0];
      return false;
    }
    f.h = Cell::backward(f.saved, f.c_prev, f.c, f.dh + total[0], f.dc, f.d_sum);
    LSTM_FUSED_UNROLL
    for (int j = 0; j < kOut; ++j)
      out[Cell::hidden_gate(j)] = round_to<S>(f.d_sum[kFirstHidden + j]);
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
    for (int j = 0; j < Cell::kPreacts; ++j) d_gates[j * p.H] = round_to<S>(f.d_sum[j]);
    if (!p.projection) store_before<S>(p, rows, d, n, u);
  }
};

// The gradient of h after the projection, a unit is one of R: the next product takes it back
// through the projection.
template <class S>
struct JoinGradients {
  using C = Compute<S>;
  static constexpr int kGates = 1;
  static constexpr int kOut = 1;
  static constexpr bool kBackward = true;
  struct Unit {
    C dh;
    S joined;
  };

  static LSTM_FUSED_DEVICE int64_t gate(int) { return 0; }
  static LSTM_FUSED_INLINE int64_t reach(const StepRows& rows) { return backward_reach(rows); }

  static LSTM_FUSED_DEVICE void fetch(const RecurrenceParams& p, const StepRows& rows, int d,
                                      int64_t n, int64_t u, Unit& f) {
    f.dh = n < rows.active ? outer_gradient<S>(p, rows, d, n, u) : C(0);
  }

  static LSTM_FUSED_DEVICE bool apply(const StepRows& rows, int64_t n, Unit& f, const C (&total)[1],
                                      S (&out)[1]) {
    out[0] = f.joined = round_to<S>(f.dh + total[0]);
    return n < rows.active;
  }

  static LSTM_FUSED_DEVICE void store(const RecurrenceParams& p, const StepRows& rows, int d,
                                      int64_t n, int64_t u, const Unit& f) {
    if (n >= rows.active) {
      if (p.dh0) as<S>(p.dh0)[(d * p.N + n) * p.R + u] = f.joined;
      return;
    }
    as<S>(p.d_hidden)[data_row(p, rows, d, n) * p.R + u] = f.joined;
    store_before<S>(p, rows, d, n, u);
  }
};

}  // namespace lstm_fused::cuda
