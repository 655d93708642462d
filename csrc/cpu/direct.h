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
  using Base::G, Base::lanes, Base::p, Base::T, Base::N, Base::I, Base::H, Base::R;
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

  // Vectors summed before the sum joins the total: a long dot product in pieces is more exact.
  static constexpr int64_t kPiece = 32;

  // acc[g][r] += w[g * H * K + k] * a[r][k], lane by lane over k.
  template <int Rows>
  LSTM_FUSED_INLINE void multiply_rows(const S* w, int64_t K, const A* const* a,
                                       V (&acc)[G][Rows]) const {
    const int64_t whole = K / lanes * lanes;
    for (int64_t k = 0; k < whole; k += kPiece * lanes)
      multiply_piece<Rows>(w, K, k, min64(k + kPiece * lanes, whole), a, acc);
    if (whole == K) return;
    for (int g = 0; g < G; ++g) {
      const V row = load_first<V>(w + g * H * K + whole, K - whole);
      for (int r = 0; r < Rows; ++r) acc[g][r] += row * load_first<V>(a[r] + whole, K - whole);
    }
  }

  template <int Rows>
  LSTM_FUSED_INLINE void multiply_piece(const S* w, int64_t K, int64_t begin, int64_t end,
                                        const A* const* a, V (&acc)[G][Rows]) const {
    V piece[G][Rows] = {};
    for (int64_t k = begin; k < end; k += lanes) {
      V x[Rows];
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) x[r] = load<V>(a[r] + k);
#pragma GCC unroll 4
      for (int g = 0; g < G; ++g) {
        const V row = load<V>(w + g * H * K + k);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) piece[g][r] += row * x[r];
      }
    }
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g)
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) acc[g][r] += piece[g][r];
  }

  // One vector of units of `Rows` batch rows, from the dot products to the stored state.
  template <int Rows>
  void cell(int d, int64_t step, int64_t vec, const int64_t* n, const A* const* x) const {
    const Weights& w = p.weights[d];
    const int64_t u0 = vec * lanes;
    const A* h[Rows];
    for (int r = 0; r < Rows; ++r) h[r] = this->hidden(d, step, n[r]);
    V dots[G][Rows][lanes] = {};
    const bool has_hidden = step > 0 || p.h0;
    for (int64_t l = 0; l < min64(lanes, H - u0); ++l) {
      V acc[G][Rows] = {};
      multiply_rows<Rows>(static_cast<const S*>(w.w_ih) + (u0 + l) * I, I, x, acc);
      if (has_hidden) multiply_rows<Rows>(static_cast<const S*>(w.w_hh) + (u0 + l) * R, R, h, acc);
      for (int g = 0; g < G; ++g)
        for (int r = 0; r < Rows; ++r) dots[g][r][l] = acc[g][r];
    }
    for (int r = 0; r < Rows; ++r) {
      V gate[G];
      for (int g = 0; g < G; ++g) {
        transpose(dots[g][r]);
        V sum = dots[g][r][0];
#pragma GCC unroll 16
        for (int l = 1; l < lanes; ++l) sum += dots[g][r][l];
        const int64_t row = g * H + u0;
        if (w.b_ih) {
          sum += load_first<V>(static_cast<const S*>(w.b_ih) + row, H - u0) +
                 load_first<V>(static_cast<const S*>(w.b_hh) + row, H - u0);
        }
        gate[g] = sum;
      }
      this->finish(d, step, n[r], vec, gate);
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
        for (int64_t v = units.begin; v < units.end; ++v) {
          switch (count) {
            case 1: k.template cell<1>(d, step, v, n, x); break;
            case 2: k.template cell<2>(d, step, v, n, x); break;
            case 3: k.template cell<3>(d, step, v, n, x); break;
            default: k.template cell<4>(d, step, v, n, x); break;
          }
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
