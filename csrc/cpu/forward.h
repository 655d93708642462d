// The persistent forward kernel. Each thread owns a slice of hidden units (or of batch rows) for
// the whole sequence. Its weights are packed as [16-lane vector of units][k][gate][lane], so that a
// register tile holds all gates of a vector of units for several batch rows and the cell update
// happens in registers. One barrier a step (two with a projection) where units are shared out.
#pragma once

#include "activations.h"  // first: the cells name sigmoid and tanh

#include "../cells/cells.h"
#include "pack.h"

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

// What both forward kernels (persistent and direct) keep and do: the state, and the end of a step.
template <class Cell, class S, class M>
struct ForwardState {
  using A = typename M::Compute;
  using E = typename M::Element;
  using V = Vector<A>;
  static constexpr int G = Cell::kGates;
  static constexpr int lanes = VectorOf<A>::lanes;

  const ForwardParams& p;
  const int64_t T, N, I, H, R, S_rows;
  const int64_t Hp, Rp, vectors;
  E* h;     // (D, 2, N, Rp) hidden states of two steps, in the type the tiles read
  A* c;     // (D, N, Hp)
  A* full;  // (D, N, Hp) hidden states before a projection, else null

  ForwardState(const ForwardParams& params, Arena& arena)
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
    c = arena.take<A>(D * N * Hp);
    full = p.weights[0].w_hr ? arena.take<A>(D * N * Hp) : nullptr;
  }

  E* hidden(int d, int64_t step, int64_t n) const {
    return h + ((d * 2 + (step & 1)) * N + n) * Rp;
  }
  A* cell(int d, int64_t n) const { return c + (d * N + n) * Hp; }

  // Both hidden buffers start as h0: rows that join a reverse walk later find it there.
  void init_row(int d, int64_t n) const {
    const S* h0 = static_cast<const S*>(p.h0);
    const S* c0 = static_cast<const S*>(p.c0);
    for (int step = 0; step < 2; ++step)
      stage_row(hidden(d, step, n), h0 ? h0 + (d * N + n) * R : nullptr, h0 ? R : 0, Rp);
    stage_row(cell(d, n), c0 ? c0 + (d * N + n) * H : nullptr, c0 ? H : 0, Hp);
  }

  int64_t time(int d, int64_t step) const { return d == 0 ? step : T - 1 - step; }
  int64_t active_at(int d, int64_t step) const {
    return step < T ? p.size.steps.active(time(d, step)) : 0;
  }

  void put_hidden(int d, int64_t step, int64_t n, int64_t u, V v) const {
    const int64_t s = p.size.steps.offset(time(d, step)) + n;
    S* y = static_cast<S*>(p.y) + (s * p.size.D + d) * R + u;
    store_first(y, v, R - u);
    store(hidden(d, step + 1, n) + u, round_to(v, S{}));
  }

  // From the gates' pre-activations of one vector of units of one row to the stored states.
  LSTM_FUSED_INLINE void finish(int d, int64_t step, int64_t n, int64_t vec, V (&gate)[G]) const {
    const int64_t u = vec * lanes;
    if (H - u < lanes)
      for (int g = 0; g < G; ++g) gate[g] = keep_first(gate[g], H - u);
    A* c_row = cell(d, n) + u;
    V c_new;
    const V h_new = Cell::forward(gate, load<V>(c_row), c_new);
    store(c_row, c_new);
    if (p.gates) {
      const int64_t s = p.size.steps.offset(time(d, step)) + n;
      const int64_t at = (d * p.size.blocks() + u / kBlock) * S_rows + s;
      A* saved = static_cast<A*>(p.gates) + at * G * kBlock + u % kBlock;
#pragma GCC unroll 8
      for (int g = 0; g < G; ++g) store(saved + g * kBlock, gate[g]);
      A* saved_cell = static_cast<A*>(p.cells) + at * kBlock + u % kBlock;
      store(saved_cell, c_new);
      // Vectors of the last block that hold no unit: nobody computes them, so they are cleared
      // here.
      if (vec == vectors - 1)
        for (int64_t l = lanes; l < kBlock - u % kBlock; ++l) {
          saved_cell[l] = 0;
          for (int g = 0; g < G; ++g) saved[g * kBlock + l] = 0;
        }
    }
    if (full) {
      store(full + (d * N + n) * Hp + u, h_new);
    } else {
      put_hidden(d, step, n, u, h_new);
    }
  }

  // Rows that end with this step leave their states in h_n and c_n.
  void leave(int d, int64_t step, const RowGroup& group, Range c_vectors, Range h_vectors) const {
    S* h_n = static_cast<S*>(p.h_n);
    S* c_n = static_cast<S*>(p.c_n);
    const int64_t staying = d == 0 ? group.active(active_at(d, step + 1)) : step + 1 < T ? N : 0;
    for (int64_t i = staying; i < group.active(active_at(d, step)); ++i) {
      const int64_t n = group.row(i);
      for (int64_t v = c_vectors.begin; v < c_vectors.end; ++v) {
        const int64_t u = v * lanes;
        store_first(c_n + (d * N + n) * H + u, load<V>(cell(d, n) + u), H - u);
      }
      for (int64_t v = h_vectors.begin; v < h_vectors.end; ++v) {
        const int64_t u = v * lanes;
        store_first(h_n + (d * N + n) * R + u, load<V>(hidden(d, step + 1, n) + u), R - u);
      }
    }
  }
};

