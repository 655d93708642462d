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
struct BackwardState {
  using A = typename M::Compute;
  using E = typename M::Element;
  using V = Vector<A>;
  static constexpr int G = Cell::kGates, P = Cell::kPreacts;
  static constexpr bool kCarries = Cell::kCarry != Carry::kNone;
  static constexpr int lanes = VectorOf<A>::lanes;
  static constexpr int per_block = kBlock / lanes;

  const BackwardParams& p;
  const Plan& plan;
  const int64_t T, N, I, H, R, S_rows, Hb, Rb, Hp, Rp;
  const bool projection;
  const bool in_place;  // weights are read in place; E is A then
  const bool recurs;    // a step's product with W_hh is wanted

  E* d_preacts;  // (D, Hb, S, P, 16) in the type the tiles read
  A* dc;         // (D, N, Hp) gradients of the carried state, if any
  A* c0;         // (D, rows, Hp) the carried state at first, then what resets make it
  A* dh_reset;   // (D, N, Rp) gradients of what resets put in, if wanted
  A* dc_reset;   // (D, N, Hp)
  E* d_hidden;   // (D, Rb, S, 16) gradients of the projected state, projection only
  A* full;       // (D, S, Hp) hidden states before the projection, projection only
  S* hidden;     // (D, S, H) hidden states as forward gave them, for d_w_hh without a projection
  S* resumed;    // (D, N, R) the hidden states of the checkpoint, for d_w_hh
  A* db;         // (threads, 2, D, Hb, P, 16) sums over rows: recent ones, and all before
  E* packed_hh;  // (D, Rp, G * Hp) in panels: columns of W_hh
  E* packed_hr;  // (D, Hp, R) in panels: columns of W_hr, projection only
  E* packed_ih;  // (D, Ip, G * Hp) in panels, dx only
  A* row_sums;   // (threads, InPlaceSums of a state or of dx), in place only
  Barrier* barriers;

  static int64_t steps_of(int64_t elements) { return ceil_div(elements, M::kPair); }
  // Tile steps of a product with gradients of the pre-activations of all units.
  int64_t gate_steps() const { return G * (steps_of(H / kBlock * kBlock) + steps_of(H % kBlock)); }
  int64_t Ip() const { return round_up(I, kBlock); }
  int groups() const { return plan.direction_groups * plan.row_groups; }

  // lasting: what the calls for the steps between checkpoints share.
  BackwardState(const BackwardParams& params, const Plan& the_plan, Arena& arena, Arena& lasting)
      : p(params),
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
        recurs(T > 1 || wants_initial()) {
    const int D = p.size.D;
    d_preacts = arena.take<E>(D * Hb * S_rows * P * kBlock);
    dc = kCarries ? arena.take<A>(D * N * Hp) : nullptr;
    c0 = kCarries ? arena.take<A>(D * c0_rows() * Hp) : nullptr;
    const bool learned = p.size.reset_states;
    dh_reset = learned && p.dh0 ? lasting.take<A>(D * N * Rp) : nullptr;
    dc_reset = learned && p.dc0 ? lasting.take<A>(D * N * Hp) : nullptr;
    d_hidden = projection ? arena.take<E>(D * Rb * S_rows * kBlock) : nullptr;
    full = projection ? arena.take<A>(D * S_rows * Hp) : nullptr;
    const bool wanted = p.dweights[0].w_hh || p.dweights[1].w_hh;
    hidden = wanted && !projection ? arena.take<S>(D * S_rows * H) : nullptr;
    resumed = wanted && p.resume ? arena.take<S>(D * N * R) : nullptr;
    db = lasting.take<A>(plan.threads * 2 * D * Hb * P * kBlock);
    packed_hh = recurs && !in_place ? arena.take<E>(D * Rp * G * Hp) : nullptr;
    packed_hr = projection ? arena.take<E>(D * Hp * Rp) : nullptr;
    packed_ih = p.dx && !in_place ? arena.take<E>(D * Ip() * G * Hp) : nullptr;
    row_sums = in_place ? arena.take<A>(plan.threads * row_sums_size()) : nullptr;
    barriers = arena.take<Barrier>(groups() + 1);
  }

  void init_barriers() {
    for (int i = 0; i < groups(); ++i) barriers[i].init(plan.unit_groups);
    barriers[groups()].init(plan.threads);
  }

  bool wants_initial() const { return p.dh0 || p.d_before; }
  // A row of a checkpoint, and of the gradients d_after and d_before.
  const A* checkpoint(int d, int64_t n) const {
    const bool own = Cell::kCarry == Carry::kCell;
    return static_cast<const A*>(p.resume) + (d * N + n) * (R + (own ? H : 0));
  }
  int64_t between(int d, int64_t n) const { return (d * N + n) * (R + H); }

  int64_t c0_rows() const { return p.size.steps.resets ? 2 * N : N; }
  A* carried0(int d, int64_t n, bool reset) const {
    return c0 + (d * c0_rows() + (reset ? N : 0) + n) * Hp;
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
    return static_cast<const A*>(p.saved_states) + ((d * Hb + block) * S_rows + s) * kBlock;
  }
  A* bias_sums(int worker, bool all, int d, int64_t block) const {
    return db + (((worker * 2 + all) * p.size.D + d) * Hb + block) * P * kBlock;
  }
  E* hidden_gradients(int d, int64_t block, int64_t s) const {
    return d_hidden + ((d * Rb + block) * S_rows + s) * kBlock;
  }

  // The time step that backward step `step` computes.
  int64_t time(int d, int64_t step) const { return d == 0 ? T - 1 - step : step; }
  Panels<M> hidden_panels(int d, int unit_group) const {
    const Range v = vector_slice<A>(R, plan.unit_groups, unit_group);
    return {v, gate_steps(), packed_hh + d * Rp * G * Hp + v.begin * lanes * G * Hp};
  }
  Panels<M> projection_panels(int d, int unit_group) const {
    const Range v = vector_slice<A>(H, plan.unit_groups, unit_group);
    return {v, steps_of(R), packed_hr + d * Hp * Rp + v.begin * lanes * steps_of(R) * M::kPair};
  }
};

// The product of gradients of the pre-activations of some blocks, in their layout, with a panel
// that pack_gate_rows packed. Of a last block that is not full, only lanes that hold a unit are
// multiplied.
template <int G, class M>
struct GateProduct {
  using Tile = TileProduct<M>;
  Range blocks;
  int64_t whole;  // the first block that is not full
  Tile full, last;

  template <class K>
  GateProduct(const K& k, const Panels<M>& panels, int64_t panel, Range blocks)
      : blocks(blocks),
        whole(min64(blocks.end, k.H / kBlock)),
        full(panels.panel(panel), panels.depth, M::kPair, kSteps, whole - blocks.begin,
             k.S_rows * K::P * kBlock, blocks.begin * kSteps),
        last(panels.panel(panel), panels.depth, M::kPair, K::steps_of(k.H % kBlock), G, kBlock,
             whole * kSteps) {
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

 private:
  static constexpr int64_t kSteps = G * kBlock / M::kPair;  // of a block
};

}  // namespace
}  // namespace lstm_fused
