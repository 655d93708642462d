// The direct forward kernel, for a few steps of a few rows (streaming, T = 1): nothing is packed,
// each weight row is read once where it lies, as a dot product over k, sixteen of which are
// transposed together into one vector of units for the same cell update as everywhere.
#pragma once

#include "forward.h"

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

  // Weights are asked for so many elements before they are used: rows follow each other.
  static constexpr int64_t kAhead = 2048 / sizeof(S);

  // Vectors summed before the sum joins the total: a long dot product in pieces is more exact.
  static constexpr int64_t kPiece = 32;

  // Units whose dot products run side by side: a cell of few gates needs several to hide latency.
  static constexpr int kUnits = kMaxCols / G < lanes ? kMaxCols / G : lanes;
  static constexpr int kDots = kUnits * G;

  // acc[i][r] += the sum over k of w[i][k] * a[r][k], lane by lane.
  template <int Rows>
  static LSTM_FUSED_INLINE void multiply_rows(const S* const (&w)[kDots], int64_t K,
                                              const A* const* a, V (&acc)[kDots][Rows]) {
    const int64_t whole = K / lanes * lanes;
    for (int64_t k = 0; k < whole; k += kPiece * lanes)
      multiply_piece<Rows>(w, k, min64(k + kPiece * lanes, whole), a, acc);
    if (whole == K) return;
    for (int i = 0; i < kDots; ++i) {
      const V row = load_first<V>(w[i] + whole, K - whole);
      for (int r = 0; r < Rows; ++r) acc[i][r] += row * load_first<V>(a[r] + whole, K - whole);
    }
  }

  template <int Rows>
  static LSTM_FUSED_INLINE void multiply_piece(const S* const (&w)[kDots], int64_t begin,
                                               int64_t end, const A* const* a,
                                               V (&acc)[kDots][Rows]) {
    V piece[kDots][Rows] = {};
    for (int64_t k = begin; k < end; k += lanes) {
      V x[Rows];
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) x[r] = load<V>(a[r] + k);
#pragma GCC unroll 4
      for (int i = 0; i < kDots; ++i) {
        __builtin_prefetch(w[i] + k + kAhead);
        const V row = load<V>(w[i] + k);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) piece[i][r] += row * x[r];
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kDots; ++i)
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) acc[i][r] += piece[i][r];
  }

  // Dot products of units [u, u + kUnits) that are below H, into lane u - u0 of sums [First, ...).
  template <int First, int Rows>
  LSTM_FUSED_INLINE void add_dots(const void* weights, int (*gate)(int), int64_t K, int64_t u0,
                                  int64_t u, const A* const* a, V (&dots)[P][Rows][lanes]) const {
    const S* w[kDots];
    for (int i = 0; i < kDots; ++i) {
      const int64_t row = gate(i % G) * H + min64(u + i / G, H - 1);
      w[i] = static_cast<const S*>(weights) + row * K;
    }
    V acc[kDots][Rows] = {};
    multiply_rows<Rows>(w, K, a, acc);
    for (int i = 0; i < kDots; ++i)
      for (int r = 0; r < Rows; ++r) {
        V& dot = dots[First + i % G][r][u - u0 + i / G];
        dot = dot + acc[i][r];
      }
  }

  // One vector of units of `Rows` batch rows, from the dot products to the stored state.
  template <int Rows>
  void cell(int d, int64_t step, int64_t vec, const int64_t* n, const A* const* x) const {
    const Weights& w = p.weights[d];
    const int64_t u0 = vec * lanes;
    const A* h[Rows];
    for (int r = 0; r < Rows; ++r) h[r] = this->hidden(d, step, n[r]);
    V dots[P][Rows][lanes] = {};
    const bool has_hidden = step > 0 || p.h0;
    for (int64_t u = u0; u < min64(u0 + lanes, H); u += kUnits) {
      add_dots<0>(w.w_ih, Cell::input_gate, I, u0, u, x, dots);
      if (has_hidden) add_dots<P - G>(w.w_hh, Cell::hidden_gate, R, u0, u, h, dots);
    }
    for (int r = 0; r < Rows; ++r) {
      V sums[P];
      for (int j = 0; j < P; ++j) {
        transpose(dots[j][r]);
        V sum = dots[j][r][0];
#pragma GCC unroll 16
        for (int l = 1; l < lanes; ++l) sum += dots[j][r][l];
        sums[j] = sum + this->bias_sum(w, j, u0);
      }
      this->finish(d, step, n[r], vec, sums);
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
      for (int d = place.direction_group; d < k.p.size.D; d += k.plan.direction_groups) {
        for (int64_t i = place.unit_group; i < group.count; i += k.plan.unit_groups)
          k.init_row(d, group.row(i));
        barrier.wait();
        for (int64_t step = 0; step < k.T; ++step) {
          walk(d, step);
          k.leave(d, step, group, units, units);
          barrier.wait();
        }
      }
    }

    void walk(int d, int64_t step) const {
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
          // To and fro from call to call, to find in the cache what was read last.
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
