// The gradients of x, weights and biases, after the steps of backward: each is one product over all
// rows of the sequence with the gradients of the pre-activations, read in the layout of
// backward_state.h.
#pragma once

#include "backward.h"

namespace lstm_fused {
namespace {

// The step and the batch row of all steps' rows, in their order.
struct RowCursor {
  const Steps& steps;
  int64_t t = 0, n = 0;
  int64_t run = 0;  // the step, or the document

  // To row s, from which on advance goes.
  void seek(int64_t s) {
    const int64_t* const begins = steps.bounds ? steps.bounds : steps.offsets;
    if (!begins) {
      run = s / steps.N;
      return;
    }
    int64_t end = steps.bounds ? steps.N : steps.T;
    for (run = 0; end - run > 1;) {
      const int64_t middle = (run + end) / 2;
      (begins[middle] <= s ? run : end) = middle;
    }
  }
  // s never gets less.
  void advance(int64_t s) {
    if (steps.bounds) {
      while (steps.bounds[run + 1] <= s) ++run;
      t = s - steps.bounds[run];
      n = steps.ranks[run];
    } else {
      while (steps.offset(run + 1) <= s) ++run;
      t = run;
      n = s - steps.offset(run);
    }
  }
};

template <class Cell, class S, class M>
struct Gradients : BackwardState<Cell, S, M> {
  using Base = BackwardState<Cell, S, M>;
  using Base::G, Base::P, Base::kReadsInPlace, Base::lanes, Base::p, Base::plan, Base::T, Base::N,
      Base::I, Base::H, Base::R, Base::S_rows, Base::Hb, Base::Hp;
  using typename Base::A;
  using typename Base::E;
  using typename Base::V;
  // Rows of B packed at a time. A panel of them stays in the first-level cache. The partial sums,
  // which may exceed the second-level cache, are read and written once for so many rows.
  static constexpr int64_t kDepth = 128 * M::kPair;
  // Rows of dx between two passes over W_ih, whose panels stream from the second-level cache.
  static constexpr int64_t kRowsPerPass = 96;
  // Blocks of hidden units of such a panel between two passes.
  static constexpr int64_t kBlocksPerPass = 16;

  // Of one matrix at a time, or of each of a direction where several calls add to them: (column
  // groups, panels, rows, kMaxCols, lanes).
  A* sums;
  int64_t sums_size;  // of a matrix
  E* b;               // (threads, columns, kDepth)
  A* dx_sums;         // (threads, kRowsPerPass, kMaxCols, lanes), dx only
  E* a;               // (threads, kDepth, columns of a block) pairs of rows interleaved, pairs only

  static constexpr int kMatrices = 3;  // w_ih, w_hh, and w_hr or the last gate of w_hh

  int64_t packed_rows_size() const { return kDepth * round_up(max64(max64(I, R), H), kBlock); }

  Gradients(const BackwardParams& params, const Plan& the_plan, Arena& arena, Arena& lasting)
      : Base(params, the_plan, arena, lasting) {
    const int64_t gate_panels = max64(Split(plan, Hb, I).panels(), Split(plan, Hb, R).panels());
    const int64_t sum_rows =
        max64(G * Hp * gate_panels, this->Rp * Split(plan, this->Rb, H).panels());
    sums_size = sum_rows * kMaxCols * lanes;
    sums = lasting.take<A>(sums_size * (p.lasting ? kMatrices : 1));
    b = arena.take<E>(plan.threads * packed_rows_size());
    dx_sums = p.dx ? arena.take<A>(plan.threads * kRowsPerPass * kMaxCols * lanes) : nullptr;
    a = M::kPair > 1 ? arena.take<E>(plan.threads * kDepth * G * kBlock) : nullptr;
  }

  Panels<M> input_panels(int d) const {
    return {
        {0, ceil_div(I, lanes)}, Base::gate_steps(G), this->packed_ih + d * this->Ip() * G * Hp};
  }

