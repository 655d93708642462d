// One thread of the backward kernel: its units and rows, and a cell's functions on them.
#pragma once

#include "backward_state.h"

namespace lstm_fused {
namespace {

template <class Cell, class S, class M>
struct BackwardThread {
  using K = BackwardState<Cell, S, M>;
  using A = typename K::A;
  using E = typename K::E;
  using V = typename K::V;
  static constexpr int kMaxPreacts = K::kMaxPreacts, lanes = K::lanes;
  static constexpr bool kCarries = K::kCarries, kReadsInPlace = K::kReadsInPlace;

  const K& k;
  const int worker;
  const Place place;
  const RowGroup group;
  const Range units;    // vectors of hidden units: the cell's backward step
  const Range hiddens;  // vectors of the recurrent state: columns of W_hh
  Barrier& barrier;
  RowSums<A> sums;
  int d = 0;

  BackwardThread(const K& kernel, int i)
      : k(kernel),
        worker(i),
        place(k.plan, i),
        group(k.p.size.steps, k.plan, place.row_group),
        units(vector_slice<A>(k.H, k.plan.unit_groups, place.unit_group)),
        hiddens(vector_slice<A>(k.R, k.plan.unit_groups, place.unit_group)),
        barrier(k.barriers[place.direction_group * k.plan.row_groups + place.row_group]),
        sums(k.statistics, place, i, k.plan.unit_groups, barrier) {}

  // Where step t of the group's row i is among all steps' rows.
  int64_t row_of(int64_t t, int64_t i) const { return k.p.size.steps.row(t, group.row(i)); }

  A* bias_sums(bool all, int64_t block) const { return k.bias_sums(worker, all, d, block); }

  // The carried state before step t of row n, from unit u on: c0, or what the step before saved.
  const A* carried_into(int64_t t, int64_t n, int64_t u) const {
    const int64_t before = k.p.size.steps.before(d, t, n);
    if (before < 0) return k.carried0(d, n, k.p.size.steps.begins_anew(d, t, n)) + u;
    return k.saved_state(d, u / kBlock, k.p.size.steps.row(before, n)) + u % kBlock;
  }

  // What the functions of a described cell are given for one vector of units, and their results.
  struct Described {
    A masks[kMaxUnitValues * lanes], d_vectors[kMaxUnitValues * lanes];
    A dh[lanes], h[lanes], d_preacts[kMaxPreacts * lanes], operand[lanes];
  };
  UnitBackward<A> unit_at(int64_t t, int64_t n, int64_t s, int64_t vec, const V& dh, Described& own,
                          const A* statistics, const A* d_operand = nullptr) const {
    const int64_t u = vec * lanes, block = u / kBlock, lane = u % kBlock;
    load_masks<S, A>(k.p.size, k.p.weights[d].masks, k.p.unit->masks, t, n, u, own.masks);
    store(own.dh, dh);
    const bool first = k.p.size.steps.before(d, t, n) < 0;
    return {k.saved_gates(d, block, s) + lane,
            kBlock,
            k.unit_vectors_of(d, vec),
            own.masks,
            carried_into(t, n, u),
            first ? k.Hp : kBlock,
            k.saved_state(d, block, s) + lane,
            kBlock,
            own.dh,
            k.carried_gradients(d, n) + u,
            k.Hp,
            own.d_preacts,
            own.d_vectors,
            own.h,
            statistics,
            d_operand,
            own.operand};
  }

  void described(int64_t t, int64_t n, int64_t s, int64_t vec, const V& dh, const A* statistics,
                 const A* d_operand, V& h, V (&d_preact)[kMaxPreacts]) const {
    const int64_t u = vec * lanes;
    Described own;
    k.unit().backward(unit_at(t, n, s, vec, dh, own, statistics, d_operand));
    if (k.operands)
      store_first(k.operands + (d * k.S_rows + s) * k.H + u, load<V>(own.operand), k.H - u);
    h = load<V>(own.h);
    for (int j = 0; j < k.P; ++j) d_preact[j] = load<V>(own.d_preacts + j * lanes);
    A* sums = bias_sums(false, u / kBlock) + k.P * kBlock + u % kBlock;
    for (int j = 0; j < k.p.unit->vectors; ++j, sums += kBlock)
      store(sums, load<V>(sums) + load<V>(own.d_vectors + j * lanes));
  }

  void add_sums(int64_t t, int level, int64_t i, double* to) const {
    const UnitFunctions<A>& unit = k.unit();
    const int64_t n = group.row(i);
    V all[2 * kMaxUnitGroups] = {};
    for (int64_t vec = units.begin; vec < units.end; ++vec) {
      Described own;
      A both[2 * kMaxUnitGroups * lanes];
      const V dh = load<V>(k.dh + (d * k.N + n) * k.Hp + vec * lanes);
      unit.sums[level](unit_at(t, n, row_of(t, i), vec, dh, own, sums.statistics(i)), both);
      for (int j = 0, g = 0; g < unit.groups; ++g)
        for (int s = 0; s < 2 && unit.group[g].level == level; ++s, ++j)
          all[j] += keep_first(load<V>(both + j * lanes), k.H - vec * lanes);
    }
    for (int j = 0; j < 2 * unit.groups; ++j) to[j] = sums.sum(all[j]);
  }

