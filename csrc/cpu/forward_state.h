// The recurrent states of a forward pass, and the end of each of its steps.
#pragma once

#include "activations.h"  // first: the cells name sigmoid and tanh

#include "arena.h"
#include "cell_facts.h"
#include "partition.h"
#include "unit_values.h"

namespace lstm_fused {
namespace {

template <class S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};

template <class A, class B>
struct Same {
  static constexpr bool value = false;
};
template <class A>
struct Same<A, A> {
  static constexpr bool value = true;
};

template <class Cell>
struct ParamsOf {
  using type = ForwardParams;
  static constexpr bool tangents = false;
};
template <class Cell>
struct ParamsOf<TangentOf<Cell>> {
  using type = TangentParams;
  static constexpr bool tangents = true;
};

// The states that both forward kernels (persistent and direct) keep, and the end of a step: the
// epilogue from pre-activations to stored states.
template <class Cell, class S, class M>
struct ForwardState : CellFacts<Cell, typename M::Compute> {
  using A = typename M::Compute;
  using Facts = CellFacts<Cell, A>;
  using Facts::carried, Facts::cells, Facts::G, Facts::kCarries, Facts::keeps_hidden, Facts::P,
      Facts::saved, Facts::unit;
  using E = typename M::Element;
  using V = Vector<A>;
  static constexpr int kMaxPreacts = Cell::kPreacts;
  static constexpr int lanes = VectorOf<A>::lanes;
  static constexpr bool kTangents = ParamsOf<Cell>::tangents;
  using Params = typename ParamsOf<Cell>::type;

  const Params& p;
  const int64_t T, N, I, H, R, S_rows;
  const int64_t Hp, Rp, vectors;
  E* h;     // (D, 2, N, Rp) hidden states of two steps (double buffering), in the type tiles read
  A* c;     // (D, N, carried, Hp) the carried states, if any
  A* full;  // (D, N, Hp) hidden states before a projection, else null
  A* unit_vectors;  // (D, vectors of units, vectors, lanes) of a described cell

  ForwardState(const Params& params, Arena& arena)
      : Facts(params.unit),
        p(params),
        T(p.size.steps.T),
        N(p.size.steps.N),
        I(p.size.I),
        H(p.size.H),
        R(p.size.R),
        S_rows(p.size.steps.rows()),
        Hp(round_up(H, kBlock)),
        Rp(round_up(R, 2 * kBlock)),
        vectors(ceil_div(H, lanes)) {
    const int D = p.size.D;
    h = arena.take<E>(D * 2 * N * Rp);
    c = kCarries ? arena.take<A>(D * N * carried() * Hp) : nullptr;
    full = p.weights[0].w_hr ? arena.take<A>(D * N * Hp) : nullptr;
    unit_vectors = kIsAny<Cell> ? arena.take<A>(D * vectors * p.unit->vectors * lanes) : nullptr;
  }

  E* hidden(int d, int64_t step, int64_t n) const {
    return h + ((d * 2 + (step & 1)) * N + n) * Rp;
  }
  A* cell(int d, int64_t n, int k = 0) const { return c + ((d * N + n) * carried() + k) * Hp; }

  bool has_initial() const { return p.h0 || p.resume; }

  // Row n of initial states, or of those that resets put in; null for zeros.
  const S* initial(const void* states, int d, int64_t n, bool reset, int64_t width) const {
    const int64_t row = states ? p.size.initial_row(d, n, reset) : -1;
    return row < 0 ? nullptr : static_cast<const S*>(states) + row * width;
  }
  // The same of carried state k.
  const S* initial_carried(int d, int64_t n, bool reset, int k) const {
    if (k == cells()) return initial(p.h0, d, n, reset, H);
    const S* row = initial(p.c0, d, n, reset, cells() * H);
    return row ? row + k * H : nullptr;
  }

  // Both hidden buffers start as h0: rows of the reverse direction that begin later read it there.
  void init_row(int d, int64_t n) const {
    const bool reset = p.size.steps.begins_anew(d, d == 0 ? 0 : T - 1, n);
    if (p.resume && !reset) return resume_row(d, n);
    const S* h0 = initial(p.h0, d, n, reset, R);
    for (int step = 0; step < 2; ++step) stage_row(hidden(d, step, n), h0, h0 ? R : 0, Rp);
    if constexpr (kCarries) {
      for (int k = 0; k < carried(); ++k) {
        const S* c0 = initial_carried(d, n, reset, k);
        stage_row(cell(d, n, k), c0, c0 ? H : 0, Hp);
      }
    }
    if (n >= p.size.steps.active(0)) store_initial(d, n);
  }