  void pack_input_weights(int worker) const {
    if (!this->packed_ih || p.size.x_is_preacts) return;
    for (int d = p.size.first_direction(); d < p.size.end_direction(); ++d) {
      const Panels<M> panels = input_panels(d);
      pack_gate_rows(panels, split(panels.depth, plan.threads, worker), this->input_order(),
                     static_cast<const S*>(p.weights[d].w_ih), H, I);
    }
  }

  void input_gradient(int worker) const {
    if (!p.dx) return;
    if (p.size.x_is_preacts) return copy_input_gradient(worker);
    if (this->in_place) return input_gradient_in_place(worker);
    const Range own = split(S_rows, plan.threads, worker);
    for (int64_t begin = own.begin; begin < own.end; begin += kRowsPerPass) {
      const int64_t end = min64(begin + kRowsPerPass, own.end);
      const Panels<M> shape = input_panels(0);
      for (int64_t panel = 0; panel < shape.count(); ++panel)
        input_gradient_panel(worker, shape, panel, begin, end);
    }
  }

  // Where x holds the input's part of the pre-activations.
  LSTM_FUSED_NOINLINE void copy_input_gradient(int worker) const {
    const Range own = split(S_rows, plan.threads, worker);
    for (int64_t s = own.begin; s < own.end; ++s)
      for (int j = 0; j < G; ++j)
        for (int64_t u = 0; u < H; u += lanes) {
          const E* from = this->preact_gradients(0, u / kBlock, s) + j * kBlock + u % kBlock;
          S* to = static_cast<S*>(p.dx) + s * I + input_gate_of(G, P, j) * H + u;
          store_first(to, load<V>(from), H - u);
        }
  }

  // All rows of the thread's columns.
  void input_gradient_in_place(int worker) const {
    if constexpr (kReadsInPlace) {
      const Range vectors = split(ceil_div(I, lanes), plan.threads, worker);
      const Range columns{vectors.begin * lanes, min64(vectors.end * lanes, I)};
      const InPlaceSums<A> sums = this->row_sums_of(worker);
      for (int64_t first = 0; first < S_rows; first += kInPlaceRows) {
        const int count = static_cast<int>(min64(kInPlaceRows, S_rows - first));
        const int begin = p.size.first_direction();
        for (int d = begin; d < p.size.end_direction(); ++d) {
          const A* rows[kInPlaceRows];
          for (int r = 0; r < count; ++r) rows[r] = this->preact_gradients(d, 0, first + r);
          with_constant<kInPlaceRows>(count, [&](auto n) {
            multiply_in_place<Cell::kGates, decltype(n)::value>(
                rows, S_rows * P * kBlock, Cell::input_gate,
                static_cast<const S*>(p.weights[d].w_ih), H, I, columns, sums, 0, d > begin);
          });
        }
        for (int r = 0; r < count; ++r)
          for (int64_t i = columns.begin; i < columns.end; i += lanes)
            put_input_gradient(first + r, i, load<V>(sums.all[r] + i));
      }
    }
  }

  void put_input_gradient(int64_t s, int64_t i, V v) const {
    S* to = static_cast<S*>(p.dx) + s * I + i;
    if (p.add_dx) v = load_first<V>(to, I - i) + v;
    store_first(to, v, I - i);
  }

