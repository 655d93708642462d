// The buffers of a backward pass, and the product that its steps and its input gradient take.
#pragma once

#include "forward.h"
#include "in_place.h"

namespace lstm_fused {
namespace {

// Buffers and sizes of a backward call. Gradients of the pre-activations have the layout of the
// saved gates, (D, H/16, S, P, 16), which the products after the loop read without a shuffle. The
// first G pre-activations of a unit belong to the input's weights, the last G to the hidden
// state's.
template <class Cell, class S, class M>
struct BackwardState : CellFacts<Cell, typename M::Compute> {
  using A = typename M::Compute;
  using Facts = CellFacts<Cell, A>;
  using Facts::carried, Facts::cells, Facts::finishes_later, Facts::G, Facts::has_operand,
      Facts::hidden_gates, Facts::kCarries, Facts::P, Facts::saved, Facts::vectors_of_unit;
  using E = typename M::Element;
  using V = Vector<A>;
  static constexpr int kMaxPreacts = Cell::kPreacts;
  static constexpr int lanes = VectorOf<A>::lanes;
  static constexpr int per_block = kBlock / lanes;
  // Whether a plan may have weights read in place.
  static constexpr bool kReadsInPlace = Same<E, A>::value && !kIsAny<Cell>;

  const BackwardParams& p;
  const Plan& plan;
  const int64_t T, N, I, H, R, S_rows, Hb, Rb, Hp, Rp;
  const bool projection;
  const bool in_place;     // weights are read in place; E is A then
  const bool recurs;       // a step's product with W_hh is wanted
  const int sums_of_unit;  // over all rows: of P biases, and of a described cell's vectors

  E* d_preacts;  // (D, Hb, S, P, 16) in the type the tiles read
  A* dc;         // (D, N, carried, Hp) gradients of the carried states, if any
  A* c0;         // (D, rows, carried, Hp) the carried states at first, then what resets make them
  A* dh_reset;   // (D, N, Rp) gradients of what resets put in, if wanted
  A* dc_reset;   // (D, N, cells, Hp)
  E* d_hidden;   // (D, Rb, S, 16) gradients of the projected state, projection only
  A* full;       // (D, S, Hp) hidden states before the projection, projection only
  S* hidden;     // (D, S, H) hidden states as forward gave them, for d_w_hh without a projection
  S* resumed;    // (D, N, R) the hidden states of the checkpoint, for d_w_hh
  A* db;  // (threads, 2, D, Hb, sums_of_unit, 16) sums over rows: recent ones, and all before
  A* unit_vectors;    // (D, vectors of units, vectors, lanes) of a described cell
  S* head_rows;       // (threads, pair, R) of packing, where there are heads
  S* operands;        // (D, S, H) of a cell that has one, for d_w_hh
  E* packed_hh;       // (D, Rp, G * Hp) in panels: columns of W_hh, of the gates that multiply h
  E* packed_operand;  // (D, Rp, Hp) in panels: columns of W_hh's last gate, if a cell has an
                      // operand
  E* packed_hr;       // (D, Hp, R) in panels: columns of W_hr, projection only
  E* packed_ih;       // (D, Ip, G * Hp) in panels, dx only
  A* row_sums;        // (threads, InPlaceSums of a state or of dx), in place only
  Barrier* barriers;
  RowStatistics<A> statistics;
  A* dh;  // (D, N, Hp) the gradients of h of a step, of a cell that finishes later

  static int64_t steps_of(int64_t elements) { return ceil_div(elements, M::kPair); }
  // Tile steps of a product with gradients of some pre-activations of all units.
  int64_t gate_steps(int gates) const {
    return gates * (steps_of(H / kBlock * kBlock) + steps_of(H % kBlock));
  }
  int64_t Ip() const { return round_up(I, kBlock); }
  int groups() const { return plan.direction_groups * plan.row_groups; }

