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

// What both forward kernels (persistent and direct) keep and do: the state, and the end of a step.
template <class Cell, class S, class M>
struct ForwardState {
  using A = typename M::Compute;
  using E = typename M::Element;
  using V = Vector<A>;
  static constexpr int G = Cell::kGates, P = Cell::kSums;
  static constexpr int lanes = VectorOf<A>::lanes;
  static constexpr bool kCarries = Cell::kMemory != Memory::kNone;
  static constexpr bool kTangents = ParamsOf<Cell>::tangents;
  using Params = typename ParamsOf<Cell>::type;

  const Params& p;
  const int64_t T, N, I, H, R, S_rows;
  const int64_t Hp, Rp, vectors;
  E* h;     // (D, 2, N, Rp) hidden states of two steps, in the type the tiles read
  A* c;     // (D, N, Hp) what the cell carries, if anything
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

  // Both hidden buffers start as h0: rows that join a reverse walk later find it there.
  void init_row(int d, int64_t n) const {
    const S* h0 = static_cast<const S*>(p.h0);
    const S* c0 = Cell::kMemory == Memory::kHidden ? h0 : static_cast<const S*>(p.c0);
    for (int step = 0; step < 2; ++step)
      stage_row(hidden(d, step, n), h0 ? h0 + (d * N + n) * R : nullptr, h0 ? R : 0, Rp);
    if constexpr (kCarries)
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

  // b_ih and b_hh of sum j, for the vector of units from u on.
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
  LSTM_FUSED_INLINE void finish(int d, int64_t step, int64_t n, int64_t vec, V (&sum)[P]) const {
    const int64_t u = vec * lanes;
    if (H - u < lanes)
      for (int j = 0; j < P; ++j) sum[j] = keep_first(sum[j], H - u);
    V c_old = {}, c_new = {};
    if constexpr (kCarries) c_old = load<V>(cell(d, n) + u);
    V h_new;
    if constexpr (kTangents) {
      h_new = tangent(d, step, n, u, sum, c_old, c_new);
    } else {
      h_new = Cell::forward(sum, c_old, c_new);
    }
    if constexpr (kCarries) store(cell(d, n) + u, c_new);
    if (p.gates) save(d, step, n, vec, sum, c_new);
    if (full) {
      store(full + (d * N + n) * Hp + u, h_new);
    } else {
      put_hidden(d, step, n, u, h_new);
    }
  }

  // Of h, from those of the pre-activations and of what the cell was carried.
  LSTM_FUSED_INLINE V tangent(int d, int64_t step, int64_t n, int64_t u, V (&sum)[P],
                              const V& dc_prev, V& dc) const {
    const Steps& steps = p.size.steps;
    const int64_t t = time(d, step), s = steps.offset(t) + n;
    const auto saved_at = [&](const void* saved, int64_t row) {
      const int64_t at = (d * p.size.blocks() + u / kBlock) * S_rows + row;
      return static_cast<const A*>(saved) + at * kBlock;
    };
    V saved[P], c_prev = {}, c = {};
    for (int j = 0; j < P; ++j) {
      const int64_t at = (d * p.size.blocks() + u / kBlock) * S_rows + s;
      saved[j] = load<V>(static_cast<const A*>(p.saved_gates) + (at * P + j) * kBlock + u % kBlock);
      if (p.preacts)
        sum[j] += load_first<V>(
            static_cast<const A*>(p.preacts) + ((s * p.size.D + d) * P + j) * H + u, H - u);
    }
    if constexpr (kCarries) {
      c = load<V>(saved_at(p.saved_cells, s) + u % kBlock);
      const int64_t before = steps.before(d, t, n);
      const S* c0 = static_cast<const S*>(p.primal_c0);
      if (before >= 0) {
        c_prev = load<V>(saved_at(p.saved_cells, steps.offset(before) + n) + u % kBlock);
      } else if (c0) {
        c_prev = load_first<V>(c0 + (d * N + n) * H + u, H - u);
      }
    }
    return Cell::tangent(saved, c_prev, c, sum, dc_prev, dc);
  }

  LSTM_FUSED_INLINE void save(int d, int64_t step, int64_t n, int64_t vec, const V (&sum)[P],
                              const V& c_new) const {
    const int64_t u = vec * lanes;
    const int64_t s = p.size.steps.offset(time(d, step)) + n;
    const int64_t at = (d * p.size.blocks() + u / kBlock) * S_rows + s;
    // Vectors of the last block that hold no unit: nobody computes them, so they are cleared here.
    const int64_t end = vec == vectors - 1 ? kBlock - u % kBlock : lanes;
    const auto put = [&](void* saved, int64_t row, const V& v) {
      A* to = static_cast<A*>(saved) + row * kBlock + u % kBlock;
      store(to, v);
      for (int64_t l = lanes; l < end; ++l) to[l] = 0;
    };
#pragma GCC unroll 8
    for (int j = 0; j < P; ++j) put(p.gates, at * P + j, sum[j]);
    if constexpr (kCarries) put(p.cells, at, c_new);
  }

  // Rows that end with this step leave their states in h_n and c_n.
  void leave(int d, int64_t step, const RowGroup& group, Range c_vectors, Range h_vectors) const {
    S* h_n = static_cast<S*>(p.h_n);
    S* c_n = static_cast<S*>(p.c_n);
    const int64_t staying = d == 0 ? group.active(active_at(d, step + 1)) : step + 1 < T ? N : 0;
    for (int64_t i = staying; i < group.active(active_at(d, step)); ++i) {
      const int64_t n = group.row(i);
      for (int64_t v = c_vectors.begin; Cell::kMemory == Memory::kCell && v < c_vectors.end; ++v) {
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
  using Base::G, Base::P, Base::lanes, Base::p, Base::T, Base::N, Base::I, Base::H, Base::R;
  using typename Base::A;
  using typename Base::E;
  using typename Base::V;
  static_assert(G <= kMaxCols, "a register tile holds all gates of a unit");
  // Vectors of units to a tile: a cell of one sum needs several for a tile's four columns.
  static constexpr int kTileVectors = P == 1 ? kMaxCols : 1;
  static constexpr int kTileSize = kMaxCols * lanes;  // a row of a tile, in memory
  // A row of x that tiles cannot read where it lies is copied (converted, padded) first.
  bool stages() const { return !Same<S, E>::value || I % M::kPair != 0; }

  const Plan& plan;
  const int64_t depth_x, depth_h;  // tile steps of the two parts
  const int64_t chunk_rows;        // most rows whose input part is computed at once
  E* packed;          // (D, tiles, depth_x + depth_h, vectors of a tile, G, lanes * kPair)
  A* bias;            // (D, vectors, P, lanes)
  A* packed_hr;       // (D, Rp, H) in panels, or null
  A* pre;             // (threads, tiles of a slice, chunk_rows, kMaxCols, lanes), hoisting only
  E* staged;          // (threads, chunk_rows, Ip), if stages()
  const E** rows;     // (threads, chunk_rows)
  Barrier* barriers;  // one a direction and row group, then the team's

  static int64_t steps_of(int64_t elements) { return ceil_div(elements, M::kPair); }
  int64_t Ip() const { return round_up(I, 2 * kBlock); }
  int64_t slice() const {
    return ceil_div(ceil_div(p.size.blocks(), plan.unit_groups) * (kBlock / lanes), kTileVectors);
  }
  int groups() const { return plan.direction_groups * plan.row_groups; }

  PersistentForward(const typename Base::Params& params, const Plan& the_plan, Arena& arena)
      : Base(params, arena),
        plan(the_plan),
        depth_x(steps_of(I)),
        depth_h(T == 1 && !params.h0 ? 0 : steps_of(R)),
        chunk_rows(max64(1, plan.hoist_steps) * ceil_div(N, plan.row_groups)) {
    const int D = p.size.D;
    const int threads = plan.threads;
    packed = arena.take<E>(D * this->vectors * panel_size());
    bias = arena.take<A>(D * this->vectors * P * lanes);
    packed_hr = p.weights[0].w_hr ? arena.take<A>(D * this->Rp * H) : nullptr;
    pre = plan.hoist_steps ? arena.take<A>(threads * slice() * chunk_rows * kTileSize) : nullptr;
    staged = stages() ? arena.take<E>(threads * chunk_rows * Ip()) : nullptr;
    rows = arena.take<const E*>(threads * chunk_rows);
    barriers = arena.take<Barrier>(groups() + 1);
  }

  void init_barriers() {
    for (int i = 0; i < groups(); ++i) barriers[i].init(plan.unit_groups);
    barriers[groups()].init(plan.threads);
  }

  bool has_hidden(int64_t step) const { return step > 0 || p.h0; }
  int64_t panel_size() const { return (depth_x + depth_h) * G * lanes * M::kPair; }
  E* panel(int d, int64_t vec) const { return packed + (d * this->vectors + vec) * panel_size(); }
  A* bias_of(int d, int64_t vec) const { return bias + (d * this->vectors + vec) * P * lanes; }

  // The tile of `cols` vectors of units from vec on.
  void pack(int d, int64_t vec, int cols) const {
    const Weights& w = p.weights[d];
    constexpr int width = lanes * M::kPair;
    const int64_t pitch = cols * G * width;
    for (int col = 0; col < cols; ++col) {
      const int64_t u = (vec + col) * lanes;
      E* dst = panel(d, vec) + col * G * width;
      const auto put = [&](const void* weights, int gate, int64_t K, E* to) {
        pack_rows_as_lanes<M>(to, pitch, static_cast<const S*>(weights) + (gate * H + u) * K, H - u,
                              K);
      };
      for (int j = 0; j < G; ++j) {
        put(w.w_ih, Cell::input_gate(j), I, dst + j * width);
        if (depth_h > 0) put(w.w_hh, Cell::hidden_gate(j), R, dst + depth_x * pitch + j * width);
      }
      for (int j = 0; j < P; ++j) store(bias_of(d, vec + col) + j * lanes, this->bias_sum(w, j, u));
    }
  }

  Panels<Multiply<A>> projection_panels(int d, int unit_group) const {
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
          pre(k.pre + i * k.slice() * k.chunk_rows * kTileSize),
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
      int64_t tile = 0;
      for_each_tile_of_units(false, [&](int64_t vec, int cols) {
        if (tile++ % k.plan.row_groups == place.row_group) k.pack(d, vec, cols);
      });
      if (k.packed_hr && place.row_group == 0)
        pack_transposed(k.projection_panels(d, place.unit_group),
                        static_cast<const S*>(k.p.weights[d].w_hr), k.R, k.H);
      for (int64_t i = place.unit_group; i < group.count; i += k.plan.unit_groups)
        k.init_row(d, group.row(i));
    }

    const E* input_row(int64_t t, int64_t n, int64_t at) const {
      const S* x = static_cast<const S*>(k.p.x.data) + k.p.x.row(k.p.size.steps, t, n);
      if constexpr (Same<S, E>::value) {
        if (!k.stages()) return x;
      }
      E* copy = staged + at * k.Ip();
      stage_row(copy, x, k.I, k.Ip());
      return copy;
    }

    int64_t gather(int64_t at, int64_t of_step) {
      const int64_t active = group.active(k.active_at(d, of_step));
      const int64_t t = k.time(d, of_step);
      for (int64_t i = 0; i < active; ++i) rows[at + i] = input_row(t, group.row(i), at + i);
      return at + active;
    }

    A* pre_of(int64_t vec, int64_t row) const {
      return pre + ((vec - units.begin) / kTileVectors * k.chunk_rows + row) * kTileSize;
    }

    // f(vector of units, how many of them) for each tile of the slice. The weights may not fit the
    // cache; walking them to and fro finds those that were read last still in it.
    template <class F>
    void for_each_tile_of_units(bool backwards, const F& f) const {
      const int64_t count = ceil_div(units.size(), kTileVectors);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t vec = units.begin + (backwards ? count - 1 - i : i) * kTileVectors;
        f(vec, static_cast<int>(min64(kTileVectors, units.end - vec)));
      }
    }

    // f(vector of units, how many of them, first row, how many) for every tile of `count` rows.
    template <class F>
    void for_tiles(int64_t count, const F& f) const {
      for_each_tile_of_units(step % 2, [&](int64_t vec, int cols) {
        for_each_tile(0, count, [&](int64_t first, int rows) { f(vec, cols, first, rows); });
      });
    }

    void hoist(int64_t first, int64_t end) {
      int64_t count = 0;
      for (int64_t s = first; s < end; ++s) count = gather(count, s);
      for_tiles(count, [&](int64_t vec, int cols, int64_t row, int n) {
        multiply(cols, n, rows + row, k.panel(d, vec), k.depth_x, pre_of(vec, row), false);
      });
    }

    // out (n, kMaxCols, lanes) = (add ? out : 0) + n rows times a tile's weights.
    void multiply(int cols, int n, const E* const* a, const E* weights, int64_t depth, A* out,
                  bool add) const {
      TileProduct<M> product{{}, M::kPair, depth, 1, 0};
      for (int r = 0; r < n; ++r) product.rows[r] = a[r];
      multiply_tile(n, cols * G, product, weights, out, add);
    }

    void walk() {
      const int64_t active = group.active(k.active_at(d, step));
      if (!k.plan.hoist_steps) gather(0, step);
      for_tiles(active, [&](int64_t vec, int cols, int64_t row, int n) {
        if constexpr (kTileVectors > 1) {
          tile_through_memory(vec, cols, row, n);
        } else {
          with_constant<kMaxRows>(
              n, [&](auto rows) { tile_in_registers<decltype(rows)::value>(*this, vec, row); });
        }
      });
      chunk_row += active;
      if (k.packed_hr) {
        barrier.wait();
        project(active);
      }
      k.leave(d, step, group, units, hiddens);
      barrier.wait();
    }

    // acc += rows times one vector of units' weights, G gates that add to sums [First, First + G).
    template <int First, int Rows>
    static LSTM_FUSED_INLINE void add_products(V (&sums)[Rows][P], const E* const* rows,
                                               const E* weights, int64_t depth) {
      if constexpr (P == G) {
        accumulate<M, Rows, G>(sums, rows, M::kPair, weights, depth);
      } else {
        V part[Rows][G];
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
          for (int j = 0; j < G; ++j) part[r][j] = sums[r][First + j];
        accumulate<M, Rows, G>(part, rows, M::kPair, weights, depth);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
          for (int j = 0; j < G; ++j) sums[r][First + j] = part[r][j];
      }
    }

    // A tile of one vector of units, from its weights to the stored states.
    template <int Rows>
    static void tile_in_registers(const Worker& w, int64_t vec, int64_t first) {
      const PersistentForward& k = w.k;
      const E* weights = k.panel(w.d, vec);
      const A* bias = k.bias_of(w.d, vec);
      V sums[Rows][P];
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
        for (int j = 0; j < P; ++j) sums[r][j] = load<V>(bias + j * lanes);
      if (k.plan.hoist_steps) {
        const A* pre = w.pre_of(vec, w.chunk_row + first);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
          for (int j = 0; j < G; ++j) sums[r][j] += load<V>(pre + r * kTileSize + j * lanes);
      } else {
        add_products<0>(sums, w.rows + first, weights, k.depth_x);
      }
      if (k.has_hidden(w.step)) {
        const E* h_rows[Rows];
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) h_rows[r] = k.hidden(w.d, w.step, w.group.row(first + r));
        add_products<P - G>(sums, h_rows, weights + k.depth_x * G * lanes * M::kPair, k.depth_h);
      }
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) k.finish(w.d, w.step, w.group.row(first + r), vec, sums[r]);
    }

    // The same of several vectors of units of a cell of one sum: the products are the ones every
    // cell shares, instead of 24 more of its own, and there is little to finish.
    void tile_through_memory(int64_t vec, int cols, int64_t first, int n) const {
      static_assert(kTileVectors == 1 || P == 1);
      const E* weights = k.panel(d, vec);
      A own[kMaxRows * kTileSize];
      A* out = own;
      if (k.plan.hoist_steps) {
        out = pre_of(vec, chunk_row + first);
      } else {
        multiply(cols, n, rows + first, weights, k.depth_x, out, false);
      }
      if (k.has_hidden(step)) {
        const E* h_rows[kMaxRows];
        for (int r = 0; r < n; ++r) h_rows[r] = k.hidden(d, step, group.row(first + r));
        multiply(cols, n, h_rows, weights + k.depth_x * cols * G * lanes * M::kPair, k.depth_h, out,
                 true);
      }
      for (int r = 0; r < n; ++r)
        for (int c = 0; c < cols; ++c) {
          V sum[P] = {load<V>(out + r * kTileSize + c * lanes) + load<V>(k.bias_of(d, vec + c))};
          k.finish(d, step, group.row(first + r), vec + c, sum);
        }
    }

    void project(int64_t active) const {
      const Panels<Multiply<A>> panels = k.projection_panels(d, place.unit_group);
      for (int64_t panel = 0; panel < panels.count(); ++panel) {
        const int cols = panels.cols(panel);
        for_each_tile(0, active, [&](int64_t first, int n) {
          TileProduct<Multiply<A>> product{{}, 1, k.H, 1, 0};
          for (int r = 0; r < n; ++r)
            product.rows[r] = k.full + (d * k.N + group.row(first + r)) * k.Hp;
          A out[kMaxRows * kMaxCols * lanes];
          multiply_tile(n, cols, product, panels.panel(panel), out, false);
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
