// The buffers of a persistent forward pass and its packed weights: [16-lane vector of
// units][k][gate][lane], so that a register tile holds all gates of a vector of units.
#pragma once

#include "forward_state.h"
#include "pack.h"
#include "row_statistics.h"
#include "team.h"

namespace lstm_fused {
namespace {

template <class Cell, class S, class M>
struct ForwardBuffers : ForwardState<Cell, S, M> {
  using Base = ForwardState<Cell, S, M>;
  using Base::G, Base::P, Base::kMaxPreacts, Base::lanes, Base::p, Base::T, Base::N, Base::I,
      Base::H, Base::R;
  using typename Base::A;
  using typename Base::E;
  using typename Base::V;
  static_assert(Cell::kGates <= kMaxCols, "a register tile holds all gates of a unit");
  // Whether a tile's sums go through memory: of cells of one pre-activation, and of described ones.
  static constexpr bool kThroughMemory = Cell::kPreacts == 1 || kIsAny<Cell>;
  static constexpr int kTileSize = kMaxCols * lanes;  // a row of a tile, in memory
  // Whether rows of x are copied (converted, padded) first because tiles cannot read them in place.
  bool stages() const { return !p.size.x_is_preacts && (!Same<S, E>::value || I % M::kPair != 0); }
  bool hoists() const { return plan.hoist_steps > 0 && !p.size.x_is_preacts; }

  const Plan& plan;
  const int64_t depth_x, depth_h;  // tile steps of the two parts
  const int64_t chunk_rows;        // max rows whose input part is computed at once
  E* packed;          // (D, tiles, depth_x + depth_h, vectors of a tile, G, lanes * kPair)
  A* bias;            // (D, vectors, P, lanes)
  A* packed_hr;       // (D, Rp, H) in panels, or null
  E* packed_operand;  // (D, Hp, H) in panels: rows of W_hh's last gate, if a cell has an operand
  E* operand;         // (D, N, Rp) the operands of a step
  A* pre;             // (threads, tiles of a slice, chunk_rows, kMaxCols, lanes), hoisting only
  E* staged;          // (threads, chunk_rows, Ip), if stages()
  const E** rows;     // (threads, chunk_rows)
  Barrier* barriers;  // one a direction and row group, then the team's
  RowStatistics<A> statistics;
  // Of a cell that normalizes or has an operand, for each thread: (rows of a group, vectors of a
  // slice, P, lanes) the pre-activations of a step, then (vectors of a slice, kMaxUnitGroups *
  // kMaxCols, lanes).
  A* parts;

  static int64_t steps_of(int64_t elements) { return ceil_div(elements, M::kPair); }
  int64_t Ip() const { return round_up(I, 2 * kBlock); }
  // Vectors of units in a tile: a cell of one gate needs four for a tile's four columns. They are
  // of one head.
  int tile_vectors() const { return !kThroughMemory || p.size.heads() > 1 ? 1 : kMaxCols / G; }
  int64_t slice() const {
    return ceil_div(ceil_div(p.size.blocks(), plan.unit_groups) * (kBlock / lanes), tile_vectors());
  }
  int groups() const { return plan.direction_groups * plan.row_groups; }

