// The persistent forward kernel. Each thread owns a slice of hidden units (or of batch rows) for
// the whole sequence. A register tile holds all gates of a vector of units for several batch rows,
// and the cell update happens in registers. Where threads divide the units, there is one barrier a
// step, two with a projection or an operand.
#pragma once

#include "forward_buffers.h"

namespace lstm_fused {
namespace {

template <class Cell, class S, class M>
struct PersistentForward : ForwardBuffers<Cell, S, M> {
  using Base = ForwardBuffers<Cell, S, M>;
  using Base::Base, Base::G, Base::P, Base::kMaxPreacts, Base::kTileSize, Base::lanes;
  using typename Base::A;
  using typename Base::E;
  using typename Base::V;
  static constexpr bool kThroughMemory = Base::kThroughMemory;

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
    RowSums<A> sums;
    A* parts;
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
          barrier(k.barriers[place.direction_group * k.plan.row_groups + place.row_group]),
          sums(k.statistics, place, i, k.plan.unit_groups, barrier),
          parts(k.finishes_later() ? k.parts + i * k.thread_parts() : nullptr) {}

    void run() {
      const int first = k.p.size.first_direction() + place.direction_group;
      const int end = k.p.size.end_direction();
      for (d = first; d < end; d += k.plan.direction_groups) prepare();
      k.barriers[k.groups()].wait();
      for (d = first; d < end; d += k.plan.direction_groups) {
        const int64_t chunk = max64(1, k.plan.hoist_steps);
        for (int64_t first = 0; first < k.T; first += chunk) {
          const int64_t end = min64(k.T, first + chunk);
          if (k.hoists()) hoist(first, end);
          chunk_row = 0;
          for (step = first; step < end; ++step) run_step();
        }
      }
    }

    // Row groups read the same packed weights of their units, and divide the packing.
    void prepare() const {
      int64_t tile = 0;
      for_each_tile_of_units(false, [&](int64_t vec, int cols) {
        if (tile++ % k.plan.row_groups == place.row_group) k.pack(d, vec, cols);
      });
      if (k.packed_hr && place.row_group == 0)
        pack_transposed(k.projection_panels(d, place.unit_group),
                        static_cast<const S*>(k.p.weights[d].w_hr), k.R, k.H);
      if (k.packed_operand && place.row_group == 0)
        pack_transposed(k.operand_panels(d, place.unit_group),
                        static_cast<const S*>(k.p.weights[d].w_hh) + (k.G - 1) * k.H * k.H, k.H,
                        k.H);
      if (place.row_group == 0) k.stage_unit_vectors(d, units);
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
      return pre + ((vec - units.begin) / k.tile_vectors() * k.chunk_rows + row) * kTileSize;
    }

    // f(vector of units, how many of them) for each tile of the slice. The order alternates from
    // step to step (boustrophedon traversal): where the weights do not fit the cache, those read
    // last are still in it.
    template <class F>
    void for_each_tile_of_units(bool backwards, const F& f) const {
      const int tile = k.tile_vectors();
      const int64_t count = ceil_div(units.size(), tile);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t vec = units.begin + (backwards ? count - 1 - i : i) * tile;
        f(vec, static_cast<int>(min64(tile, units.end - vec)));
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
        TileProduct<M> product(k.panel(d, vec), k.depth_x, M::kPair, k.depth_x);
        for (int r = 0; r < n; ++r) product.rows[r] = rows[row + r];
        multiply_tile(n, cols * k.G, product, pre_of(vec, row), false);
      });
    }

    void run_step() {
      const int64_t active = group.active(k.active_at(d, step));
      if (!k.hoists() && !k.p.size.x_is_preacts) gather(0, step);
      for_tiles(active, [&](int64_t vec, int cols, int64_t row, int n) {
        if constexpr (kThroughMemory) {
          tile_through_memory(vec, cols, row, n);
        } else {
          if constexpr (kWideRows < kMaxRows) {
            if (n > kWideRows) return tile_in_strips(vec, row, n);
          }
          with_constant<kWideRows>(
              n, [&](auto rows) { tile_in_registers<decltype(rows)::value>(*this, vec, row); });
        }
      });
      chunk_row += active;
      if constexpr (kIsAny<Cell>) {
        if (k.normalizes()) normalize(active);
        if (k.has_operand()) multiply_operands(active);
      }
      if (k.packed_hr) {
        barrier.wait();
        project(active);
      }
      k.finish_step(d, step, group, units, hiddens);
      // Without products with the hidden state nothing passes from thread to thread.
      if (k.p.size.K > 0) barrier.wait();
    }