  // Rows [begin, end) of one panel of columns. The panel is used in parts, each for all rows, that
  // stay in the second-level cache beside the rows.
  void input_gradient_panel(int worker, const Panels<M>& shape, int64_t panel, int64_t begin,
                            int64_t end) const {
    const int cols = shape.cols(panel);
    A* sums = dx_sums + worker * kRowsPerPass * kMaxCols * lanes;
    const int first_direction = p.size.first_direction();
    for (int d = first_direction; d < p.size.end_direction(); ++d)
      for (int64_t block = 0; block < Hb; block += kBlocksPerPass) {
        GateProduct<M> tile(*this, input_panels(d), panel,
                            {block, min64(block + kBlocksPerPass, Hb)}, G);
        for_each_tile(begin, end, [&](int64_t first, int n) {
          tile.set_rows(
              n, [&](int r, int64_t block) { return this->preact_gradients(d, block, first + r); });
          multiply_tile(n, cols, tile.first(), sums + (first - begin) * kMaxCols * lanes,
                        d > first_direction || block > 0);
        });
      }
    for (int64_t s = begin; s < end; ++s)
      for (int c = 0; c < cols; ++c) {
        const int64_t i = (shape.first_vector(panel) + c) * lanes;
        put_input_gradient(s, i, load<V>(sums + ((s - begin) * kMaxCols + c) * lanes));
      }
  }

  // How threads divide a weight gradient: by blocks of its rows, and where those are too few, by
  // columns too.
  struct Split {
    int64_t block_groups, column_groups, group_panels;
    Split(const Plan& plan, int64_t blocks, int64_t columns)
        : block_groups(min64(plan.threads, blocks)),
          column_groups(plan.threads / block_groups),
          group_panels(ceil_div(ceil_div(ceil_div(columns, lanes), column_groups), kMaxCols)) {}
    int64_t threads() const { return block_groups * column_groups; }
    int64_t panels() const { return column_groups * group_panels; }
  };

  // A weight gradient: the first `gates` * 16 columns of `a`, laid out (blocks, S, pitch), times
  // rows of B. A block's lane of gate g is the weight's row of gate_of(g) and its unit.
  struct Product {
    const E* a;
    int64_t blocks, gates, pitch;
    GateOrder gate_of;
    int64_t units, columns;
    void* to;                 // (gates * units, columns) in S
    int matrix;               // its number among the direction's
    bool forward;             // of the first direction
    int64_t first_block = 0;  // where the blocks begin among those of all units

    int64_t width() const { return gates * kBlock; }
    // The first unit of a block, among all.
    int64_t unit_of(int64_t block) const { return (first_block + block) * kBlock; }
    // Only lanes that hold a unit are multiplied: as many of each gate, side by side.
    int64_t lanes_of(int64_t block) const { return min64(kBlock, units - unit_of(block)); }
  };

  const S* input_row(int64_t t, int64_t n) const {
    return static_cast<const S*>(p.x.data) + p.x.row(p.size.steps, t, n);
  }

  const S* previous_hidden(int d, int64_t t, int64_t n) const {
    const int64_t before = p.size.steps.before(d, t, n);
    if (before >= 0) {
      const int64_t s = p.size.steps.row(before, n);
      return this->projection ? static_cast<const S*>(p.y) + p.size.hidden_at(d, s)
                              : this->hidden + (d * S_rows + s) * H;
    }
    const bool reset = p.size.steps.begins_anew(d, t, n);
    if (this->resumed && !reset) return this->resumed + (d * N + n) * R;
    const int64_t row = p.size.initial_row(d, n, reset);
    return p.h0 && row >= 0 ? static_cast<const S*>(p.h0) + row * R : nullptr;
  }

  void weight_gradients(int worker) const {
    for (int d = p.size.first_direction(); d < p.size.end_direction(); ++d) {
      const WeightGradients& dw = p.dweights[d];
      if (dw.w_ih && !p.size.x_is_preacts)
        weight_gradient<S>(worker,
                           {this->preact_gradients(d, 0, 0), Hb, G, P * kBlock, this->input_order(),
                            H, I, dw.w_ih, 0, d == 0},
                           [&](int64_t, int64_t t, int64_t n) { return input_row(t, n); });
      if (dw.w_hh && p.size.K > 0) hidden_gradient(worker, d);
      if (dw.w_hr)
        weight_gradient<A>(worker,
                           {this->hidden_gradients(d, 0, 0),
                            this->Rb,
                            1,
                            kBlock,
                            {1, 1, true},
                            R,
                            H,
                            dw.w_hr,
                            2,
                            d == 0},
                           [&](int64_t s, int64_t, int64_t) {
                             return static_cast<const A*>(this->full + (d * S_rows + s) * Hp);
                           });
    }
  }

