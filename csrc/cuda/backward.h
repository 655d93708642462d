// Epilogues of the backward pass.
#pragma once

#include "epilogue.h"

namespace lstm_fused::cuda {

// The gradient of h that comes from outside the layer: of y, and of h_n at a row's last time step,
// where its backward pass starts.
template <class S>
struct OuterGradient {
  S dy, dh_n;

  template <class I>
  LSTM_FUSED_DEVICE void fetch(const RecurrenceParams& p, const Element<I>& e) {
    dy = dh_n = S{};
    if (p.dy) dy = as<S>(p.dy)[e.hidden_at(p)];
    if (p.dh_n && e.n >= e.rows.active_prev)
      dh_n = as<S>(p.dh_n)[wide_product(e.batch_row(p), I(p.R)) + e.u];
  }
  LSTM_FUSED_DEVICE Compute<S> sum() const { return load(dy) + load(dh_n); }
};

// What parts a row's step from the time steps next to it, and h that the time step began with,
// which the gradient of w_hh is a product of.
template <class S>
struct Surroundings {
  bool reset_follows;    // a reset before the time step after this one: the gradients that come
                         // from there are the reset state's
  uint8_t reset_before;  // not 0 for a reset before this time step
  S h_prev;              // where p.h_prev is wanted, unless a reset put in another

  // of_h: whether the unit is one of h, which it is not of a cell before its projection.
  template <class I>
  LSTM_FUSED_DEVICE void fetch(const RecurrenceParams& p, const Element<I>& e, bool follows,
                               bool of_h) {
    reset_follows = e.n < e.rows.active_prev &&
                    (follows ? reset_before : cuda::reset_before(p, e, e.d == 0)) != 0;
    reset_before = e.n < e.rows.active ? reset_after(p, e, e.d == 0) : 0;
    h_prev = S{};
    if (!of_h || !p.h_prev || e.n >= e.rows.active) return;
    if (e.n < e.rows.active_next)
      h_prev = as<S>(
          p.h)[wide_product(e.rows.offset_next + e.n, I(p.y_width)) + (I(e.d) * I(p.R) + e.u)];
    else
      h_prev = initial_hidden<S>(p, e, false);
  }

  template <class I>
  LSTM_FUSED_DEVICE void store(const RecurrenceParams& p, const Element<I>& e) const {
    if (!p.h_prev) return;
    as<S>(p.h_prev)[wide_product(e.data_row(p), I(p.R)) + e.u] =
        reset_before ? initial_hidden<S>(p, e, true) : h_prev;
  }
};

// Adds to the gradient of the reset state, where it is wanted; at: of its `sums`. One thread has
// all steps of an element.
template <class C>
LSTM_FUSED_DEVICE void add_reset_gradient(void* sums, int64_t at, C value) {
  if (sums) as<C>(sums)[at] += value;
}

// Stores the gradient of an initial state at index `at`, and that of the reset state so many values
// behind it; sum_at: of its sums.
template <class S>
LSTM_FUSED_DEVICE void store_state_gradient(void* gradient, int64_t at, int64_t behind,
                                            const void* sums, int64_t sum_at, Compute<S> value) {
  if (!gradient) return;
  S* to = as<S>(gradient) + at;
  *to = round_to<S>(value);
  if (sums) to[behind] = round_to<S>(as<Compute<S>>(sums)[sum_at]);
}
template <class S, class I>
LSTM_FUSED_DEVICE void store_hidden_gradient(const RecurrenceParams& p, const Element<I>& e,
                                             Compute<S> value) {
  store_state_gradient<S>(p.dh0, wide_product(e.state_row(p, false), I(p.R)) + e.u, p.N * p.R,
                          p.dh_reset, wide_product(e.batch_row(p), I(p.R)) + e.u, value);
}

// Active rows, and those whose backward pass ended with the previous step: the product of that
// step's d_gates is the gradient of their h0.
template <class I>
LSTM_FUSED_INLINE I backward_row_count(const StepRowsOf<I>& rows) {
  return rows.active > rows.active_prev ? rows.active : rows.active_prev;
}

// The product with w_hh^T, and the cell's gradients: a unit is one of H.
template <class Cell, class S>
struct BackwardCell {
  using C = Compute<S>;
  using Values = UnitValues<Cell, C>;
  using Constants = NoConstants;
  static constexpr int kGates = 1;
  static constexpr int kOut = Cell::kGates;
  static constexpr bool kBackward = true;

