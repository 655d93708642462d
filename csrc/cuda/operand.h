// Epilogues of a cell with an operand (cells/described.h), whose steps have two products, forward
// and backward.
#pragma once

#include "backward.h"
#include "forward.h"

namespace lstm_fused::cuda {

// After the product of h with the gates that multiply it: the operand. Leaves the pre-activations
// to the second epilogue.
template <class Cell, class S>
struct OperandCell : ForwardCell<Cell, S> {
  using C = Compute<S>;
  using Base = ForwardCell<Cell, S>;
  using typename Base::Unit;
  static constexpr int kGates = Cell::kGates - 1, P = Cell::kPreacts;
  static_assert(kGates > 0);

  static LSTM_FUSED_DEVICE bool apply(const RecurrenceParams&, const StepRows&, int, int64_t,
                                      int64_t, Unit& f, const C (&product)[kGates], S (&out)[1]) {
    LSTM_FUSED_UNROLL
    for (int j = 0; j < kGates; ++j) f.preact[Base::Values::kFirstHidden + j] += product[j];
    out[0] = round_to<S>(f.operand());
    return true;
  }

  static LSTM_FUSED_DEVICE void store(const RecurrenceParams& p, const StepRows&, int d, int64_t n,
                                      int64_t u, const Unit& f) {
    C* between = as<C>(p.between) + (d * p.N + n) * P * p.H + u;
    LSTM_FUSED_UNROLL
    for (int j = 0; j < P; ++j) between[j * p.H] = f.preact[j];
  }
};

// After the product of the operand with the last gate: the cell.
template <class Cell, class S>
struct OperandForward : ForwardCell<Cell, S> {
  using C = Compute<S>;
  using Base = ForwardCell<Cell, S>;
  using typename Base::Unit;
  static constexpr int kGates = 1, P = Cell::kPreacts;

  static LSTM_FUSED_DEVICE void fetch(const RecurrenceParams& p, const StepRows& rows, int d,
                                      int64_t n, int64_t u, Unit& f) {
    const C* between = as<C>(p.between) + (d * p.N + n) * P * p.H + u;
    LSTM_FUSED_UNROLL
    for (int j = 0; j < P; ++j) f.preact[j] = between[j * p.H];
    Base::fetch_state(p, rows, d, n, u, f);
  }

  static LSTM_FUSED_DEVICE bool apply(const RecurrenceParams& p, const StepRows& rows, int d,
                                      int64_t n, int64_t u, Unit& f, const C (&product)[kGates],
                                      S (&out)[1]) {
    f.preact[P - 1] += product[0];
    Base::finish(p, rows, d, n, u, f, nullptr, out);
    return true;
  }
};

// After the product with the transposed gates that multiply h: the gradient of h, which it leaves
// to the second epilogue, and that of the last pre-activation.
template <class Cell, class S>
struct OperandGradient : BackwardCell<Cell, S> {
  using C = Compute<S>;
  using Base = BackwardCell<Cell, S>;
  using typename Base::Unit;
  static constexpr int kOut = 1;

  static LSTM_FUSED_DEVICE bool apply(const RecurrenceParams& p, const StepRows& rows, int,
                                      int64_t n, int64_t, Unit& f, const C (&product)[1],
                                      S (&out)[1]) {
    if (n >= rows.active) {
      Base::end(f, product);
      return false;
    }
    f.h = Base::gradient_of_h(p, f, product);
    f.dh = product[0];
    out[0] = round_to<S>(f.last_gradient(f.h, f.d_state));
    return true;
  }

  static LSTM_FUSED_DEVICE void store(const RecurrenceParams& p, const StepRows& rows, int d,
                                      int64_t n, int64_t u, const Unit& f) {
    if (Base::store_ended(p, rows, d, n, u, f)) return;
    as<C>(p.between)[(d * p.N + n) * p.H + u] = f.h;
  }
};

// After the product with the transposed last gate: all other gradients.
template <class Cell, class S>
struct OperandBackward : BackwardCell<Cell, S> {
  using C = Compute<S>;
  using Base = BackwardCell<Cell, S>;
  using typename Base::Unit;
  static constexpr int kOut = Cell::kGates - 1;

  static LSTM_FUSED_INLINE int64_t row_count(const StepRows& rows) { return rows.active; }

  static LSTM_FUSED_DEVICE void fetch(const RecurrenceParams& p, const StepRows& rows, int d,
                                      int64_t n, int64_t u, Unit& f) {
    Base::fetch(p, rows, d, n, u, f);
    f.dh = as<C>(p.between)[(d * p.N + n) * p.H + u];
  }

  static LSTM_FUSED_DEVICE bool apply(const RecurrenceParams&, const StepRows&, int, int64_t,
                                      int64_t, Unit& f, const C (&product)[1], S (&out)[kOut]) {
    f.h = f.backward_with_operand(f.dh, product[0], f.d_state, f.d_preact, f.d_vector);
    LSTM_FUSED_UNROLL
    for (int j = 0; j < kOut; ++j) out[j] = round_to<S>(f.d_preact[Base::Values::kFirstHidden + j]);
    return true;
  }

  // f.h is the operand, which p.hidden has of such a cell.
  static LSTM_FUSED_DEVICE void store(const RecurrenceParams& p, const StepRows& rows, int d,
                                      int64_t n, int64_t u, const Unit& f) {
    Base::store_gradients(p, rows, d, n, u, f);
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