  // In a checkpoint h is what it was when rounded to S, except a carried h.
  LSTM_FUSED_COLD void resume_row(int d, int64_t n) const {
    const A* row = checkpoint(p.resume, d, n);
    for (int step = 0; step < 2; ++step) {
      E* to = hidden(d, step, n);
      stage_row(to, static_cast<const E*>(nullptr), 0, Rp);
      for (int64_t u = 0; u < R; u += lanes)
        store(to + u, round_to(load_first<V>(row + u, R - u), S{}));
    }
    if constexpr (kCarries)
      for (int k = 0; k < carried(); ++k) stage_row(cell(d, n, k), row + carried_at(k), H, Hp);
  }

  const A* checkpoint(const void* all, int64_t d, int64_t n) const {
    return static_cast<const A*>(all) + (d * N + n) * (R + cells() * H);
  }
  // Where carried state k is in a checkpoint's row: a carried h is there in the place of h.
  int64_t carried_at(int k) const { return k < cells() ? R + k * H : 0; }

  // The states after a step, where a checkpoint is due.
  LSTM_FUSED_COLD void store_checkpoint(int d, int64_t step, const RowGroup& group, Range c_vectors,
                                        Range h_vectors) const {
    const int64_t t = time(d, step) + (d == 0);  // the step that follows the boundary
    if (t % p.checkpoint_every != 0 || t == 0 || t == T) return;
    const int64_t entry = (t / p.checkpoint_every - 1) * p.size.D;
    for (int64_t i = 0; i < group.count; ++i) {
      const int64_t n = group.row(i);
      A* row = const_cast<A*>(checkpoint(p.checkpoints, entry + d, n));
      const auto put = [&](A* to, const auto* from, Range vectors, int64_t width) {
        for (int64_t u = vectors.begin * lanes; u < vectors.end * lanes; u += lanes)
          store_first(to + u, load<V>(from + u), width - u);
      };
      if constexpr (kCarries)
        for (int k = 0; k < carried(); ++k) put(row + carried_at(k), cell(d, n, k), c_vectors, H);
      if (!keeps_hidden()) put(row, hidden(d, step + 1, n), h_vectors, R);
    }
  }

  // A document without a step keeps its initial state.
  LSTM_FUSED_COLD void store_initial(int d, int64_t n) const {
    const int64_t row = p.size.final_row(d, n);
    const auto copy = [&](const void* from, void* to, int64_t width) {
      const S* state = initial(from, d, n, false, width);
      S* out = static_cast<S*>(to) + row * width;
      for (int64_t i = 0; i < width; ++i) out[i] = state ? state[i] : S{};
    };
    copy(p.h0, p.h_n, R);
    if (cells() > 0) copy(p.c0, p.c_n, cells() * H);
  }

  int64_t time(int d, int64_t step) const { return d == 0 ? step : T - 1 - step; }
  int64_t active_at(int d, int64_t step) const {
    return step < T ? p.size.steps.active(time(d, step)) : 0;
  }

  void put_hidden(int d, int64_t step, int64_t n, int64_t u, V v) const {
    const int64_t s = p.size.steps.row(time(d, step), n);
    store_first(static_cast<S*>(p.y) + p.size.hidden_at(d, s) + u, v, R - u);
    store(hidden(d, step + 1, n) + u, round_to(v, S{}));
  }

  // b_ih and b_hh of pre-activation j, for the vector of units from u on.
  V bias_sum(const Weights& w, int j, int64_t u) const {
    V sum = {};
    if (!w.b_ih) return sum;
    const auto add = [&](const void* bias, int gate) {
      sum += load_first<V>(static_cast<const S*>(bias) + gate * H + u, H - u);
    };
    if (j < G) add(w.b_ih, input_gate_of(G, P, j));
    if (j >= P - G) add(w.b_hh, j - (P - G));
    return sum;
  }

  // From the pre-activations of one vector of units of one row to the stored states.
  LSTM_FUSED_INLINE void finish(int d, int64_t step, int64_t n, int64_t vec,
                                V (&preact)[kMaxPreacts]) const {
    const int64_t u = vec * lanes;
    if (H - u < lanes)
      for (int j = 0; j < P; ++j) preact[j] = keep_first(preact[j], H - u);
    V c_old = {}, c_new = {};
    if constexpr (kCarries) c_old = load<V>(cell(d, n) + u);
    V h_new;
    if constexpr (kTangents) {
      h_new = tangent(d, step, n, u, preact, c_old, c_new);
    } else {
      h_new = Cell::forward(preact, c_old, c_new);
    }
    if constexpr (kCarries) store(cell(d, n) + u, c_new);
    if (p.gates) {
      save_gates(d, step, n, vec, [&](int j) { return preact[j]; });
      if constexpr (kCarries) save_state(d, step, n, vec, 0, c_new);
    }
    put_cell_output(d, step, n, u, h_new);
  }