  struct Unit : Values {
    OuterGradient<S> outer;
    Surroundings<S> around;
    S d_cells[Values::kCells + 1];  // from outside the layer, of the cell states of this step
    C dh;                           // after apply: what goes to h0 or to the reset state
    C h;
    C d_state[Values::kCarried + 1], d_preact[Cell::kPreacts], d_vector[Values::kVectors + 1];
  };

  static LSTM_FUSED_DEVICE int64_t gate(int) { return 0; }
  template <class I>
  static LSTM_FUSED_INLINE I row_count(const StepRowsOf<I>& rows) {
    return backward_row_count(rows);
  }

  template <class I>
  static LSTM_FUSED_DEVICE void fetch(const RecurrenceParams& p, const Element<I>& e, Unit& f,
                                      bool follows = false) {
    f.around.fetch(p, e, follows, !p.projection);
    fetch_state_gradients(p, e, f, follows);
    if (e.n >= e.rows.active) return;
    LSTM_FUSED_UNROLL
    for (int k = 0; k < Values::kCells; ++k) {
      f.d_cells[k] = S{};
      if (p.cell_states && p.dy) f.d_cells[k] = as<S>(p.dy)[e.cell_at(p, Values::kCells, k)];
    }
    const I row = e.saved_row(p);
    const C* preacts = as<C>(p.gates) + e.unit_at(p, row, Cell::kPreacts);
    LSTM_FUSED_UNROLL
    for (int j = 0; j < Cell::kPreacts; ++j) f.preact[j] = preacts[I(j) * I(p.H)];
    fetch_constants<Cell, S>(p, e, f);
    f.next[0] = f.prev[0] = 0;
    if constexpr (Values::kCarried > 0) {
      const I row_before = (e.rows.offset_next + e.n) * I(p.D) + I(e.d) * (1 + I(p.saved_shift));
      const C* states = as<C>(p.saved_states);
      LSTM_FUSED_UNROLL
      for (int k = 0; k < Values::kCarried; ++k) {
        f.next[k] = states[e.unit_at(p, row, Values::kSaved, k)];
        if (e.n < e.rows.active_next)
          f.prev[k] = states[e.unit_at(p, row_before, Values::kSaved, k)];
        else
          f.prev[k] = initial_carried<Cell, S>(p, e, k, false);
      }
    }
    if (!p.projection) f.outer.fetch(p, e);
  }

  // Those of the carried states from the time step after this one, or of the final states.
  template <class I>
  static LSTM_FUSED_DEVICE void fetch_state_gradients(const RecurrenceParams& p,
                                                      const Element<I>& e, Unit& f, bool follows) {
    if constexpr (Values::kCarried == 0) f.d_state[0] = 0;
    LSTM_FUSED_UNROLL
    for (int k = 0; k < Values::kCarried; ++k) {
      if (e.n >= e.rows.active_prev) {
        f.d_state[k] = 0;
        if (k < Values::kCells && p.dc_n)
          f.d_state[k] = load(as<S>(p.dc_n)[e.unit_at(p, e.batch_row(p), Values::kCells, k)]);
      } else if (f.around.reset_follows) {
        f.d_state[k] = 0;
      } else if (!follows) {
        f.d_state[k] = carry_of<Cell, S>(p, e, k);
      }
    }
  }