  // lasting: what the calls for the steps between checkpoints share.
  BackwardState(const BackwardParams& params, const Plan& the_plan, Arena& arena, Arena& lasting)
      : Facts(params.unit),
        p(params),
        plan(the_plan),
        T(p.size.steps.T),
        N(p.size.steps.N),
        I(p.size.I),
        H(p.size.H),
        R(p.size.R),
        S_rows(p.size.steps.rows()),
        Hb(ceil_div(H, kBlock)),
        Rb(ceil_div(R, kBlock)),
        Hp(Hb * kBlock),
        Rp(Rb * kBlock),
        projection(p.weights[0].w_hr != nullptr),
        in_place(plan.kernel == KernelKind::kDirect),
        recurs(p.size.K > 0 && (T > 1 || wants_initial())),
        sums_of_unit(P + vectors_of_unit()),
        statistics(this->normalized_groups(), plan, N, arena) {
    const int D = p.size.D;
    d_preacts = arena.take<E>(D * Hb * S_rows * P * kBlock);
    dc = kCarries ? arena.take<A>(D * N * carried() * Hp) : nullptr;
    c0 = kCarries ? arena.take<A>(D * c0_rows() * carried() * Hp) : nullptr;
    const bool learned = p.size.reset_states;
    dh_reset = learned && p.dh0 ? lasting.take<A>(D * N * Rp) : nullptr;
    dc_reset = learned && p.dc0 ? lasting.take<A>(D * N * cells() * Hp) : nullptr;
    d_hidden = projection ? arena.take<E>(D * Rb * S_rows * kBlock) : nullptr;
    full = projection ? arena.take<A>(D * S_rows * Hp) : nullptr;
    const bool wanted = p.dweights[0].w_hh || p.dweights[1].w_hh;
    hidden = wanted && !projection ? arena.take<S>(D * S_rows * H) : nullptr;
    resumed = wanted && p.resume ? arena.take<S>(D * N * R) : nullptr;
    db = lasting.take<A>(plan.threads * 2 * D * Hb * sums_of_unit * kBlock);
    unit_vectors = vectors_of_unit()
                       ? arena.take<A>(D * ceil_div(H, lanes) * vectors_of_unit() * lanes)
                       : nullptr;
    head_rows = p.size.heads() > 1 ? arena.take<S>(plan.threads * M::kPair * R) : nullptr;
    operands = wanted && has_operand() ? arena.take<S>(D * S_rows * H) : nullptr;
    packed_hh = recurs && !in_place ? arena.take<E>(D * Rp * G * Hp) : nullptr;
    packed_operand = has_operand() ? arena.take<E>(D * Rp * Hp) : nullptr;
    packed_hr = projection ? arena.take<E>(D * Hp * Rp) : nullptr;
    const bool reads_ih = p.dx && !in_place && !p.size.x_is_preacts;
    packed_ih = reads_ih ? arena.take<E>(D * Ip() * G * Hp) : nullptr;
    row_sums = in_place ? arena.take<A>(plan.threads * row_sums_size()) : nullptr;
    barriers = arena.take<Barrier>(groups() + 1);
    dh = finishes_later() ? arena.take<A>(D * N * Hp) : nullptr;
  }

  void init_barriers() {
    for (int i = 0; i < groups(); ++i) barriers[i].init(plan.unit_groups);
    barriers[groups()].init(plan.threads);
  }

  bool wants_initial() const { return p.dh0 || p.d_before; }
  GateOrder input_order() const { return {G, P, false}; }
  GateOrder hidden_order() const { return {hidden_gates(), P, true}; }
  GateOrder operand_order() const { return {1, P, true}; }
  const S* operand_weights(int d) const {
    return static_cast<const S*>(p.weights[d].w_hh) + (G - 1) * H * H;
  }

  // A row of a checkpoint, and of the gradients d_after and d_before.
  const A* checkpoint(int d, int64_t n) const {
    return static_cast<const A*>(p.resume) + (d * N + n) * (R + cells() * H);
  }
  // Where carried state k is in a checkpoint's row: a carried h is there in the place of h.
  int64_t carried_at(int k) const { return k < cells() ? R + k * H : 0; }
  int64_t between(int d, int64_t n) const { return (d * N + n) * (R + carried() * H); }

  int64_t c0_rows() const { return p.size.steps.resets ? 2 * N : N; }
  A* carried0(int d, int64_t n, bool reset, int k = 0) const {
    return c0 + ((d * c0_rows() + (reset ? N : 0) + n) * carried() + k) * Hp;
  }
  A* carried_gradients(int d, int64_t n, int k = 0) const {
    return dc + ((d * N + n) * carried() + k) * Hp;
  }
  A* unit_vectors_of(int d, int64_t vec) const {
    return unit_vectors + (d * ceil_div(H, lanes) + vec) * p.unit->vectors * lanes;
  }