  // Of w_hh: of the rows of the last gate where they multiply an operand, and head by head of those
  // that multiply the hidden state.
  void hidden_gradient(int worker, int d) const {
    const GateOrder gates = this->hidden_order();
    if (this->has_operand())
      weight_gradient<S>(worker,
                         {this->preact_gradients(d, 0, 0) + (P - 1) * kBlock, Hb, 1, P * kBlock,
                          this->operand_order(), H, H,
                          static_cast<S*>(p.dweights[d].w_hh) + (G - 1) * H * H, 2, d == 0},
                         [&](int64_t s, int64_t, int64_t) {
                           return static_cast<const S*>(this->operands + (d * S_rows + s) * H);
                         });
    if (gates.G == 0) return;
    const int64_t heads = p.size.heads(), blocks = heads == 1 ? Hb : p.size.K / kBlock;
    for (int64_t head = 0; head < heads; ++head)
      weight_gradient<S>(
          worker,
          {this->hidden_preact_gradients(d, head * blocks, 0), blocks, gates.G, P * kBlock, gates,
           H, p.size.K, p.dweights[d].w_hh, 1, d == 0, head * blocks},
          [&](int64_t, int64_t t, int64_t n) {
            const S* row = previous_hidden(d, t, n);
            return row && head > 0 ? row + head * p.size.K : row;
          });
  }

  template <class B, class RowOf>
  void weight_gradient(int worker, const Product& w, const RowOf& row_of) const {
    if constexpr (kReadsInPlace) {
      if (this->in_place && !p.lasting) return gradient_in_place<B>(worker, w, row_of);
    }
    const Split shares(plan, w.blocks, w.columns);
    if (worker < shares.threads()) own_gradient<B>(worker, w, row_of, shares);
    // The next matrix uses `sums` with another partition.
    this->barriers[this->groups()].wait();
  }

  // Few rows: each row of the gradient is written once, from all of them.
  template <class B, class RowOf>
  void gradient_in_place(int worker, const Product& w, const RowOf& row_of) const {
    const B* rows[kDirectMaxAllRows];
    int64_t places[kDirectMaxAllRows], count = 0;  // of rows that there are: h_0 may be left out
    RowCursor at{p.size.steps};
    for (int64_t s = 0; s < S_rows; ++s) {
      at.advance(s);
      rows[count] = row_of(s, at.t, at.n);
      if (rows[count]) places[count++] = s;
    }
    const Range blocks = split(w.blocks, plan.threads, worker);
    for (int64_t j = blocks.begin; j < blocks.end; ++j)
      for (int64_t m = 0; m < w.width(); m += kInPlaceDepth) {
        const int64_t unit = w.unit_of(j) + m % kBlock;
        if (unit >= w.units) continue;
        const A* factors[kDirectMaxAllRows];
        for (int64_t i = 0; i < count; ++i)
          factors[i] = w.a + (j * S_rows + places[i]) * w.pitch + m;
        S* to = static_cast<S*>(w.to) + (w.gate_of(m / kBlock) * w.units + unit) * w.columns;
        with_constant<kInPlaceDepth>(
            static_cast<int>(min64(kInPlaceDepth, w.units - unit)), [&](auto units) {
              outer_products<decltype(units)::value, A>(factors, rows, count, to, w.columns);
            });
      }
  }

