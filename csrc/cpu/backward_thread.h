// One thread of the backward kernel: its units and rows, and a described cell's functions on them.
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
};

}  // namespace
}  // namespace lstm_fused