    // preacts += rows times one vector of units' weights, G gates that add to the pre-activations
    // [First, First + G).
    template <int First, int Rows>
    static LSTM_FUSED_INLINE void add_products(V (&preacts)[Rows][kMaxPreacts],
                                               const E* const* rows, const E* weights,
                                               int64_t depth) {
      if constexpr (P == G) {
        accumulate<M, Rows, G>(preacts, rows, M::kPair, Columns<M, G>(weights, depth), depth);
      } else {
        V part[Rows][G];
        LSTM_FUSED_UNROLLED_FOR (int r = 0; r < Rows; ++r)
          LSTM_FUSED_UNROLLED_FOR (int j = 0; j < G; ++j) part[r][j] = preacts[r][First + j];
        accumulate<M, Rows, G>(part, rows, M::kPair, Columns<M, G>(weights, depth), depth);
        LSTM_FUSED_UNROLLED_FOR (int r = 0; r < Rows; ++r)
          LSTM_FUSED_UNROLLED_FOR (int j = 0; j < G; ++j) preacts[r][First + j] = part[r][j];
      }
    }

    // A tile of one vector of units, from its weights to the stored states.
    template <int Rows>
    static void tile_in_registers(const Worker& w, int64_t vec, int64_t first) {
      const PersistentForward& k = w.k;
      const A* bias = k.bias_of(w.d, vec);
      V preacts[Rows][P];
      LSTM_FUSED_UNROLLED_FOR (int r = 0; r < Rows; ++r)
        LSTM_FUSED_UNROLLED_FOR (int j = 0; j < P; ++j) preacts[r][j] = load<V>(bias + j * lanes);
      if (k.plan.hoist_steps) {
        const A* pre = w.pre_of(vec, w.chunk_row + first);
        LSTM_FUSED_UNROLLED_FOR (int r = 0; r < Rows; ++r)
          LSTM_FUSED_UNROLLED_FOR (int j = 0; j < G; ++j)
            preacts[r][j] += load<V>(pre + r * kTileSize + j * lanes);
      } else {
        add_products<0>(preacts, w.rows + first, k.panel(w.d, vec), k.depth_x);
      }
      if (k.has_hidden(w.step)) {
        const E* h_rows[Rows];
        LSTM_FUSED_UNROLLED_FOR (int r = 0; r < Rows; ++r)
          h_rows[r] = k.hidden(w.d, w.step, w.group.row(first + r));
        add_products<P - G>(preacts, h_rows, k.hidden_panel(w.d, vec, 1), k.depth_h);
      }
      LSTM_FUSED_UNROLLED_FOR (int r = 0; r < Rows; ++r)
        k.finish(w.d, w.step, w.group.row(first + r), vec, preacts[r]);
    }

    // The same for more rows than a tile of all gates has: strip by strip, with the pre-activations
    // in memory and every sum in the same order.
    void tile_in_strips(int64_t vec, int64_t first, int n) const {
      TileProduct<M> input(k.panel(d, vec), k.depth_x, M::kPair, k.depth_x);
      TileProduct<M> hidden(k.hidden_panel(d, vec, 1), k.depth_h, M::kPair, k.depth_h);
      A out[kMaxRows * kTileSize];
      for (int r = 0; r < n; ++r) {
        input.rows[r] = rows[first + r];
        hidden.rows[r] = k.hidden(d, step, group.row(first + r));
        for (int j = 0; j < P; ++j) {
          V preact = load<V>(k.bias_of(d, vec) + j * lanes);
          if (k.plan.hoist_steps && j < G)
            preact += load<V>(pre_of(vec, chunk_row + first + r) + j * lanes);
          store(out + r * kTileSize + j * lanes, preact);
        }
      }
      const bool both = P == G && !k.plan.hoist_steps && k.has_hidden(step);
      if (both) input.next = &hidden;
      if (!k.plan.hoist_steps) extend_strips(n, G, input, out);
      if (k.has_hidden(step) && !both) extend_strips(n, G, hidden, out + (P - G) * lanes);
      for (int r = 0; r < n; ++r) {
        V preacts[P];
        for (int j = 0; j < P; ++j) preacts[j] = load<V>(out + r * kTileSize + j * lanes);
        k.finish(d, step, group.row(first + r), vec, preacts);
      }
    }