  // The whole gradient of h, before apply. With a projection the product is within the step.
  static LSTM_FUSED_DEVICE C gradient_of_h(const RecurrenceParams& p, const Unit& f,
                                           const C (&product)[1]) {
    if (p.projection) return product[0];
    const C outer = f.outer.sum();
    return f.around.reset_follows ? outer : outer + product[0];
  }

  // What goes to h0, of a row whose backward pass ended with the step before.
  static LSTM_FUSED_DEVICE void end(Unit& f, const C (&product)[1]) {
    f.dh = Values::kHidden ? product[0] + f.d_state[Values::kCells] : product[0];
  }

  // Completes what fetch has loaded.
  template <class I>
  static LSTM_FUSED_DEVICE void complete(const RecurrenceParams& p, const Element<I>& e, Unit& f) {
    LSTM_FUSED_UNROLL
    for (int k = 0; k < Values::kCells; ++k) f.d_state[k] += load(f.d_cells[k]);
    if (!f.around.reset_before) return;
    LSTM_FUSED_UNROLL
    for (int k = 0; k < Values::kCarried; ++k) f.prev[k] = initial_carried<Cell, S>(p, e, k, true);
  }

  // statistics: of a cell that normalizes, which has called complete, else null.
  template <class I>
  static LSTM_FUSED_DEVICE bool apply(const RecurrenceParams& p, const Element<I>& e,
                                      const Constants&, Unit& f, const C (&product)[1],
                                      S (&out)[kOut], const C* statistics = nullptr) {
    if (e.n >= e.rows.active) {
      end(f, product);
      return false;
    }
    if (!statistics) complete(p, e, f);
    const C dh = gradient_of_h(p, f, product);
    f.dh = product[0];
    f.h = f.backward(dh, f.d_state, f.d_preact, f.d_vector, statistics);
    LSTM_FUSED_UNROLL
    for (int j = 0; j < kOut; ++j) out[j] = round_to<S>(f.d_preact[Values::kFirstHidden + j]);
    return true;
  }

  template <class I>
  static LSTM_FUSED_DEVICE void store(const RecurrenceParams& p, const Element<I>& e, const Unit& f,
                                      bool followed = false) {
    if (!store_ended(p, e, f)) store_gradients(p, e, f, followed);
  }

  // The reset state's gradients, and those of the initial states; whether the row has ended.
  template <class I>
  static LSTM_FUSED_DEVICE bool store_ended(const RecurrenceParams& p, const Element<I>& e,
                                            const Unit& f) {
    if (f.around.reset_follows) store_reset_gradients(p, e, f);
    if (e.n < e.rows.active) return false;
    store_initial_gradients(p, e, f);
    return true;
  }

  template <class I>
  static LSTM_FUSED_DEVICE void store_gradients(const RecurrenceParams& p, const Element<I>& e,
                                                const Unit& f, bool followed) {
    // The reset state's gradients are read from there.
    if (!followed || p.dh_reset || p.dc_reset) {
      LSTM_FUSED_UNROLL
      for (int k = 0; k < Values::kCarried; ++k) carry_of<Cell, S>(p, e, k) = f.d_state[k];
    }
    add_vector_gradients(p, e, f);
    const I row = e.data_row(p);
    if (p.hidden) as<S>(p.hidden)[e.unit_at(p, row, 1)] = round_to<S>(f.h);
    S* d_gates = as<S>(p.d_gates) + e.unit_at(p, row, Cell::kPreacts);
    LSTM_FUSED_UNROLL
    for (int j = 0; j < Cell::kPreacts; ++j) d_gates[I(j) * I(p.H)] = round_to<S>(f.d_preact[j]);
    if (!p.projection) f.around.store(p, e);
  }

 private:
  template <class I>
  static LSTM_FUSED_DEVICE void store_initial_gradients(const RecurrenceParams& p,
                                                        const Element<I>& e, const Unit& f) {
    if (!p.projection) store_hidden_gradient<S>(p, e, f.around.reset_follows ? C(0) : f.dh);
    LSTM_FUSED_UNROLL
    for (int k = 0; k < Values::kCells; ++k)
      store_state_gradient<S>(p.dc0, e.unit_at(p, e.state_row(p, false), Values::kCells, k),
                              p.N * Values::kCells * p.H, p.dc_reset,
                              e.unit_at(p, e.batch_row(p), Values::kCells, k), f.d_state[k]);
  }