  // The same for a described cell, whose pre-activations (P, lanes) are in memory. statistics:
  // those of a cell that normalizes (unit.h).
  void finish_described(int d, int64_t step, int64_t n, int64_t vec, A* preacts,
                        const A* statistics) const {
    const int64_t u = vec * lanes, here = H - u;
    for (int j = 0; here < lanes && j < P; ++j)
      store(preacts + j * lanes, keep_first(load<V>(preacts + j * lanes), here));
    A masks[kMaxUnitValues * lanes], h_new[lanes];
    unit().forward(unit_at(d, step, n, vec, preacts, masks, h_new, statistics));
    if (p.gates) {
      save_gates(d, step, n, vec, [&](int j) { return load<V>(preacts + j * lanes); });
      for (int k = 0; k < carried(); ++k)
        save_state(d, step, n, vec, k, load<V>(cell(d, n, k) + u));
      for (int g = 0; statistics && g < this->normalized_groups(); ++g) {
        V two = {};
        for (int i = 0; i < 2; ++i) two[i] = statistics[4 * g + i];
        save_state(d, step, n, vec, carried() + g, two);
      }
    }
    const V h = load<V>(h_new);
    put_cell_output(d, step, n, u, here < lanes ? keep_first(h, here) : h);
  }

  LSTM_FUSED_INLINE void put_cell_output(int d, int64_t step, int64_t n, int64_t u,
                                         const V& h) const {
    if (full) {
      store(full + (d * N + n) * Hp + u, h);
    } else {
      put_hidden(d, step, n, u, h);
    }
  }

  // masks is filled.
  UnitForward<A> unit_at(int d, int64_t step, int64_t n, int64_t vec, const A* preacts, A* masks,
                         A* h, const A* statistics) const {
    const int64_t u = vec * lanes;
    load_masks<S, A>(p.size, p.weights[d].masks, p.unit->masks, time(d, step), n, u, masks);
    A* state = c + (d * N + n) * carried() * Hp + u;
    return {preacts, unit_vectors_of(d, vec), masks, state, Hp, state, Hp, h, statistics};
  }

  A* unit_vectors_of(int d, int64_t vec) const {
    return unit_vectors + (d * vectors + vec) * p.unit->vectors * lanes;
  }
  void stage_unit_vectors(int d, Range units) const {
    if constexpr (kIsAny<Cell>)
      load_unit_vectors<S, A>(p.size, p.weights[d].vectors, p.unit->vectors, units,
                              unit_vectors_of(d, 0));
  }

  // The tangent of h, from those of the pre-activations and of the carried state.
  LSTM_FUSED_INLINE V tangent(int d, int64_t step, int64_t n, int64_t u, V (&preact)[kMaxPreacts],
                              const V& dc_prev, V& dc) const {
    const Steps& steps = p.size.steps;
    const int64_t t = time(d, step), s = steps.row(t, n);
    const auto saved_at = [&](const void* saved, int64_t row) {
      const int64_t at = (d * p.size.blocks() + u / kBlock) * S_rows + row;
      return static_cast<const A*>(saved) + at * kBlock;
    };
    V saved[kMaxPreacts], c_prev = {}, c = {};
    for (int j = 0; j < P; ++j) {
      const int64_t at = (d * p.size.blocks() + u / kBlock) * S_rows + s;
      saved[j] =
          load<V>(static_cast<const A*>(p.primal_gates) + (at * P + j) * kBlock + u % kBlock);
      if (p.preacts)
        preact[j] += load_first<V>(
            static_cast<const A*>(p.preacts) + ((s * p.size.D + d) * P + j) * H + u, H - u);
    }
    if constexpr (kCarries) {
      c = load<V>(saved_at(p.primal_states, s) + u % kBlock);
      const int64_t before = steps.before(d, t, n);
      if (before >= 0) {
        c_prev = load<V>(saved_at(p.primal_states, steps.row(before, n)) + u % kBlock);
      } else if (const S* c0 = initial(p.primal_c0, d, n, steps.begins_anew(d, t, n), H)) {
        c_prev = load_first<V>(c0 + u, H - u);
      }
    }
    return Cell::tangent(saved, c_prev, c, preact, dc_prev, dc);
  }

