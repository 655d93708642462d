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
  if (p.dy) dh += load(as<S>(p.dy)[hidden_at(p, rows, d, n, u)]);
  if (p.dh_n && n >= rows.active_prev) dh += load(as<S>(p.dh_n)[(d * p.N + n) * p.R + u]);
  return dh;
}

// Whether a reset parts row n's step from the time step after it, so that the gradients that come
// from there are the reset state's.
LSTM_FUSED_DEVICE bool reset_follows(const RecurrenceParams& p, const StepRows& rows, int d,
                                     int64_t n) {
  return n < rows.active_prev && reset_before(p, rows, d == 0, n);
}

// Adds to the gradient of the reset state, where it is wanted. One thread has all steps of an
// element.
template <class S>
LSTM_FUSED_DEVICE void add_reset_gradient(const RecurrenceParams& p, void* sums, int64_t width,
                                          int d, int64_t n, int64_t u, Compute<S> value) {
  if (sums) as<Compute<S>>(sums)[(d * p.N + n) * width + u] += value;
}

// Stores the gradient of an initial state, and that of the reset state in the rows after it.
template <class S>
LSTM_FUSED_DEVICE void store_state_gradient(const RecurrenceParams& p, void* gradient,
                                            const void* sums, int64_t width, int d, int64_t n,
                                            int64_t u, Compute<S> value) {
  if (!gradient) return;
  S* to = as<S>(gradient) + (d * p.state_rows + n) * width + u;
  *to = round_to<S>(value);
  if (sums) to[p.N * width] = round_to<S>(as<Compute<S>>(sums)[(d * p.N + n) * width + u]);
}