    // The same for several vectors of units. The products are those that all cells share, which
    // saves 24 instantiations; the epilogue is short, or a call.
    void tile_through_memory(int64_t vec, int cols, int64_t first, int n) const {
      static_assert(kThroughMemory);
      TileProduct<M> input(k.panel(d, vec), k.depth_x, M::kPair, k.depth_x);
      TileProduct<M> hidden(k.hidden_panel(d, vec, cols), k.depth_h, M::kPair, k.depth_h);
      for (int r = 0; r < n; ++r) {
        input.rows[r] = k.depth_x > 0 ? rows[first + r] : nullptr;
        hidden.rows[r] = k.hidden(d, step, group.row(first + r)) + k.head_of(vec);
      }
      const int G = k.G, P = k.P, hidden_gates = k.hidden_gates();
      const bool has_hidden = k.has_hidden(step) && hidden_gates > 0;
      const bool together = P == G && hidden_gates == G;  // both parts add to the same sums
      A own[kMaxRows * kTileSize], parted[kIsAny<Cell> ? kMaxRows * kTileSize : 1];
      A* out = k.hoists() ? pre_of(vec, chunk_row + first) : own;
      A* hidden_out = together ? out : parted;
      if (k.depth_x == 0)
        copy_input(vec, cols, first, n, out);
      else if (!k.hoists())
        multiply_tile(n, cols * G, input, out, false);
      if (has_hidden) multiply_tile(n, cols * hidden_gates, hidden, hidden_out, together);
      for (int r = 0; r < n; ++r)
        for (int c = 0; c < cols; ++c) {
          const auto sums_at = [&](const A* sums, int gates, int gate) {
            return load<V>(sums + r * kTileSize + (c * gates + gate) * lanes);
          };
          const auto preact = [&](int j) {
            V sum = load<V>(k.bias_of(d, vec + c) + j * lanes);
            if (j < G) sum = sums_at(out, G, j) + sum;
            const int gate = j - (P - G);
            if (!together && has_hidden && 0 <= gate && gate < hidden_gates)
              sum += sums_at(hidden_out, hidden_gates, gate);
            return sum;
          };
          const int64_t n = group.row(first + r);
          if constexpr (kIsAny<Cell>) {
            A here[kMaxPreacts * lanes];
            A* preacts = k.finishes_later() ? part_of(first + r, vec + c) : here;
            for (int j = 0; j < P; ++j) store(preacts + j * lanes, preact(j));
            if (!k.finishes_later()) k.finish_described(d, step, n, vec + c, preacts, nullptr);
            if (k.has_operand()) put_operand(n, vec + c, preacts);
          } else {
            V preacts[kMaxPreacts];
            for (int j = 0; j < P; ++j) preacts[j] = preact(j);
            k.finish(d, step, n, vec + c, preacts);
          }
        }
    }

    A* part_of(int64_t row, int64_t vec) const {
      return parts + row * k.row_parts() + (vec - units.begin) * k.P * lanes;
    }

    // The rest of a step of a cell that normalizes: what the values of each level are normalized
    // by, then the states.
    LSTM_FUSED_NOINLINE void normalize(int64_t active) {
      const UnitFunctions<A>& unit = k.unit();
      const double epsilon = k.unit_vectors_of(d, 0)[(k.p.unit->vectors - 1) * lanes];
      for (int level = 0; level < unit.levels; ++level)
        sums.run(
            unit, level, active, [&](int64_t i, double* to) { describe_values(level, i, to); },
            [&](int64_t i, int g, const auto& of) {
              A* to = sums.statistics(i) + 4 * g;
              const double count = static_cast<double>(unit.group[g].count * k.H);
              double mean = 0, squares = 0;
              for (int from = 0; from < k.plan.unit_groups; ++from) mean += of(from)[0] / count;
              for (int from = 0; from < k.plan.unit_groups; ++from) {
                const double own = static_cast<double>(unit.group[g].count * units_of(from));
                const double shift = own > 0 ? of(from)[0] / own - mean : 0;
                squares += of(from)[1] + own * shift * shift;
              }
              to[0] = static_cast<A>(mean);
              to[1] = static_cast<A>(1 / LSTM_FUSED_SQRT(squares / count + epsilon));
            });
      for (int64_t i = 0; i < active; ++i)
        for (int64_t vec = units.begin; vec < units.end; ++vec)
          k.finish_described(d, step, group.row(i), vec, part_of(i, vec), sums.statistics(i));
    }

    int64_t units_of(int unit_group) const {
      const Range vectors = vector_slice<A>(k.H, k.plan.unit_groups, unit_group);
      return min64(k.H, vectors.end * lanes) - min64(k.H, vectors.begin * lanes);
    }

    // Of each group of a level, over the thread's units of row i: the sum of its values, and that
    // of the squares of their distances from their mean, in a second pass so that no digits cancel.
    void describe_values(int level, int64_t i, double* to) const {
      const UnitFunctions<A>& unit = k.unit();
      A masks[kMaxUnitValues * lanes];
      for (int64_t vec = units.begin; vec < units.end; ++vec)
        unit.values[level](k.unit_at(d, step, group.row(i), vec, part_of(i, vec), masks, nullptr,
                                     sums.statistics(i)),
                           values_of(vec));
      for (int g = 0, first = 0; g < unit.groups; ++g) {
        if (unit.group[g].level != level) continue;
        const int count = unit.group[g].count;
        to[0] = sum_of_values(first, count, [](const V& v) { return v; });
        const A mean = static_cast<A>(to[0] / max64(1, units_of(place.unit_group) * count));
        to[1] = sum_of_values(first, count, [=](const V& v) { return (v - mean) * (v - mean); });
        to += 2;
        first += count;
      }
    }

