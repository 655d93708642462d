// The recurrent states of a forward pass, and the end of each of its steps.
#pragma once

#include "activations.h"  // first: the cells name sigmoid and tanh

#include "../cells/cells.h"
#include "arena.h"
#include "partition.h"

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
struct ForwardState {
  using A = typename M::Compute;
  using E = typename M::Element;
  using V = Vector<A>;
  static constexpr int G = Cell::kGates, P = Cell::kPreacts;
  static constexpr int lanes = VectorOf<A>::lanes;
  static constexpr bool kCarries = Cell::kCarry != Carry::kNone;
  static constexpr bool kTangents = ParamsOf<Cell>::tangents;
  using Params = typename ParamsOf<Cell>::type;

  const Params& p;
  const int64_t T, N, I, H, R, S_rows;
  const int64_t Hp, Rp, vectors;
  E* h;     // (D, 2, N, Rp) hidden states of two steps (double buffering), in the type tiles read
  A* c;     // (D, N, Hp) the carried state, if any
  A* full;  // (D, N, Hp) hidden states before a projection, else null

  ForwardState(const Params& params, Arena& arena)
      : p(params),
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
    c = kCarries ? arena.take<A>(D * N * Hp) : nullptr;
    full = p.weights[0].w_hr ? arena.take<A>(D * N * Hp) : nullptr;
  }

  E* hidden(int d, int64_t step, int64_t n) const {
    return h + ((d * 2 + (step & 1)) * N + n) * Rp;
  }
  A* cell(int d, int64_t n) const { return c + (d * N + n) * Hp; }

  bool has_initial() const { return p.h0 || p.resume; }
  const void* carried0() const { return Cell::kCarry == Carry::kHidden ? p.h0 : p.c0; }

  // Row n of initial states, or of those that resets put in; null for zeros.
  const S* initial(const void* states, int d, int64_t n, bool reset, int64_t width) const {
    const int64_t row = states ? p.size.initial_row(d, n, reset) : -1;
    return row < 0 ? nullptr : static_cast<const S*>(states) + row * width;
  }

  // Both hidden buffers start as h0: rows of the reverse direction that begin later read it there.
  void init_row(int d, int64_t n) const {
    const bool reset = p.size.steps.begins_anew(d, d == 0 ? 0 : T - 1, n);
    if (p.resume && !reset) return resume_row(d, n);
    const S* h0 = initial(p.h0, d, n, reset, R);
    for (int step = 0; step < 2; ++step) stage_row(hidden(d, step, n), h0, h0 ? R : 0, Rp);
    if constexpr (kCarries) {
      const S* c0 = initial(carried0(), d, n, reset, H);
      stage_row(cell(d, n), c0, c0 ? H : 0, Hp);
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
      stage_row(cell(d, n), Cell::kCarry == Carry::kCell ? row + R : row, H, Hp);
  }

  static constexpr bool kOwnCell = Cell::kCarry == Carry::kCell;
  const A* checkpoint(const void* all, int d, int64_t n) const {
    return static_cast<const A*>(all) + (d * N + n) * (R + (kOwnCell ? H : 0));
  }

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
      if constexpr (kCarries) put(kOwnCell ? row + R : row, cell(d, n), c_vectors, H);
      if constexpr (Cell::kCarry != Carry::kHidden) put(row, hidden(d, step + 1, n), h_vectors, R);
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
    if (Cell::kCarry == Carry::kCell) copy(p.c0, p.c_n, H);
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
    if (j < G) add(w.b_ih, Cell::input_gate(j));
    if (j >= P - G) add(w.b_hh, Cell::hidden_gate(j - (P - G)));
    return sum;
  }

  // From the pre-activations of one vector of units of one row to the stored states.
  LSTM_FUSED_INLINE void finish(int d, int64_t step, int64_t n, int64_t vec, V (&preact)[P]) const {
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
    if (p.gates) save(d, step, n, vec, preact, c_new);
    if (full) {
      store(full + (d * N + n) * Hp + u, h_new);
    } else {
      put_hidden(d, step, n, u, h_new);
    }
  }

  // The tangent of h, from those of the pre-activations and of the carried state.
  LSTM_FUSED_INLINE V tangent(int d, int64_t step, int64_t n, int64_t u, V (&preact)[P],
                              const V& dc_prev, V& dc) const {
    const Steps& steps = p.size.steps;
    const int64_t t = time(d, step), s = steps.row(t, n);
    const auto saved_at = [&](const void* saved, int64_t row) {
      const int64_t at = (d * p.size.blocks() + u / kBlock) * S_rows + row;
      return static_cast<const A*>(saved) + at * kBlock;
    };
    V saved[P], c_prev = {}, c = {};
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

  LSTM_FUSED_INLINE void save(int d, int64_t step, int64_t n, int64_t vec, const V (&preact)[P],
                              const V& c_new) const {
    const int64_t u = vec * lanes;
    const int64_t s = p.size.steps.row(time(d, step), n);
    const int64_t at = (d * p.size.blocks() + u / kBlock) * S_rows + s;
    // No thread computes vectors of the last block that hold no unit: they are cleared here.
    const int64_t end = vec == vectors - 1 ? kBlock - u % kBlock : lanes;
    const auto put = [&](void* saved, int64_t row, const V& v) {
      A* to = static_cast<A*>(saved) + row * kBlock + u % kBlock;
      store(to, v);
      for (int64_t l = lanes; l < end; ++l) to[l] = 0;
    };
    LSTM_FUSED_UNROLLED_FOR (int j = 0; j < P; ++j) put(p.gates, at * P + j, preact[j]);
    if constexpr (kCarries) put(p.saved_states, at, c_new);
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
      for (int64_t u = vectors.begin * lanes; u < vectors.end * lanes; u += lanes)
        store_first(static_cast<S*>(p.y) + p.size.cell_at(d, s) + u, load<V>(cell(d, n) + u),
                    H - u);
    }
  }

  // Where a row begins anew, the next step finds the reset state in the place of this step's.
  LSTM_FUSED_COLD void put_resets(int d, int64_t step, const RowGroup& group, Range c_vectors,
                                  Range h_vectors) const {
    for (int64_t i = 0; i < group.active(active_at(d, step)); ++i) {
      const int64_t n = group.row(i);
      if (!p.size.steps.ends_before_reset(d, time(d, step), n)) continue;
      const auto put = [&](const void* states, auto* to, Range vectors, int64_t width) {
        const S* from = initial(states, d, n, true, width);
        for (int64_t u = vectors.begin * lanes; u < vectors.end * lanes; u += lanes)
          store(to + u, from ? load_first<V>(from + u, width - u) : V{});
      };
      put(p.h0, hidden(d, step + 1, n), h_vectors, R);
      if constexpr (kCarries) put(carried0(), cell(d, n), c_vectors, H);
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
      for (int64_t v = c_vectors.begin; Cell::kCarry == Carry::kCell && v < c_vectors.end; ++v) {
        const int64_t u = v * lanes;
        store_first(c_n + row * H + u, load<V>(cell(d, n) + u), H - u);
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