  // The backward pass of a step of a cell that normalizes, whose gradients of h are known: the sums
  // that a level's gradients need, from the last level on, then the gradients.
  LSTM_FUSED_NOINLINE void normalize(int64_t step, int64_t active) {
    const UnitFunctions<A>& unit = k.unit();
    const int64_t t = k.time(d, step);
    for (int64_t i = 0; i < active; ++i)
      for (int g = 0; g < unit.groups; ++g) {
        const A* saved = k.saved_state(d, 0, row_of(t, i)) + (k.carried() + g) * kBlock;
        for (int j = 0; j < 2; ++j) sums.statistics(i)[4 * g + j] = saved[j];
      }
    for (int level = unit.levels - 1; level >= 0; --level)
      sums.run(
          unit, level, active, [&](int64_t i, double* to) { add_sums(t, level, i, to); },
          [&](int64_t i, int g, const auto& of) {
            for (int j = 0; j < 2; ++j) {
              double sum = 0;
              for (int from = 0; from < k.plan.unit_groups; ++from) sum += of(from)[j];
              sums.statistics(i)[4 * g + 2 + j] =
                  static_cast<A>(sum / static_cast<double>(unit.group[g].count * k.H));
            }
          });
    for (int64_t i = 0; i < active; ++i) {
      const int64_t n = group.row(i);
      for (int64_t vec = units.begin; vec < units.end; ++vec)
        finish_cell(t, n, row_of(t, i), vec, load<V>(dh_of(n, vec)), sums.statistics(i), nullptr);
    }
  }

  // The same of a cell with an operand, the gradients of whose last pre-activation are known: those
  // of the operand, then those of all else.
  LSTM_FUSED_NOINLINE void through_operand(int64_t step, int64_t active) const {
    barrier.wait();
    const Panels<M> panels = k.operand_panels(d, place.unit_group);
    const int64_t t = k.time(d, step), last = (k.P - 1) * kBlock;
    for (int64_t panel = 0; panel < panels.count(); ++panel)
      for_each_tile(0, active, [&](int64_t first, int n) {
        A out[kMaxRows * kMaxCols * lanes];
        GateProduct<M> tile(k, panels, panel, {0, k.Hb}, 1);
        tile.set_rows(n, [&](int r, int64_t block) {
          return k.preact_gradients(d, block, row_of(t, first + r)) + last;
        });
        multiply_tile(n, panels.cols(panel), tile.first(), out, false);
        for (int r = 0; r < n; ++r)
          for (int c = 0; c < panels.cols(panel); ++c) {
            const int64_t row = group.row(first + r), vec = panels.first_vector(panel) + c;
            finish_cell(t, row, row_of(t, first + r), vec, load<V>(dh_of(row, vec)), nullptr,
                        out + (r * kMaxCols + c) * lanes);
          }
      });
  }

  A* dh_of(int64_t n, int64_t vec) const { return k.dh + (d * k.N + n) * k.Hp + vec * lanes; }

  // The gradient of the last pre-activation, from which that of the operand follows.
  void put_last_gradient(int64_t t, int64_t n, int64_t s, int64_t vec, const V& dh) const {
    Described own;
    A found[lanes];
    k.unit().last_gradient(unit_at(t, n, s, vec, dh, own, nullptr), found);
    const int64_t u = vec * lanes;
    store(k.preact_gradients(d, u / kBlock, s) + (k.P - 1) * kBlock + u % kBlock,
          keep_first(load<V>(found), k.H - u));
  }

  void cell(int64_t t, int64_t n, int64_t s, int64_t vec, const V& dh) const {
    if constexpr (kIsAny<Cell>) {
      if (k.finishes_later()) store(dh_of(n, vec), dh);
      if (k.has_operand()) put_last_gradient(t, n, s, vec, dh);
      if (k.finishes_later()) return;
    }
    finish_cell(t, n, s, vec, dh, nullptr, nullptr);
  }

  LSTM_FUSED_INLINE void finish_cell(int64_t t, int64_t n, int64_t s, int64_t vec, const V& dh,
                                     [[maybe_unused]] const A* statistics,
                                     [[maybe_unused]] const A* d_operand) const {
    const int64_t u = vec * lanes;
    const int64_t block = u / kBlock, lane = u % kBlock;
    V h, d_preact[kMaxPreacts];
    if constexpr (kIsAny<Cell>) {
      described(t, n, s, vec, dh, statistics, d_operand, h, d_preact);
    } else {
      V saved[kMaxPreacts];
      const A* from = k.saved_gates(d, block, s) + lane;
      LSTM_FUSED_UNROLLED_FOR (int j = 0; j < kMaxPreacts; ++j)
        saved[j] = load<V>(from + j * kBlock);
      V c_prev = {}, c = {}, dc = {};
      if constexpr (kCarries) {
        c_prev = load<V>(carried_into(t, n, u));
        c = load<V>(k.saved_state(d, block, s) + lane);
        dc = load<V>(k.carried_gradients(d, n) + u);
      }
      h = Cell::backward(saved, c_prev, c, dh, dc, d_preact);
      if constexpr (kCarries) store(k.carried_gradients(d, n) + u, dc);
    }
    if (k.H - u < lanes)
      for (int j = 0; j < k.P; ++j) d_preact[j] = keep_first(d_preact[j], k.H - u);
    E* to = k.preact_gradients(d, block, s) + lane;
    A* sums = bias_sums(false, block) + lane;
    // The last one of a cell with an operand is there, and other threads read it.
    const int stored = k.P - k.has_operand();
    LSTM_FUSED_UNROLLED_FOR (int j = 0; j < k.P; ++j) {
      if (j < stored) store(to + j * kBlock, d_preact[j]);
      store(sums + j * kBlock, load<V>(sums + j * kBlock) + d_preact[j]);
    }
    if (k.projection) store(k.full + (d * k.S_rows + s) * k.Hp + u, h);
    if (k.hidden) store_first(k.hidden + (d * k.S_rows + s) * k.H + u, h, k.H - u);
  }
};

}  // namespace
}  // namespace lstm_fused