    A* values_of(int64_t vec) const {
      return parts + k.statistics.rows * k.row_parts() +
             (vec - units.begin) * kMaxUnitGroups * kMaxCols * lanes;
    }
    // The sum of f(v) over `count` values from `first` on of each of the thread's units.
    template <class F>
    double sum_of_values(int first, int count, const F& f) const {
      constexpr int kSums = 4;  // added to in turn
      V sum[kSums] = {};
      const auto add = [&](int64_t vec, const auto& of) {
        const A* values = values_of(vec) + first * lanes;
        for (int j = 0; j < count; ++j) sum[j % kSums] += of(load<V>(values + j * lanes));
      };
      const int64_t whole = min64(units.end, k.H / lanes);  // vectors without padding
      for (int64_t vec = units.begin; vec < whole; ++vec) add(vec, f);
      for (int64_t vec = max64(units.begin, whole); vec < units.end; ++vec)
        add(vec, [&](const V& v) { return keep_first(f(v), k.H - vec * lanes); });
      return sums.sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
    }

    // The input's part of a tile where x holds it.
    LSTM_FUSED_NOINLINE void copy_input(int64_t vec, int cols, int64_t first, int n, A* out) const {
      const int64_t t = k.time(d, step);
      for (int r = 0; r < n; ++r) {
        const S* x =
            static_cast<const S*>(k.p.x.data) + k.p.x.row(k.p.size.steps, t, group.row(first + r));
        for (int c = 0; c < cols * k.G; ++c) {
          const int64_t u = (vec + c / k.G) * lanes;
          store(out + (r * kMaxCols + c) * lanes,
                load_first<V>(x + input_gate_of(k.G, k.P, c % k.G) * k.H + u, k.H - u));
        }
      }
    }

    // put(i, vector, product) of each of the group's rows, row(i), with each column vector.
    template <class Any, class Row, class Put>
    void multiply_panels(const Panels<Any>& panels, int64_t active, const Row& row,
                         const Put& put) const {
      for (int64_t panel = 0; panel < panels.count(); ++panel) {
        const int cols = panels.cols(panel);
        for_each_tile(0, active, [&](int64_t first, int n) {
          TileProduct<Any> product(panels.panel(panel), panels.depth, Any::kPair, panels.depth);
          for (int r = 0; r < n; ++r) product.rows[r] = row(first + r);
          A out[kMaxRows * kMaxCols * lanes];
          multiply_tile(n, cols, product, out, false);
          for (int r = 0; r < n; ++r)
            for (int c = 0; c < cols; ++c)
              put(first + r, panels.first_vector(panel) + c,
                  load<V>(out + (r * kMaxCols + c) * lanes));
        });
      }
    }

    void project(int64_t active) const {
      multiply_panels(
          k.projection_panels(d, place.unit_group), active,
          [&](int64_t i) { return k.full + (d * k.N + group.row(i)) * k.Hp; },
          [&](int64_t i, int64_t vec, const V& h) {
            k.put_hidden(d, step, group.row(i), vec * lanes, h);
          });
    }

    E* operand_of(int64_t n) const { return k.operand + (d * k.N + n) * k.Rp; }

    void put_operand(int64_t n, int64_t vec, const A* preacts) const {
      A masks[kMaxUnitValues * lanes], found[lanes];
      k.unit().operand(k.unit_at(d, step, n, vec, preacts, masks, found, nullptr));
      const int64_t u = vec * lanes;
      store(operand_of(n) + u, round_to(keep_first(load<V>(found), k.H - u), S{}));
    }

    // The rest of a step of a cell with an operand: its product, then the states.
    LSTM_FUSED_NOINLINE void multiply_operands(int64_t active) const {
      barrier.wait();
      multiply_panels(
          k.operand_panels(d, place.unit_group), active,
          [&](int64_t i) { return operand_of(group.row(i)); },
          [&](int64_t i, int64_t vec, const V& product) {
            A* preacts = part_of(i, vec);
            A* last = preacts + (k.P - 1) * lanes;
            store(last, load<V>(last) + product);
            k.finish_described(d, step, group.row(i), vec, preacts, nullptr);
          });
    }
  };
};

}  // namespace
}  // namespace lstm_fused