// Stores h that the time step began with, which the gradient of w_hh is a product of.
template <class S>
LSTM_FUSED_DEVICE void store_h_prev(const RecurrenceParams& p, const StepRows& rows, int d,
                                    int64_t n, int64_t u) {
  if (!p.h_prev) return;
  const bool reset = reset_after(p, rows, d == 0, n);
  as<S>(p.h_prev)[data_row(p, rows, d, n) * p.R + u] =
      n < rows.active_next && !reset ? as<S>(p.h)[(rows.offset_next + n) * p.y_width + d * p.R + u]
                                     : initial_state<S>(p, p.h0, d, n, p.R, u, reset);
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
  using Values = UnitValues<Cell, C>;
  static constexpr int kGates = 1;
  static constexpr int kOut = Cell::kGates;
  static constexpr bool kBackward = true;

  struct Unit : Values {
    // Until apply, dh is what comes from outside the layer. After it, it is what goes to h0 or to
    // the reset state.
    C dh, h;
    C d_state[Values::kCarried + 1], d_preact[Cell::kPreacts], d_vector[Values::kVectors + 1];
    bool reset;  // reset_follows
  };

  static LSTM_FUSED_DEVICE int64_t gate(int) { return 0; }
  static LSTM_FUSED_INLINE int64_t row_count(const StepRows& rows) {
    return backward_row_count(rows);
  }

  static LSTM_FUSED_DEVICE void fetch(const RecurrenceParams& p, const StepRows& rows, int d,
                                      int64_t n, int64_t u, Unit& f) {
    fetch_state_gradients(p, rows, d, n, u, f);
    if (n >= rows.active) return;
    if (p.cell_states && p.dy) {
      LSTM_FUSED_UNROLL
      for (int k = 0; k < Values::kCells; ++k)
        f.d_state[k] +=
            load(as<S>(p.dy)[cell_at(p, rows, d, n, Values::kCells * p.H, k * p.H + u)]);
    }
    const int64_t row = saved_row(p, rows, d, n);
    const C* preacts = as<C>(p.gates) + row * Cell::kPreacts * p.H + u;
    LSTM_FUSED_UNROLL
    for (int j = 0; j < Cell::kPreacts; ++j) f.preact[j] = preacts[j * p.H];
    fetch_constants<Cell, S>(p, rows, d, n, u, f);
    f.next[0] = f.prev[0] = 0;
    if constexpr (Values::kCarried > 0) {
      const bool reset = reset_after(p, rows, d == 0, n);
      const bool carried = n < rows.active_next && !reset;
      const int64_t row_before = (rows.offset_next + n) * p.D + d * (1 + p.saved_shift);
      const C* states = as<C>(p.saved_states) + u;
      LSTM_FUSED_UNROLL
      for (int k = 0; k < Values::kCarried; ++k) {
        f.next[k] = states[(row * Values::kSaved + k) * p.H];
        if (carried)
          f.prev[k] = states[(row_before * Values::kSaved + k) * p.H];
        else
          f.prev[k] = initial_carried<Cell, S>(p, d, n, u, k, reset);
      }
    }
    f.dh = p.projection ? C(0) : outer_gradient<S>(p, rows, d, n, u);
  }

  // Those of the carried states from the time step after this one, or of the final states.
  static LSTM_FUSED_DEVICE void fetch_state_gradients(const RecurrenceParams& p,
                                                      const StepRows& rows, int d, int64_t n,
                                                      int64_t u, Unit& f) {
    f.d_state[0] = 0;
    f.reset = reset_follows(p, rows, d, n);
    LSTM_FUSED_UNROLL
    for (int k = 0; k < Values::kCarried; ++k) {
      f.d_state[k] = 0;
      if (n >= rows.active_prev) {
        if (k < Values::kCells && p.dc_n)
          f.d_state[k] = load(as<S>(p.dc_n)[((d * p.N + n) * Values::kCells + k) * p.H + u]);
      } else if (!f.reset) {
        f.d_state[k] = carry_of<Cell, S>(p, d, n, u, k);
      }
    }
  }

  // The whole gradient of h, before apply. With a projection the product is within the step.
  static LSTM_FUSED_DEVICE C gradient_of_h(const RecurrenceParams& p, const Unit& f,
                                           const C (&product)[1]) {
    return f.reset && !p.projection ? f.dh : f.dh + product[0];
  }

  // What goes to h0, of a row whose backward pass ended with the step before.
  static LSTM_FUSED_DEVICE void end(Unit& f, const C (&product)[1]) {
    f.dh = Values::kHidden ? product[0] + f.d_state[Values::kCells] : product[0];
  }

  // statistics: of a cell that normalizes, else null.
  static LSTM_FUSED_DEVICE bool apply(const RecurrenceParams& p, const StepRows& rows, int,
                                      int64_t n, int64_t, Unit& f, const C (&product)[1],
                                      S (&out)[kOut], const C* statistics = nullptr) {
    if (n >= rows.active) {
      end(f, product);
      return false;
    }
    const C dh = gradient_of_h(p, f, product);
    f.dh = product[0];
    f.h = f.backward(dh, f.d_state, f.d_preact, f.d_vector, statistics);
    LSTM_FUSED_UNROLL
    for (int j = 0; j < kOut; ++j) out[j] = round_to<S>(f.d_preact[Values::kFirstHidden + j]);
    return true;
  }

  static LSTM_FUSED_DEVICE void store(const RecurrenceParams& p, const StepRows& rows, int d,
                                      int64_t n, int64_t u, const Unit& f) {
    if (!store_ended(p, rows, d, n, u, f)) store_gradients(p, rows, d, n, u, f);
  }

  // The reset state's gradients, and those of the initial states; whether the row has ended.
  static LSTM_FUSED_DEVICE bool store_ended(const RecurrenceParams& p, const StepRows& rows, int d,
                                            int64_t n, int64_t u, const Unit& f) {
    if (f.reset) store_reset_gradients(p, d, n, u, f);
    if (n < rows.active) return false;
    if (!p.projection)
      store_state_gradient<S>(p, p.dh0, p.dh_reset, p.R, d, n, u, f.reset ? C(0) : f.dh);
    LSTM_FUSED_UNROLL
    for (int k = 0; k < Values::kCells; ++k)
      store_state_gradient<S>(p, p.dc0, p.dc_reset, Values::kCells * p.H, d, n, k * p.H + u,
                              f.d_state[k]);
    return true;
  }

  static LSTM_FUSED_DEVICE void store_gradients(const RecurrenceParams& p, const StepRows& rows,
                                                int d, int64_t n, int64_t u, const Unit& f) {
    LSTM_FUSED_UNROLL
    for (int k = 0; k < Values::kCarried; ++k) carry_of<Cell, S>(p, d, n, u, k) = f.d_state[k];
    add_vector_gradients(p, d, n, u, f);
    const int64_t row = data_row(p, rows, d, n);
    if (p.hidden) as<S>(p.hidden)[row * p.H + u] = round_to<S>(f.h);
    S* d_gates = as<S>(p.d_gates) + row * Cell::kPreacts * p.H + u;
    LSTM_FUSED_UNROLL
    for (int j = 0; j < Cell::kPreacts; ++j) d_gates[j * p.H] = round_to<S>(f.d_preact[j]);
    if (!p.projection) store_h_prev<S>(p, rows, d, n, u);
  }

 private:
  // What comes from the time step after a reset is the reset state's.
  static LSTM_FUSED_DEVICE void store_reset_gradients(const RecurrenceParams& p, int d, int64_t n,
                                                      int64_t u, const Unit& f) {
    C of_h = f.dh;
    LSTM_FUSED_UNROLL
    for (int k = 0; k < Values::kCarried; ++k) {
      const C carried = carry_of<Cell, S>(p, d, n, u, k);
      if (k < Values::kCells)
        add_reset_gradient<S>(p, p.dc_reset, Values::kCells * p.H, d, n, k * p.H + u, carried);
      else
        of_h += carried;
    }
    if (!p.projection) add_reset_gradient<S>(p, p.dh_reset, p.R, d, n, u, of_h);
  }

  // One thread has all steps of a unit of a row.
  static LSTM_FUSED_DEVICE void add_vector_gradients(const RecurrenceParams& p, int d, int64_t n,
                                                     int64_t u, const Unit& f) {
    if constexpr (Values::kVectors > 0) {
      if (!p.d_vectors) return;
      C* sums = as<C>(p.d_vectors) + (d * p.N + n) * Values::kVectors * p.H + u;
      LSTM_FUSED_UNROLL
      for (int j = 0; j < Values::kVectors; ++j) sums[j * p.H] += f.d_vector[j];
    }
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
    C dh;  // after apply what goes to the reset state
    S dh_total;
    bool reset;  // reset_follows
  };

  static LSTM_FUSED_DEVICE int64_t gate(int) { return 0; }
  static LSTM_FUSED_INLINE int64_t row_count(const StepRows& rows) {
    return backward_row_count(rows);
  }

  static LSTM_FUSED_DEVICE void fetch(const RecurrenceParams& p, const StepRows& rows, int d,
                                      int64_t n, int64_t u, Unit& f) {
    f.dh = n < rows.active ? outer_gradient<S>(p, rows, d, n, u) : C(0);
    f.reset = reset_follows(p, rows, d, n);
  }

  static LSTM_FUSED_DEVICE bool apply(const RecurrenceParams&, const StepRows& rows, int, int64_t n,
                                      int64_t, Unit& f, const C (&product)[1], S (&out)[1]) {
    out[0] = f.dh_total = round_to<S>(f.reset ? f.dh : f.dh + product[0]);
    f.dh = product[0];
    return n < rows.active;
  }

  static LSTM_FUSED_DEVICE void store(const RecurrenceParams& p, const StepRows& rows, int d,
                                      int64_t n, int64_t u, const Unit& f) {
    if (f.reset) add_reset_gradient<S>(p, p.dh_reset, p.R, d, n, u, f.dh);
    if (n >= rows.active) {
      store_state_gradient<S>(p, p.dh0, p.dh_reset, p.R, d, n, u, load(f.dh_total));
      return;
    }
    as<S>(p.d_hidden)[data_row(p, rows, d, n) * p.R + u] = f.dh_total;
    store_h_prev<S>(p, rows, d, n, u);
  }
};

}  // namespace lstm_fused::cuda