// A thread's slice of vectors: whole blocks, less the vectors that hold no unit at all.
template <class A>
inline Range vector_slice(int64_t units, int parts, int part) {
  constexpr int per_block = kBlock / VectorOf<A>::lanes;
  const Range blocks = split(ceil_div(units, kBlock), parts, part);
  const int64_t last = ceil_div(units, VectorOf<A>::lanes);
  return {min64(blocks.begin * per_block, last), min64(blocks.end * per_block, last)};
}

template <class Cell, class S, class M>
struct PersistentForward : ForwardState<Cell, S, M> {
  using Base = ForwardState<Cell, S, M>;
  using Base::G, Base::lanes, Base::p, Base::T, Base::N, Base::I, Base::H, Base::R;
  using typename Base::A;
  using typename Base::E;
  using typename Base::V;
  // A row of x that tiles cannot read where it lies is copied (converted, padded) first.
  static constexpr bool kStaged = !Same<S, E>::value || M::kPair > 1;

  const Plan& plan;
  const int64_t depth_x, depth_h;  // tile steps of the two parts
  const int64_t chunk_rows;        // most rows whose input part is computed at once
  E* packed;                       // (D, vectors, depth_x + depth_h, G, lanes * kPair)
  A* bias;                         // (D, vectors, G, lanes)
  A* packed_hr;                    // (D, Rp, H) in panels, or null
  A* pre;                          // (threads, slice, chunk_rows, G, lanes), hoisting only
  E* staged;                       // (threads, chunk_rows, Ip), kStaged only
  const E** rows;                  // (threads, chunk_rows)
  Barrier* barriers;               // one a direction and row group, then the team's

  static int64_t steps_of(int64_t elements) { return ceil_div(elements, M::kPair); }
  int64_t Ip() const { return round_up(I, 2 * kBlock); }
  int64_t slice() const { return ceil_div(p.size.blocks(), plan.unit_groups) * (kBlock / lanes); }
  int groups() const { return plan.direction_groups * plan.row_groups; }

  PersistentForward(const ForwardParams& params, const Plan& the_plan, Arena& arena)
      : Base(params, arena),
        plan(the_plan),
        depth_x(steps_of(I)),
        depth_h(T == 1 && !params.h0 ? 0 : steps_of(R)),
        chunk_rows(max64(1, plan.hoist_steps) * ceil_div(N, plan.row_groups)) {
    const int D = p.size.D;
    const int threads = plan.threads;
    packed = arena.take<E>(D * this->vectors * panel_size());
    bias = arena.take<A>(D * this->vectors * G * lanes);
    packed_hr = p.weights[0].w_hr ? arena.take<A>(D * this->Rp * H) : nullptr;
    pre = plan.hoist_steps ? arena.take<A>(threads * slice() * chunk_rows * G * lanes) : nullptr;
    staged = kStaged ? arena.take<E>(threads * chunk_rows * Ip()) : nullptr;
    rows = arena.take<const E*>(threads * chunk_rows);
    barriers = arena.take<Barrier>(groups() + 1);
  }

  void init_barriers() {
    for (int i = 0; i < groups(); ++i) barriers[i].init(plan.unit_groups);
    barriers[groups()].init(plan.threads);
  }

  int64_t panel_size() const { return (depth_x + depth_h) * G * lanes * M::kPair; }
  E* panel(int d, int64_t vec) const { return packed + (d * this->vectors + vec) * panel_size(); }
  A* bias_of(int d, int64_t vec) const { return bias + (d * this->vectors + vec) * G * lanes; }

