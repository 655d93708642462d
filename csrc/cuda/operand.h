// Epilogues of a cell with an operand (cells/described.h), whose steps have two products, forward
// and backward.
#pragma once

#include "backward.h"
#include "forward.h"

namespace lstm_fused::cuda {

// Element `e` in what the first epilogue of a step leaves to the second, `values` of a unit.
template <class C, class I>
LSTM_FUSED_DEVICE C* between(const RecurrenceParams& p, const Element<I>& e, int values) {
  return as<C>(p.between) + e.unit_at(p, e.batch_row(p), values);
}

// After the product of h with the gates that multiply it: the operand.
template <class Cell, class S>
struct OperandCell : ForwardCell<Cell, S> {
  using C = Compute<S>;
  using Base = ForwardCell<Cell, S>;
  using typename Base::Constants;
  using typename Base::Unit;
  static constexpr int kGates = Cell::kGates - 1;
  static_assert(kGates > 0);

  template <class I>
  static LSTM_FUSED_DEVICE bool apply(const RecurrenceParams&, const Element<I>&,
                                      const Constants& constants, Unit& f,
                                      const C (&product)[kGates], S (&out)[1]) {
    Base::add(constants, f, product);
    out[0] = round_to<S>(f.operand());
    return true;
  }

  template <class I>
  static LSTM_FUSED_DEVICE void store(const RecurrenceParams& p, const Element<I>& e,
                                      const Unit& f) {
    C* preacts = between<C>(p, e, Cell::kPreacts);
    LSTM_FUSED_UNROLL
    for (int j = 0; j < Cell::kPreacts; ++j) preacts[j * p.H] = f.preact[j];
  }
};

// After the product of the operand with the last gate: the cell.
template <class Cell, class S>
struct OperandForward : ForwardCell<Cell, S> {
  using C = Compute<S>;
  using Base = ForwardCell<Cell, S>;
  using Constants = NoConstants;
  using typename Base::Unit;
  static constexpr int kGates = 1;

  template <class I>
  static LSTM_FUSED_DEVICE void fetch(const RecurrenceParams& p, const Element<I>& e, Unit& f) {
    const C* preacts = between<C>(p, e, Cell::kPreacts);
    LSTM_FUSED_UNROLL
    for (int j = 0; j < Cell::kPreacts; ++j) f.preact[j] = preacts[j * p.H];
    Base::fetch_state(p, e, f, false);
  }

  template <class I>
  static LSTM_FUSED_DEVICE bool apply(const RecurrenceParams& p, const Element<I>& e,
                                      const Constants&, Unit& f, const C (&product)[1],
                                      S (&out)[1]) {
    f.preact[Cell::kPreacts - 1] += product[0];
    Base::finish(p, e, f, nullptr, out);
    return true;
  }
};

// After the product with the transposed gates that multiply h: the gradient of h, and that of the
// last pre-activation.
template <class Cell, class S>
struct OperandGradient : BackwardCell<Cell, S> {
  using C = Compute<S>;
  using Base = BackwardCell<Cell, S>;
  using typename Base::Constants;
  using typename Base::Unit;
  static constexpr int kOut = 1;

  template <class I>
  static LSTM_FUSED_DEVICE bool apply(const RecurrenceParams& p, const Element<I>& e,
                                      const Constants&, Unit& f, const C (&product)[1],
                                      S (&out)[1]) {
    if (e.n >= e.rows.active) {
      Base::end(f, product);
      return false;
    }
    Base::complete(p, e, f);
    f.h = Base::gradient_of_h(p, f, product);
    f.dh = product[0];
    out[0] = round_to<S>(f.last_gradient(f.h, f.d_state));
    return true;
  }

  template <class I>
  static LSTM_FUSED_DEVICE void store(const RecurrenceParams& p, const Element<I>& e,
                                      const Unit& f) {
    if (!Base::store_ended(p, e, f)) *between<C>(p, e, 1) = f.h;
  }
};

// After the product with the transposed last gate: all other gradients. f.h is the operand then.
template <class Cell, class S>
struct OperandBackward : BackwardCell<Cell, S> {
  using C = Compute<S>;
  using Base = BackwardCell<Cell, S>;
  using typename Base::Constants;
  using typename Base::Unit;
  static constexpr int kOut = Cell::kGates - 1;

  template <class I>
  static LSTM_FUSED_INLINE I row_count(const StepRowsOf<I>& rows) {
    return rows.active;
  }

  template <class I>
  static LSTM_FUSED_DEVICE void fetch(const RecurrenceParams& p, const Element<I>& e, Unit& f) {
    Base::fetch(p, e, f);
    f.dh = *between<C>(p, e, 1);
  }

  template <class I>
  static LSTM_FUSED_DEVICE bool apply(const RecurrenceParams& p, const Element<I>& e,
                                      const Constants&, Unit& f, const C (&product)[1],
                                      S (&out)[kOut]) {
    Base::complete(p, e, f);
    f.h = f.backward_with_operand(f.dh, product[0], f.d_state, f.d_preact, f.d_vector);
    LSTM_FUSED_UNROLL
    for (int j = 0; j < kOut; ++j) out[j] = round_to<S>(f.d_preact[Base::Values::kFirstHidden + j]);
    return true;
  }

  template <class I>
  static LSTM_FUSED_DEVICE void store(const RecurrenceParams& p, const Element<I>& e,
                                      const Unit& f) {
    Base::store_gradients(p, e, f, false);
  }
};

// The epilogues of a step's product, or of its first and its second: with a projection or with an
// operand.
template <class Cell, class S, bool has_operand = HasOperand<Cell>>
struct Epilogues {
  using Forward = ForwardCell<Cell, S>;
  using Backward = BackwardCell<Cell, S>;
  using SecondForward = Project<S>;
  using FirstBackward = ProjectedGradient<S>;
};
template <class Cell, class S>
struct Epilogues<Cell, S, true> {
  using Forward = OperandCell<Cell, S>;
  using Backward = OperandBackward<Cell, S>;
  using SecondForward = OperandForward<Cell, S>;
  using FirstBackward = OperandGradient<Cell, S>;
};

}  // namespace lstm_fused::cuda