  template <class B, class RowOf>
  void own_gradient(int worker, const Product& w, const RowOf& row_of, const Split& shares) const {
    const int64_t column_group = worker / shares.block_groups;
    const Range blocks = split(w.blocks, shares.block_groups, worker % shares.block_groups);
    const Range vectors = split(ceil_div(w.columns, lanes), shares.column_groups, column_group);
    const Panels<M> panels{vectors, kDepth / M::kPair, b + worker * packed_rows_size()};
    A* own_sums = sums + (p.lasting ? w.matrix * sums_size : 0) +
                  column_group * shares.group_panels * w.blocks * w.width() * kMaxCols * lanes;
    // With one pass no sum is kept: every block uses the same memory, which stays in the cache.
    const bool once = S_rows <= kDepth && !p.lasting;
    const auto sums_of = [&](int64_t panel, int64_t j) {
      const int64_t at = once ? blocks.begin : panel * w.blocks + j;
      return own_sums + at * w.width() * kMaxCols * lanes;
    };
    // In the order in which backward reached the rows, last steps first in the first direction, so
    // that calls for the steps between checkpoints add in the order of one call.
    const int64_t pieces = ceil_div(S_rows, kDepth);
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t s0 = (w.forward ? pieces - 1 - piece : piece) * kDepth;
      RowCursor at{p.size.steps};
      at.seek(s0);
      const int64_t rows = min64(kDepth, S_rows - s0), depth = Base::steps_of(rows);
      for (int64_t step = 0; step < depth; ++step)
        pack_panel_step(panels, step, w.columns, [&](int64_t i) -> const B* {
          const int64_t s = s0 + i;
          if (s >= S_rows) return nullptr;
          at.advance(s);
          return row_of(s, at.t, at.n);
        });
      for (int64_t j = blocks.begin; j < blocks.end; ++j) {
        const Rows block = block_rows(worker, w, w.a + (j * S_rows + s0) * w.pitch, rows);
        BlockPrefetch next{w,
                           j + 1 < blocks.end ? w.a + ((j + 1) * S_rows + s0) * w.pitch : nullptr,
                           rows, panels.count()};
        for (int64_t panel = 0; panel < panels.count(); ++panel) {
          A* to = sums_of(panel, j);
          add_block(w, w.lanes_of(j), block, panels, panel, depth, piece > 0 || p.continued, to,
                    next);
          if (piece == pieces - 1 && !p.unfinished) put_rows(w, j, panels, panel, to);
        }
      }
    }
  }

  // Rows of a block in the layout of tiles: element m of tile step k is at data + k * stride + m *
  // kPair.
  struct Rows {
    const E* data;
    int64_t stride;
  };

  // Pairs of rows are interleaved first: they are not adjacent.
  Rows block_rows(int worker, const Product& w, const E* from, int64_t rows) const {
    if constexpr (M::kPair == 1) {
      return {from, w.pitch};
    } else {
      E* to = a + worker * kDepth * G * kBlock;
      const int64_t width = w.width() * M::kPair;
      for (int64_t i = 0; i < rows; i += M::kPair)
        for (int64_t m = 0; m < w.width(); m += lanes) {
          const E* const pair[] = {from + i * w.pitch + m,
                                   i + 1 < rows ? from + (i + 1) * w.pitch + m : nullptr};
          M::store_b(to + i / M::kPair * width + m * M::kPair, pair, lanes);
        }
      return {to, width};
    }
  }

  // Prefetch of the next block, a part before each tile of this one.
  struct BlockPrefetch {
    const E* at;
    int64_t lines, each, done = 0;
    BlockPrefetch(const Product& w, const E* from, int64_t rows, int64_t panels)
        : at(from),
          lines(from ? rows * w.pitch * static_cast<int64_t>(sizeof(E)) / kLine : 0),
          each(ceil_div(lines, max64(1, panels) * ceil_div(w.width(), kMaxRows))) {}
    void advance() {
      for (const int64_t end = min64(done + each, lines); done < end; ++done)
        prefetch_into_l2(at + done * (kLine / sizeof(E)));
    }
  };

