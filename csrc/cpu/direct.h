// The direct forward kernel, for a few steps of a few rows (streaming, T = 1). Nothing is packed:
// each row of the weights is read in place, once, as a dot product over k. Sixteen dot products are
// transposed together into one vector of units for the cell update of all kernels.
#pragma once

#include "forward_state.h"
#include "team.h"
#include "tile.h"
#include "transpose.h"

namespace lstm_fused {
namespace {

template <class Cell, class S, class A_>
struct DirectForward : ForwardState<Cell, S, Multiply<A_>> {
  using Base = ForwardState<Cell, S, Multiply<A_>>;
  using Base::G, Base::P, Base::lanes, Base::p, Base::T, Base::N, Base::I, Base::H, Base::R;
  using typename Base::A;
  using typename Base::V;
  static constexpr int kRows = 4;  // batch rows at once

  const Plan& plan;
  A* staged;  // (threads, N, Ip)
  Barrier* barriers;

  int64_t Ip() const { return round_up(I, kBlock); }
  int groups() const { return plan.direction_groups * plan.row_groups; }

  DirectForward(const ForwardParams& params, const Plan& the_plan, Arena& arena)
      : Base(params, arena), plan(the_plan) {
    staged = arena.take<A>(plan.threads * N * Ip());
    barriers = arena.take<Barrier>(groups());
  }

  void init_barriers() {
    for (int i = 0; i < groups(); ++i) barriers[i].init(plan.unit_groups);
  }

  // Vectors summed before the sum is added to the total: a long dot product in pieces is more
  // exact.
  static constexpr int64_t kPiece = 32;

  // Units whose dot products are computed together (register blocking): four rows of weights hide
  // the latency of a multiply-add; eight are read from the second-level cache at half the rate.
  static constexpr int kUnits = kMaxCols / G < lanes ? kMaxCols / G : lanes;

  // A weight's rows of each gate, from the first unit of a vector on.
  struct GateRows {
    const S* w[G];

    GateRows(const void* weights, int (*gate)(int), int64_t H, int64_t K, int64_t u0) {
      for (int j = 0; j < G; ++j) w[j] = static_cast<const S*>(weights) + (gate(j) * H + u0) * K;
    }
  };

  // The rows of kUnits units, all gates of one unit, then of the next. A unit past the layer's last
  // repeats the last.
  struct WeightRows {
    const S* w[kUnits * G];

    LSTM_FUSED_INLINE WeightRows(const GateRows& gates, int64_t K, int64_t u, int64_t last) {
      LSTM_FUSED_UNROLLED_FOR (int i = 0; i < kUnits * G; ++i)
        w[i] = gates.w[i % G] + min64(u + i / G, last) * K;
    }
  };

  // Products of G gates belong to the pre-activations [First, First + G) of their unit.
  template <int First>
  static constexpr int preact_of(int dot) {
    return dot / G * P + First + dot % G;
  }

  // acc[preact][r] += the sum over k of w[dot][k] * a[r][k], lane by lane.
  template <int First, int Rows>
  static LSTM_FUSED_INLINE void multiply_rows(const WeightRows& rows, int64_t K, const A* const* a,
                                              V (&acc)[kUnits * P][Rows]) {
    const int64_t whole = K / lanes * lanes;
    if (whole <= kPiece * lanes) {
      multiply_piece<First>(rows, 0, whole, a, acc);
    } else {
      for (int64_t k = 0; k < whole; k += kPiece * lanes) {
        V piece[kUnits * P][Rows] = {};
        multiply_piece<First>(rows, k, min64(k + kPiece * lanes, whole), a, piece);
        LSTM_FUSED_UNROLLED_FOR (int i = 0; i < kUnits * G; ++i)
          LSTM_FUSED_UNROLLED_FOR (int r = 0; r < Rows; ++r)
            acc[preact_of<First>(i)][r] += piece[preact_of<First>(i)][r];
      }
    }
    if (whole == K) return;
    for (int i = 0; i < kUnits * G; ++i) {
      const V row = load_first<V>(rows.w[i] + whole, K - whole);
      for (int r = 0; r < Rows; ++r)
        acc[preact_of<First>(i)][r] += row * load_first<V>(a[r] + whole, K - whole);
    }
  }