  ForwardBuffers(const typename Base::Params& params, const Plan& the_plan, Arena& arena)
      : Base(params, arena),
        plan(the_plan),
        depth_x(p.size.x_is_preacts ? 0 : steps_of(I)),
        depth_h(T == 1 && !this->has_initial() ? 0 : steps_of(p.size.K)),
        chunk_rows(max64(1, plan.hoist_steps) * ceil_div(N, plan.row_groups)),
        statistics(this->normalized_groups(), plan, N, arena) {
    const int D = p.size.D;
    const int threads = plan.threads;
    packed = arena.take<E>(D * this->vectors * panel_size());
    bias = arena.take<A>(D * this->vectors * P * lanes);
    packed_hr = p.weights[0].w_hr ? arena.take<A>(D * this->Rp * H) : nullptr;
    const bool operands = this->has_operand();
    packed_operand = operands ? arena.take<E>(D * this->Hp * steps_of(H) * M::kPair) : nullptr;
    operand = operands ? arena.take<E>(D * N * this->Rp) : nullptr;
    pre = hoists() ? arena.take<A>(threads * slice() * chunk_rows * kTileSize) : nullptr;
    staged = stages() ? arena.take<E>(threads * chunk_rows * Ip()) : nullptr;
    rows = arena.take<const E*>(threads * chunk_rows);
    barriers = arena.take<Barrier>(groups() + 1);
    parts = this->finishes_later() ? arena.take<A>(threads * thread_parts()) : nullptr;
  }

  void init_barriers() {
    for (int i = 0; i < groups(); ++i) barriers[i].init(plan.unit_groups);
    barriers[groups()].init(plan.threads);
  }

  int64_t slice_vectors() const { return slice() * tile_vectors(); }
  int64_t row_parts() const { return slice_vectors() * P * lanes; }
  int64_t thread_parts() const {
    return statistics.rows * row_parts() + slice_vectors() * kMaxUnitGroups * kMaxCols * lanes;
  }
  bool has_hidden(int64_t step) const { return depth_h > 0 && (step > 0 || this->has_initial()); }
  // Of the units of a vector: where the hidden states that their weights multiply begin.
  int64_t head_of(int64_t vec) const {
    const int64_t K = p.size.K;
    return kIsAny<Cell> && p.size.heads() > 1 ? vec * lanes / K * K : 0;
  }
  int64_t panel_size() const { return (depth_x + depth_h) * G * lanes * M::kPair; }
  E* panel(int d, int64_t vec) const { return packed + (d * this->vectors + vec) * panel_size(); }
  E* hidden_panel(int d, int64_t vec, int cols) const {
    return panel(d, vec) + depth_x * cols * G * lanes * M::kPair;
  }
  A* bias_of(int d, int64_t vec) const { return bias + (d * this->vectors + vec) * P * lanes; }

  // The tile of `cols` vectors of units from vec on.
  void pack(int d, int64_t vec, int cols) const {
    const Weights& w = p.weights[d];
    for (int col = 0; col < cols; ++col) {
      const int64_t u = (vec + col) * lanes;
      const auto put = [&](const void* weights, int gates, int j, int gate, int64_t K, E* to) {
        const int c = col * gates + j;
        pack_rows_as_lanes<M>(to + Strips<M>::offset(steps_of(K), c),
                              Strips<M>::pitch(cols * gates, c),
                              static_cast<const S*>(weights) + (gate * H + u) * K, H - u, K);
      };
      for (int j = 0; depth_x > 0 && j < G; ++j)
        put(w.w_ih, G, j, input_gate_of(G, P, j), I, panel(d, vec));
      const int hidden_gates = this->hidden_gates();
      for (int j = 0; depth_h > 0 && j < hidden_gates; ++j)
        put(w.w_hh, hidden_gates, j, j, p.size.K, hidden_panel(d, vec, cols));
      for (int j = 0; j < P; ++j) store(bias_of(d, vec + col) + j * lanes, this->bias_sum(w, j, u));
    }
  }

  Panels<Multiply<A>> projection_panels(int d, int unit_group) const {
    const Range v = vector_slice<A>(R, plan.unit_groups, unit_group);
    return {v, H, packed_hr + d * this->Rp * H + v.begin * lanes * H};
  }
  Panels<M> operand_panels(int d, int unit_group) const {
    const Range v = vector_slice<A>(H, plan.unit_groups, unit_group);
    const int64_t column = steps_of(H) * M::kPair;
    return {v, steps_of(H), packed_operand + (d * this->Hp + v.begin * lanes) * column};
  }
};

}  // namespace
}  // namespace lstm_fused