  // What backward needs of a vector of units of a row: gate(j), its P values of the cell, and value
  // k of what the step leaves behind.
  template <class Gate>
  LSTM_FUSED_INLINE void save_gates(int d, int64_t step, int64_t n, int64_t vec,
                                    const Gate& gate) const {
    const int64_t at = saved_at(d, step, n, vec) * P;
    LSTM_FUSED_UNROLLED_FOR (int j = 0; j < P; ++j) save(p.gates, at + j, vec, gate(j));
  }
  LSTM_FUSED_INLINE void save_state(int d, int64_t step, int64_t n, int64_t vec, int k,
                                    const V& v) const {
    save(p.saved_states, saved_at(d, step, n, vec) * saved() + k, vec, v);
  }
  LSTM_FUSED_INLINE int64_t saved_at(int d, int64_t step, int64_t n, int64_t vec) const {
    return (d * p.size.blocks() + vec * lanes / kBlock) * S_rows +
           p.size.steps.row(time(d, step), n);
  }
  LSTM_FUSED_INLINE void save(void* saved, int64_t row, int64_t vec, const V& v) const {
    const int64_t lane = vec * lanes % kBlock;
    A* to = static_cast<A*>(saved) + row * kBlock + lane;
    store(to, v);
    // No thread computes vectors of the last block that hold no unit: they are cleared here.
    const int64_t end = vec == vectors - 1 ? kBlock - lane : lanes;
    for (int64_t l = lanes; l < end; ++l) to[l] = 0;
  }

  // What a step leaves for other steps and for the caller, of the thread's own vectors: c_vectors
  // of the carried state, h_vectors of the hidden state.
  void finish_step(int d, int64_t step, const RowGroup& group, Range c_vectors,
                   Range h_vectors) const {
    store_final(d, step, group, c_vectors, h_vectors);
    if (p.size.cell_states) store_cell_states(d, step, group, c_vectors);
    if (p.size.steps.resets) put_resets(d, step, group, c_vectors, h_vectors);
    if (p.checkpoints) store_checkpoint(d, step, group, c_vectors, h_vectors);
  }

  LSTM_FUSED_COLD void store_cell_states(int d, int64_t step, const RowGroup& group,
                                         Range vectors) const {
    for (int64_t i = 0; i < group.active(active_at(d, step)); ++i) {
      const int64_t n = group.row(i), s = p.size.steps.row(time(d, step), n);
      for (int k = 0; k < cells(); ++k)
        for (int64_t u = vectors.begin * lanes; u < vectors.end * lanes; u += lanes)
          store_first(static_cast<S*>(p.y) + p.size.cell_at(d, s) + k * H + u,
                      load<V>(cell(d, n, k) + u), H - u);
    }
  }

  // Where a row begins anew, the next step finds the reset state in the place of this step's.
  LSTM_FUSED_COLD void put_resets(int d, int64_t step, const RowGroup& group, Range c_vectors,
                                  Range h_vectors) const {
    for (int64_t i = 0; i < group.active(active_at(d, step)); ++i) {
      const int64_t n = group.row(i);
      if (!p.size.steps.ends_before_reset(d, time(d, step), n)) continue;
      const auto put = [&](const S* from, auto* to, Range vectors, int64_t width) {
        for (int64_t u = vectors.begin * lanes; u < vectors.end * lanes; u += lanes)
          store(to + u, from ? load_first<V>(from + u, width - u) : V{});
      };
      put(initial(p.h0, d, n, true, R), hidden(d, step + 1, n), h_vectors, R);
      if constexpr (kCarries)
        for (int k = 0; k < carried(); ++k)
          put(initial_carried(d, n, true, k), cell(d, n, k), c_vectors, H);
    }
  }

  // Copies the states of rows that end with this step to h_n and c_n.
  void store_final(int d, int64_t step, const RowGroup& group, Range c_vectors,
                   Range h_vectors) const {
    S* h_n = static_cast<S*>(p.h_n);
    S* c_n = static_cast<S*>(p.c_n);
    const int64_t continuing = d == 0 ? group.active(active_at(d, step + 1)) : step + 1 < T ? N : 0;
    for (int64_t i = continuing; i < group.active(active_at(d, step)); ++i) {
      const int64_t n = group.row(i), row = p.size.final_row(d, n);
      for (int k = 0; k < cells(); ++k)
        for (int64_t v = c_vectors.begin; v < c_vectors.end; ++v) {
          const int64_t u = v * lanes;
          store_first(c_n + (row * cells() + k) * H + u, load<V>(cell(d, n, k) + u), H - u);
        }
      for (int64_t v = h_vectors.begin; v < h_vectors.end; ++v) {
        const int64_t u = v * lanes;
        store_first(h_n + row * R + u, load<V>(hidden(d, step + 1, n) + u), R - u);
      }
    }
  }
};

}  // namespace
}  // namespace lstm_fused