  template <int First, int Rows>
  static LSTM_FUSED_INLINE void multiply_piece(const WeightRows& rows, int64_t begin, int64_t end,
                                               const A* const* a, V (&acc)[kUnits * P][Rows]) {
    for (int64_t k = begin; k < end; k += lanes) {
      V x[Rows];
      LSTM_FUSED_UNROLLED_FOR (int r = 0; r < Rows; ++r) x[r] = load<V>(a[r] + k);
      LSTM_FUSED_UNROLLED_FOR (int i = 0; i < kUnits * G; ++i) {
        const V row = load<V>(rows.w[i] + k);
        LSTM_FUSED_UNROLLED_FOR (int r = 0; r < Rows; ++r)
          acc[preact_of<First>(i)][r] += row * x[r];
      }
    }
  }

  // One vector of units of `Rows` batch rows, from the dot products to the stored state.
  template <int Rows>
  void cell(int d, int64_t step, int64_t vec, const int64_t* n, const A* const* x) const {
    static_assert(lanes % kUnits == 0);
    const Weights& w = p.weights[d];
    const int64_t u0 = vec * lanes;
    const A* h[Rows];
    for (int r = 0; r < Rows; ++r) h[r] = this->hidden(d, step, n[r]);
    const GateRows ih(w.w_ih, Cell::input_gate, H, I, u0), hh(w.w_hh, Cell::hidden_gate, H, R, u0);
    V dots[P][Rows][lanes];
    const bool has_hidden = step > 0 || this->has_initial();
    const int64_t last = min64(lanes, H - u0) - 1;
    for (int64_t u = 0; u < lanes; u += kUnits) {
      V acc[kUnits * P][Rows] = {};
      if (u <= last) {
        multiply_rows<0>(WeightRows(ih, I, u, last), I, x, acc);
        if (has_hidden) multiply_rows<P - G>(WeightRows(hh, R, u, last), R, h, acc);
      }
      LSTM_FUSED_UNROLLED_FOR (int i = 0; i < kUnits; ++i)
        LSTM_FUSED_UNROLLED_FOR (int r = 0; r < Rows; ++r)
          LSTM_FUSED_UNROLLED_FOR (int j = 0; j < P; ++j) dots[j][r][u + i] = acc[i * P + j][r];
    }
    for (int r = 0; r < Rows; ++r) {
      V preacts[P];
      for (int j = 0; j < P; ++j) preacts[j] = sums_as_lanes(dots[j][r]) + this->bias_sum(w, j, u0);
      this->finish(d, step, n[r], vec, preacts);
    }
  }

  struct Worker {
    const DirectForward& k;
    const Place place;
    const RowGroup group;
    const Range units;
    A* staged;
    Barrier& barrier;

    Worker(const DirectForward& kernel, int i)
        : k(kernel),
          place(k.plan, i),
          group(k.p.size.steps, k.plan, place.row_group),
          units(vector_slice<A>(k.H, k.plan.unit_groups, place.unit_group)),
          staged(k.staged + i * k.N * k.Ip()),
          barrier(k.barriers[place.direction_group * k.plan.row_groups + place.row_group]) {}

    void run() const {
      const int first = k.p.size.first_direction() + place.direction_group;
      for (int d = first; d < k.p.size.end_direction(); d += k.plan.direction_groups) {
        for (int64_t i = place.unit_group; i < group.count; i += k.plan.unit_groups)
          k.init_row(d, group.row(i));
        barrier.wait();
        for (int64_t step = 0; step < k.T; ++step) {
          run_step(d, step);
          k.finish_step(d, step, group, units, units);
          barrier.wait();
        }
      }
    }

    void run_step(int d, int64_t step) const {
      const int64_t t = k.time(d, step);
      const int64_t active = group.active(k.active_at(d, step));
      for (int64_t first = 0; first < active; first += kRows) {
        const int count = static_cast<int>(min64(kRows, active - first));
        int64_t n[kRows];
        const A* x[kRows];
        for (int r = 0; r < count; ++r) {
          n[r] = group.row(first + r);
          x[r] = input_row(t, n[r]);
        }
        for (int64_t i = 0; i < units.size(); ++i) {
          // Boustrophedon traversal from call to call: the weights read last are still in the
          // cache.
          const int64_t v = (k.p.calls + step) % 2 ? units.end - 1 - i : units.begin + i;
          with_constant<kRows>(
              count, [&](auto rows) { k.template cell<decltype(rows)::value>(d, step, v, n, x); });
        }
      }
    }

    const A* input_row(int64_t t, int64_t n) const {
      const S* x = static_cast<const S*>(k.p.x.data) + k.p.x.row(k.p.size.steps, t, n);
      if constexpr (Same<S, A>::value) {
        return x;
      } else {
        A* copy = staged + n * k.Ip();
        stage_row(copy, x, k.I, k.Ip());
        return copy;
      }
    }
  };
};

}  // namespace
}  // namespace lstm_fused