  void pack(int d, int64_t vec) const {
    const Weights& w = p.weights[d];
    constexpr int width = lanes * M::kPair;
    const int64_t u = vec * lanes;
    E* dst = panel(d, vec);
    for (int g = 0; g < G; ++g) {
      const int64_t row = g * H + u;
      pack_rows_as_lanes<M>(dst + g * width, G * width, static_cast<const S*>(w.w_ih) + row * I,
                            H - u, I);
      if (depth_h > 0)
        pack_rows_as_lanes<M>(dst + depth_x * G * width + g * width, G * width,
                              static_cast<const S*>(w.w_hh) + row * R, H - u, R);
      V b = {};
      if (w.b_ih) {
        b = load_first<V>(static_cast<const S*>(w.b_ih) + row, H - u) +
            load_first<V>(static_cast<const S*>(w.b_hh) + row, H - u);
      }
      store(bias_of(d, vec) + g * lanes, b);
    }
  }

  Panels<A> projection_panels(int d, int unit_group) const {
    const Range v = vector_slice<A>(R, plan.unit_groups, unit_group);
    return {v, H, packed_hr + d * this->Rp * H + v.begin * lanes * H};
  }

  // One thread's part of the whole layer.
  struct Worker {
    const PersistentForward& k;
    const Place place;
    const RowGroup group;
    const Range units;    // vectors of hidden units
    const Range hiddens;  // vectors of the recurrent state: the same without a projection
    A* pre;
    E* staged;
    const E** rows;
    Barrier& barrier;
    int d = 0;
    int64_t step = 0;
    int64_t chunk_row = 0;  // of the current step's first row in `pre`

    Worker(const PersistentForward& kernel, int i)
        : k(kernel),
          place(k.plan, i),
          group(k.p.size.steps, k.plan, place.row_group),
          units(vector_slice<A>(k.H, k.plan.unit_groups, place.unit_group)),
          hiddens(vector_slice<A>(k.R, k.plan.unit_groups, place.unit_group)),
          pre(k.pre + i * k.slice() * k.chunk_rows * G * lanes),
          staged(k.staged + i * k.chunk_rows * k.Ip()),
          rows(k.rows + i * k.chunk_rows),
          barrier(k.barriers[place.direction_group * k.plan.row_groups + place.row_group]) {}

    void run() {
      for (d = place.direction_group; d < k.p.size.D; d += k.plan.direction_groups) prepare();
      k.barriers[k.groups()].wait();
      for (d = place.direction_group; d < k.p.size.D; d += k.plan.direction_groups) {
        const int64_t chunk = max64(1, k.plan.hoist_steps);
        for (int64_t first = 0; first < k.T; first += chunk) {
          const int64_t end = min64(k.T, first + chunk);
          if (k.plan.hoist_steps) hoist(first, end);
          chunk_row = 0;
          for (step = first; step < end; ++step) walk();
        }
      }
    }

    // Row groups share the packed weights of their units, so they share out the packing too.
    void prepare() const {
      for (int64_t v = units.begin + place.row_group; v < units.end; v += k.plan.row_groups)
        k.pack(d, v);
      if (k.packed_hr && place.row_group == 0)
        pack_transposed(k.projection_panels(d, place.unit_group),
                        static_cast<const S*>(k.p.weights[d].w_hr), k.R, k.H);
      for (int64_t i = place.unit_group; i < group.count; i += k.plan.unit_groups)
        k.init_row(d, group.row(i));
    }

    const E* input_row(int64_t t, int64_t n, int64_t at) const {
      const S* x = static_cast<const S*>(k.p.x.data) + k.p.x.row(k.p.size.steps, t, n);
      if constexpr (kStaged) {
        E* copy = staged + at * k.Ip();
        stage_row(copy, x, k.I, k.Ip());
        return copy;
      } else {
        return x;
      }
    }

    int64_t gather(int64_t at, int64_t of_step) {
      const int64_t active = group.active(k.active_at(d, of_step));
      const int64_t t = k.time(d, of_step);
      for (int64_t i = 0; i < active; ++i) rows[at + i] = input_row(t, group.row(i), at + i);
      return at + active;
    }

    A* pre_of(int64_t vec, int64_t row) const {
      return pre + ((vec - units.begin) * k.chunk_rows + row) * G * lanes;
    }