  // What comes from the time step after a reset is the reset state's.
  template <class I>
  static LSTM_FUSED_DEVICE void store_reset_gradients(const RecurrenceParams& p,
                                                      const Element<I>& e, const Unit& f) {
    C of_h = f.dh;
    LSTM_FUSED_UNROLL
    for (int k = 0; k < Values::kCarried; ++k) {
      const C carried = carry_of<Cell, S>(p, e, k);
      if (k < Values::kCells)
        add_reset_gradient(p.dc_reset, e.unit_at(p, e.batch_row(p), Values::kCells, k), carried);
      else
        of_h += carried;
    }
    if (!p.projection)
      add_reset_gradient(p.dh_reset, wide_product(e.batch_row(p), I(p.R)) + e.u, of_h);
  }

  // One thread has all steps of a unit of a row.
  template <class I>
  static LSTM_FUSED_DEVICE void add_vector_gradients(const RecurrenceParams& p, const Element<I>& e,
                                                     const Unit& f) {
    if constexpr (Values::kVectors > 0) {
      if (!p.d_vectors) return;
      C* sums = as<C>(p.d_vectors) + e.unit_at(p, e.batch_row(p), Values::kVectors);
      LSTM_FUSED_UNROLL
      for (int j = 0; j < Values::kVectors; ++j) sums[I(j) * I(p.H)] += f.d_vector[j];
    }
  }
};

// With a projection, the product with w_hh^T gives the gradient of the projected h: a unit is one
// of R. The product with w_hr^T follows, whose epilogue is BackwardCell.
template <class S>
struct ProjectedGradient {
  using C = Compute<S>;
  using Constants = NoConstants;
  static constexpr int kGates = 1;
  static constexpr int kOut = 1;
  static constexpr bool kBackward = true;
  struct Unit {
    OuterGradient<S> outer;
    Surroundings<S> around;
    C dh;  // what goes to the reset state
    S dh_total;
  };

  static LSTM_FUSED_DEVICE int64_t gate(int) { return 0; }
  template <class I>
  static LSTM_FUSED_INLINE I row_count(const StepRowsOf<I>& rows) {
    return backward_row_count(rows);
  }

  template <class I>
  static LSTM_FUSED_DEVICE void fetch(const RecurrenceParams& p, const Element<I>& e, Unit& f,
                                      bool follows = false) {
    f.outer = {};
    if (e.n < e.rows.active) f.outer.fetch(p, e);
    f.around.fetch(p, e, follows, true);
  }

  template <class I>
  static LSTM_FUSED_DEVICE bool apply(const RecurrenceParams&, const Element<I>& e,
                                      const Constants&, Unit& f, const C (&product)[1],
                                      S (&out)[1]) {
    const C outer = f.outer.sum();
    out[0] = f.dh_total = round_to<S>(f.around.reset_follows ? outer : outer + product[0]);
    f.dh = product[0];
    return e.n < e.rows.active;
  }

  template <class I>
  static LSTM_FUSED_DEVICE void store(const RecurrenceParams& p, const Element<I>& e, const Unit& f,
                                      bool = false) {
    if (f.around.reset_follows)
      add_reset_gradient(p.dh_reset, wide_product(e.batch_row(p), I(p.R)) + e.u, f.dh);
    if (e.n >= e.rows.active) {
      store_hidden_gradient<S>(p, e, load(f.dh_total));
      return;
    }
    as<S>(p.d_hidden)[wide_product(e.data_row(p), I(p.R)) + e.u] = f.dh_total;
    f.around.store(p, e);
  }
};

}  // namespace lstm_fused::cuda