  // to (gates, units, kMaxCols, lanes) = (add ? to : 0) + the product of one block's first `units`
  // lanes of each gate and one panel.
  static void add_block(const Product& w, int64_t units, const Rows& block, const Panels<M>& panels,
                        int64_t panel, int64_t depth, bool add, A* to, BlockPrefetch& next) {
    for_each_tile(0, w.gates * units, [&](int64_t first, int n) {
      next.advance();
      TileProduct<M> tile(panels.panel(panel), panels.depth, block.stride, depth);
      for (int r = 0; r < n; ++r) {
        const int64_t m = first + r;
        const int64_t column = units == kBlock ? m : m / units * kBlock + m % units;
        tile.rows[r] = block.data + column * M::kPair;
      }
      multiply_tile(n, panels.cols(panel), tile, to + first * kMaxCols * lanes, add);
    });
  }

  void put_rows(const Product& w, int64_t j, const Panels<M>& panels, int64_t panel,
                const A* from) const {
    const int64_t units = w.lanes_of(j);
    for (int64_t m = 0; m < w.gates * units; ++m) {
      const int64_t unit = w.unit_of(j) + m % units;
      S* row = static_cast<S*>(w.to) + (w.gate_of(m / units) * w.units + unit) * w.columns;
      for (int c = 0; c < panels.cols(panel); ++c) {
        const int64_t at = (panels.first_vector(panel) + c) * lanes;
        store_first(row + at, load<V>(from + (m * kMaxCols + c) * lanes), w.columns - at);
      }
    }
  }

  void bias_gradients(int worker) const {
    if (p.unfinished) return;
    for (int d = p.size.first_direction(); d < p.size.end_direction(); ++d) {
      const WeightGradients& dw = p.dweights[d];
      if (!dw.b_ih && !dw.b_hh && !dw.vectors) continue;
      const Range vectors = split(ceil_div(H, lanes), plan.threads, worker);
      for (int64_t v = vectors.begin; v < vectors.end; ++v)
        for (int j = 0; j < this->sums_of_unit; ++j) {
          const int64_t u = v * lanes;
          V sum = {};
          for (int from = 0; from < plan.threads; ++from)
            sum += load<V>(this->bias_sums(from, true, d, u / kBlock) + j * kBlock + u % kBlock);
          const auto put = [&](void* to, int gate) {
            if (to) store_first(static_cast<S*>(to) + gate * H + u, sum, H - u);
          };
          if (j < G) put(dw.b_ih, input_gate_of(G, P, j));
          if (j >= P - G && j < P) put(dw.b_hh, j - (P - G));
          if (j >= P) put(dw.vectors, j - P);
        }
    }
  }

  void put_preact_gradients(int worker) const {
    if (!p.d_preacts) return;
    const Range own = split(S_rows, plan.threads, worker);
    for (int64_t s = own.begin; s < own.end; ++s)
      for (int d = p.size.first_direction(); d < p.size.end_direction(); ++d)
        for (int j = 0; j < P; ++j) {
          A* to = static_cast<A*>(p.d_preacts) + ((s * p.size.D + d) * P + j) * H;
          for (int64_t u = 0; u < H; u += lanes) {
            const E* from = this->preact_gradients(d, u / kBlock, s) + j * kBlock + u % kBlock;
            store_first(to + u, load<V>(from), H - u);
          }
        }
  }

  struct Worker {
    const Gradients& k;
    const int i;
    Worker(const Gradients& kernel, int worker) : k(kernel), i(worker) {}
    void run() const {
      k.pack_input_weights(i);
      k.clear_bias_sums(i);
      BackwardSteps<Cell, S, M>(k, i).run();
      k.barriers[k.groups()].wait();
      k.input_gradient(i);
      k.weight_gradients(i);
      k.bias_gradients(i);
      k.put_preact_gradients(i);
    }
  };

  void clear_bias_sums(int worker) const {
    if (p.continued) return;
    const int64_t each = 2 * p.size.D * Hb * this->sums_of_unit * kBlock;
    std::memset(this->db + worker * each, 0, each * sizeof(A));
  }
};

}  // namespace
}  // namespace lstm_fused