    template <int Rows>
    static void hoist_tile(const Worker& w, int64_t vec, int64_t first) {
      V acc[Rows][G];
      load_bias(w, vec, acc);
      accumulate<M, Rows, G>(acc, w.rows + first, M::kPair, w.k.panel(w.d, vec), w.k.depth_x);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g) store(w.pre_of(vec, first + r) + g * lanes, acc[r][g]);
    }

    template <int Rows>
    static LSTM_FUSED_INLINE void load_bias(const Worker& w, int64_t vec, V (&acc)[Rows][G]) {
      const A* bias = w.k.bias_of(w.d, vec);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g) acc[r][g] = load<V>(bias + g * lanes);
    }

    template <int Rows>
    static void cell_tile(const Worker& w, int64_t vec, int64_t first) {
      const PersistentForward& k = w.k;
      const E* weights = k.panel(w.d, vec);
      V acc[Rows][G];
      if (k.plan.hoist_steps) {
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
          for (int g = 0; g < G; ++g)
            acc[r][g] = load<V>(w.pre_of(vec, w.chunk_row + first + r) + g * lanes);
      } else {
        load_bias(w, vec, acc);
        accumulate<M, Rows, G>(acc, w.rows + first, M::kPair, weights, k.depth_x);
      }
      if (w.step > 0 || k.p.h0) {
        const E* h_rows[Rows];
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) h_rows[r] = k.hidden(w.d, w.step, w.group.row(first + r));
        accumulate<M, Rows, G>(acc, h_rows, M::kPair, weights + k.depth_x * G * lanes * M::kPair,
                               k.depth_h);
      }
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) k.finish(w.d, w.step, w.group.row(first + r), vec, acc[r]);
    }

    using TileStep = void (*)(const Worker&, int64_t, int64_t);
    void for_tiles(int64_t count, const TileStep (&tiles)[kMaxRows]) const {
      for (int64_t v = units.begin; v < units.end; ++v)
        for_each_tile(0, count, [&](int64_t first, int n) { tiles[n - 1](*this, v, first); });
    }

    void hoist(int64_t first, int64_t end) {
      int64_t count = 0;
      for (int64_t s = first; s < end; ++s) count = gather(count, s);
#if LSTM_FUSED_TILE_ROWS > 3
      static constexpr TileStep tiles[kMaxRows] = {hoist_tile<1>, hoist_tile<2>, hoist_tile<3>,
                                                   hoist_tile<4>, hoist_tile<5>, hoist_tile<6>};
#else
      static constexpr TileStep tiles[kMaxRows] = {hoist_tile<1>, hoist_tile<2>, hoist_tile<3>};
#endif
      for_tiles(count, tiles);
    }

    void walk() {
      const int64_t active = group.active(k.active_at(d, step));
      if (!k.plan.hoist_steps) gather(0, step);
#if LSTM_FUSED_TILE_ROWS > 3
      static constexpr TileStep tiles[kMaxRows] = {cell_tile<1>, cell_tile<2>, cell_tile<3>,
                                                   cell_tile<4>, cell_tile<5>, cell_tile<6>};
#else
      static constexpr TileStep tiles[kMaxRows] = {cell_tile<1>, cell_tile<2>, cell_tile<3>};
#endif
      for_tiles(active, tiles);
      chunk_row += active;
      if (k.packed_hr) {
        barrier.wait();
        project(active);
      }
      k.leave(d, step, group, units, hiddens);
      barrier.wait();
    }

    void project(int64_t active) const {
      const Panels<A> panels = k.projection_panels(d, place.unit_group);
      for (int64_t panel = 0; panel < panels.count(); ++panel) {
        const int cols = panels.cols(panel);
        for_each_tile(0, active, [&](int64_t first, int n) {
          TileProduct<A> product{{}, 1, k.H, 1, 0};
          for (int r = 0; r < n; ++r)
            product.rows[r] = k.full + (d * k.N + group.row(first + r)) * k.Hp;
          A out[kMaxRows * kMaxCols * lanes];
          tile_function<A>(n, cols)(product, panels.panel(panel), out, false);
          for (int r = 0; r < n; ++r)
            for (int c = 0; c < cols; ++c)
              k.put_hidden(d, step, group.row(first + r), (panels.first_vector(panel) + c) * lanes,
                           load<V>(out + (r * kMaxCols + c) * lanes));
        });
      }
    }
  };
};

}  // namespace
}  // namespace lstm_fused