  int64_t row_sums_size() const { return InPlaceSums<A>::size(max64(Rp, Ip())); }
  InPlaceSums<A> row_sums_of(int worker) const {
    return {row_sums + worker * row_sums_size(), max64(Rp, Ip())};
  }

  E* preact_gradients(int d, int64_t block, int64_t s) const {
    return d_preacts + ((d * Hb + block) * S_rows + s) * P * kBlock;
  }
  E* hidden_preact_gradients(int d, int64_t block, int64_t s) const {
    return preact_gradients(d, block, s) + (P - G) * kBlock;
  }
  const A* saved_gates(int d, int64_t block, int64_t s) const {
    return static_cast<const A*>(p.gates) + ((d * Hb + block) * S_rows + s) * P * kBlock;
  }
  const A* saved_state(int d, int64_t block, int64_t s) const {
    return static_cast<const A*>(p.saved_states) +
           ((d * Hb + block) * S_rows + s) * saved() * kBlock;
  }
  A* bias_sums(int worker, bool all, int d, int64_t block) const {
    return db + (((worker * 2 + all) * p.size.D + d) * Hb + block) * sums_of_unit * kBlock;
  }
  E* hidden_gradients(int d, int64_t block, int64_t s) const {
    return d_hidden + ((d * Rb + block) * S_rows + s) * kBlock;
  }

  // The time step that backward step `step` computes.
  int64_t time(int d, int64_t step) const { return d == 0 ? T - 1 - step : step; }
  Panels<M> hidden_panels(int d, int unit_group) const {
    const Range v = vector_slice<A>(R, plan.unit_groups, unit_group);
    return {v, gate_steps(hidden_gates()), packed_hh + (d * Rp + v.begin * lanes) * G * Hp};
  }
  Panels<M> operand_panels(int d, int unit_group) const {
    const Range v = vector_slice<A>(R, plan.unit_groups, unit_group);
    return {v, gate_steps(1), packed_operand + (d * Rp + v.begin * lanes) * Hp};
  }
  // The blocks of units that use any of a panel's hidden states.
  Range blocks_of(const Panels<M>& panels, int64_t panel) const {
    if (p.size.heads() == 1) return {0, Hb};
    const int64_t K = p.size.K, first = panels.first_vector(panel) * lanes;
    const int64_t last = min64(first + panels.cols(panel) * lanes, R) - 1;
    return {first / K * K / kBlock, (last / K + 1) * K / kBlock};
  }
  Panels<M> projection_panels(int d, int unit_group) const {
    const Range v = vector_slice<A>(H, plan.unit_groups, unit_group);
    return {v, steps_of(R), packed_hr + d * Hp * Rp + v.begin * lanes * steps_of(R) * M::kPair};
  }
};

// The product of gradients of `gates` pre-activations of some blocks, in their layout, with a panel
// that pack_gate_rows packed. Of a last block that is not full, only lanes that hold a unit are
// multiplied.
template <class M>
struct GateProduct {
  using Tile = TileProduct<M>;
  const int64_t steps;  // of a block
  Range blocks;
  int64_t whole;  // the first block that is not full
  Tile full, last;

  template <class K>
  GateProduct(const K& k, const Panels<M>& panels, int64_t panel, Range blocks, int gates)
      : steps(gates * kBlock / M::kPair),
        blocks(blocks),
        whole(min64(blocks.end, k.H / kBlock)),
        full(panels.panel(panel), panels.depth, M::kPair, steps, whole - blocks.begin,
             k.S_rows * k.P * kBlock, blocks.begin * steps),
        last(panels.panel(panel), panels.depth, M::kPair, K::steps_of(k.H % kBlock), gates, kBlock,
             whole * steps) {
    if (whole < blocks.end) full.next = &last;
  }
  GateProduct(const GateProduct&) = delete;

  Tile& first() { return whole > blocks.begin ? full : last; }
  // row(r, block) is row r of the gradients of a block.
  template <class Row>
  LSTM_FUSED_INLINE void set_rows(int n, const Row& row) {
    for (int r = 0; r < n; ++r) {
      full.rows[r] = row(r, blocks.begin);
      if (whole < blocks.end) last.rows[r] = row(r, whole);
    }
  }
};

}  // namespace
}  // namespace lstm_fused
