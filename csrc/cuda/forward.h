// Epilogues of the forward pass.
#pragma once

#include "epilogue.h"

namespace lstm_fused::cuda {

// The product with w_hh, and the cell: a unit is one of H.
template <class Cell, class S>
struct ForwardCell {
  using C = Compute<S>;
  using Values = UnitValues<Cell, C>;
  static constexpr int kGates = Cell::kGates;
  static constexpr int kOut = 1;
  static constexpr bool kBackward = false;

  struct Constants {
    C bias[Cell::kPreacts] = {};

    template <class I>
    LSTM_FUSED_DEVICE void load(const RecurrenceParams& p, int d, I u) {
      if (!p.b_ih[d]) return;
      const S *b_ih = as<S>(p.b_ih[d]) + u, *b_hh = as<S>(p.b_hh[d]) + u;
      LSTM_FUSED_UNROLL
      for (int j = 0; j < kGates; ++j) {
        bias[j] += cuda::load(b_ih[Values::input_gate(j) * p.H]);
        bias[Values::kFirstHidden + j] += cuda::load(b_hh[j * p.H]);
      }
    }
  };

  // Until apply, the first kGates preacts are the input's part.
  struct Unit : Values {
    S h;
    uint8_t reset_after;
  };

  static LSTM_FUSED_DEVICE int64_t gate(int m) { return m; }
  template <class I>
  static LSTM_FUSED_INLINE I row_count(const StepRowsOf<I>& rows) {
    return rows.active;
  }

  template <class I>
  static LSTM_FUSED_DEVICE void fetch(const RecurrenceParams& p, const Element<I>& e, Unit& f,
                                      bool follows = false) {
    const C* pre = as<C>(p.pre) + e.unit_at(p, e.saved_row(p), kGates);
    LSTM_FUSED_UNROLL
    for (int j = 0; j < kGates; ++j) f.preact[j] = pre[I(Values::input_gate(j)) * I(p.H)];
    fetch_state(p, e, f, follows);
  }

  template <class I>
  static LSTM_FUSED_DEVICE void fetch_state(const RecurrenceParams& p, const Element<I>& e, Unit& f,
                                            bool follows) {
    fetch_constants<Cell, S>(p, e, f);
    f.prev[0] = 0;
    if constexpr (Values::kCarried > 0) {
      const bool goes_on = e.n < e.rows.active_prev;
      const bool reset = (follows && goes_on ? f.reset_after : reset_before(p, e, e.d == 1)) != 0;
      LSTM_FUSED_UNROLL
      for (int k = 0; k < Values::kCarried; ++k) {
        if (!goes_on || reset)
          f.prev[k] = initial_carried<Cell, S>(p, e, k, reset);
        else
          f.prev[k] = follows ? f.next[k] : carry_of<Cell, S>(p, e, k);
      }
    }
    f.reset_after = reset_after(p, e, e.d == 1);
  }

  // The product is that of the first gates.
  template <int count>
  static LSTM_FUSED_DEVICE void add(const Constants& constants, Unit& f,
                                    const C (&product)[count]) {
    C preact[Cell::kPreacts];
    LSTM_FUSED_UNROLL
    for (int j = 0; j < Cell::kPreacts; ++j)
      preact[j] = j < kGates ? f.preact[j] + constants.bias[j] : constants.bias[j];
    LSTM_FUSED_UNROLL
    for (int j = 0; j < count; ++j) preact[Values::kFirstHidden + j] += product[j];
    LSTM_FUSED_UNROLL
    for (int j = 0; j < Cell::kPreacts; ++j) f.preact[j] = preact[j];
  }

  // The cell, once the product is added. statistics: of a cell that normalizes, else null. The next
  // step takes the reset state for h if it begins anew.
  template <class I>
  static LSTM_FUSED_DEVICE void finish(const RecurrenceParams& p, const Element<I>& e, Unit& f,
                                       const C* statistics, S (&out)[kOut]) {
    f.next[0] = 0;
    f.h = round_to<S>(f.forward(statistics));
    out[0] = f.h;
    if (f.reset_after && !p.projection) out[0] = initial_hidden<S>(p, e, true);
  }

  template <class I>
  static LSTM_FUSED_DEVICE bool apply(const RecurrenceParams& p, const Element<I>& e,
                                      const Constants& constants, Unit& f,
                                      const C (&product)[kGates], S (&out)[kOut]) {
    add(constants, f, product);
    finish(p, e, f, nullptr, out);
    return true;
  }

  template <class I>
  static LSTM_FUSED_DEVICE void store(const RecurrenceParams& p, const Element<I>& e, const Unit& f,
                                      bool followed = false) {
    const I row = e.saved_row(p);
    const bool last = e.n >= e.rows.active_next;
    LSTM_FUSED_UNROLL
    for (int k = 0; k < Values::kCarried; ++k) {
      if (!followed) carry_of<Cell, S>(p, e, k) = f.next[k];
      if (p.saved_states) as<C>(p.saved_states)[e.unit_at(p, row, Values::kSaved, k)] = f.next[k];
    }
    if (p.y) {
      LSTM_FUSED_UNROLL
      for (int k = 0; k < Values::kCells; ++k) {
        const S c = round_to<S>(f.next[k]);
        if (last) as<S>(p.c_n)[e.unit_at(p, e.batch_row(p), Values::kCells, k)] = c;
        if (p.cell_states) as<S>(p.y)[e.cell_at(p, Values::kCells, k)] = c;
      }
      if (!p.projection) {
        as<S>(p.y)[e.hidden_at(p)] = f.h;
        if (last) as<S>(p.h_n)[e.unit_at(p, e.batch_row(p), 1)] = f.h;
      }
    }
    if (p.gates) {
      C* gates = as<C>(p.gates) + e.unit_at(p, row, Cell::kPreacts);
      LSTM_FUSED_UNROLL
      for (int j = 0; j < Cell::kPreacts; ++j) gates[I(j) * I(p.H)] = f.preact[j];
    }
  }
};

// The projection of h by w_hr: a unit is one of R.
template <class S>
struct Project {
  using C = Compute<S>;
  using Constants = NoConstants;
  static constexpr int kGates = 1;
  static constexpr int kOut = 1;
  static constexpr bool kBackward = false;
  struct Unit {
    S h;
    uint8_t reset_after;
  };

  static LSTM_FUSED_DEVICE int64_t gate(int) { return 0; }
  template <class I>
  static LSTM_FUSED_INLINE I row_count(const StepRowsOf<I>& rows) {
    return rows.active;
  }
  template <class I>
  static LSTM_FUSED_DEVICE void fetch(const RecurrenceParams& p, const Element<I>& e, Unit& f,
                                      bool = false) {
    f.reset_after = reset_after(p, e, e.d == 1);
  }

  template <class I>
  static LSTM_FUSED_DEVICE bool apply(const RecurrenceParams& p, const Element<I>& e,
                                      const Constants&, Unit& f, const C (&product)[1],
                                      S (&out)[1]) {
    f.h = round_to<S>(product[0]);
    out[0] = f.reset_after ? initial_hidden<S>(p, e, true) : f.h;
    return true;
  }

  template <class I>
  static LSTM_FUSED_DEVICE void store(const RecurrenceParams& p, const Element<I>& e, const Unit& f,
                                      bool = false) {
    if (!p.y) return;
    as<S>(p.y)[e.hidden_at(p)] = f.h;
    if (e.n >= e.rows.active_next) as<S>(p.h_n)[wide_product(e.batch_row(p), I(p.R)) + e.u] = f.h;
  }
};

}  // namespace lstm_fused::cuda
