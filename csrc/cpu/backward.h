// The persistent backward kernel, with forward's partition of units and rows. At each step a thread
// multiplies the previous step's gradients of the pre-activations by its columns of W_hh, adds dy,
// runs the cell's backward function on its own units and writes its part of the gradients of the
// pre-activations. There is one barrier a step. After the sequence every weight gradient and dx is
// one product over all rows (gradients.h).
#pragma once

#include "backward_thread.h"

namespace lstm_fused {
namespace {

template <class Cell, class S, class M>
struct BackwardSteps : BackwardThread<Cell, S, M> {
  using Base = BackwardThread<Cell, S, M>;
  using Base::barrier, Base::bias_sums, Base::carried_into, Base::cell, Base::d, Base::group,
      Base::hiddens, Base::k, Base::kCarries, Base::kMaxPreacts, Base::kReadsInPlace, Base::lanes,
      Base::normalize, Base::place, Base::row_of, Base::through_operand, Base::units, Base::worker;
  using typename Base::A;
  using typename Base::E;
  using typename Base::K;
  using typename Base::V;

  // Bias gradients are summed over so many rows at a time, and these sums are summed: one chain of
  // additions over all rows would lose digits. Where the pieces begin depends on the rows alone, so
  // that calls for the steps between checkpoints sum in the same order as one call does.
  static constexpr int64_t kRecentRows = 64;
  int64_t piece_of(int64_t step) const {
    return k.p.size.steps.offset(k.time(d, step)) / kRecentRows;
  }

  using Base::Base;

  void run() {
    const int first = k.p.size.first_direction() + place.direction_group;
    const int end = k.p.size.end_direction();
    for (d = first; d < end; d += k.plan.direction_groups) prepare();
    k.barriers[k.groups()].wait();
    for (d = first; d < end; d += k.plan.direction_groups) {
      int64_t carried = 0;  // rows of the previous step
      for (int64_t step = 0; step < k.T; ++step) {
        const int64_t active = group.active(k.p.size.steps.active(k.time(d, step)));
        run_step(step, carried, active);
        carried = active;
        if (step == k.T - 1 || piece_of(step) != piece_of(step + 1)) keep_bias_sums();
      }
      if (k.wants_initial()) run_step(k.T, carried, 0);
      finish_states();
    }
  }

  void prepare() const {
    const Weights& w = k.p.weights[d];
    if (k.packed_hh) {
      const Panels<M> hh = k.hidden_panels(d, place.unit_group);
      const Range steps = split(hh.depth, k.plan.row_groups, place.row_group);
      const S* w_hh = static_cast<const S*>(w.w_hh);
      if (k.head_rows)
        pack_head_rows(hh, steps, k.hidden_order(), w_hh, k.p.size.K, k.R,
                       k.head_rows + worker * M::kPair * k.R);
      else
        pack_gate_rows(hh, steps, k.hidden_order(), w_hh, k.H, k.R);
    }
    if (k.packed_operand) {
      const Panels<M> panels = k.operand_panels(d, place.unit_group);
      pack_gate_rows(panels, split(panels.depth, k.plan.row_groups, place.row_group),
                     k.operand_order(), k.operand_weights(d), k.H, k.R);
    }
    if (k.projection && place.row_group == 0) {
      const Panels<M> hr = k.projection_panels(d, place.unit_group);
      for (int64_t step = 0; step < hr.depth; ++step)
        pack_panel_step(hr, step, k.H, [&](int64_t r) {
          return r < k.R ? static_cast<const S*>(w.w_hr) + r * k.H : nullptr;
        });
    }
    if constexpr (kIsAny<Cell>) {
      if (place.row_group == 0)
        load_unit_vectors<S, A>(k.p.size, w.vectors, k.p.unit->vectors, units,
                                k.unit_vectors_of(d, 0));
    }
    for (int64_t i = place.unit_group; i < group.count; i += k.plan.unit_groups) {
      const int64_t n = group.row(i);
      if constexpr (kCarries)
        for (int c = 0; c < k.carried(); ++c) prepare_carried(n, c);
      if (k.dh_reset && !k.p.continued) clear(k.dh_reset + (d * k.N + n) * k.Rp, k.Rp);
      const int64_t all = k.cells() * k.Hp;
      if (k.dc_reset && !k.p.continued) clear(k.dc_reset + (d * k.N + n) * all, all);
      if (k.resumed)
        for (int64_t u = 0; u < k.R; u += lanes)
          store_first(k.resumed + (d * k.N + n) * k.R + u,
                      load_first<V>(k.checkpoint(d, n) + u, k.R - u), k.R - u);
    }
  }

  static void clear(A* row, int64_t width) {
    for (int64_t i = 0; i < width; i += lanes) store(row + i, V{});
  }

  // Carried state c of row n.
  void prepare_carried(int64_t n, int c) const {
    const bool own = c < k.cells();
    const auto stage = [&](A* to, const void* states, int64_t row) {
      const bool given = states && row >= 0;
      const int64_t at = own ? (row * k.cells() + c) * k.H : row * k.H;
      stage_row(to, given ? static_cast<const S*>(states) + at : nullptr, given ? k.H : 0, k.Hp);
    };
    const void* c0 = own ? k.p.c0 : k.p.h0;
    if (k.p.resume)
      stage_row(k.carried0(d, n, false, c), k.checkpoint(d, n) + k.carried_at(c), k.H, k.Hp);
    else
      stage(k.carried0(d, n, false, c), c0, k.p.size.initial_row(d, n, false));
    if (k.p.size.steps.resets)
      stage(k.carried0(d, n, true, c), c0, k.p.size.initial_row(d, n, true));
    A* dc = k.carried_gradients(d, n, c);
    if (k.p.d_after)
      stage_row(dc, static_cast<const A*>(k.p.d_after) + k.between(d, n) + k.R + c * k.H, k.H,
                k.Hp);
    else
      stage(dc, own ? k.p.dc_n : nullptr, k.p.size.final_row(d, n));
  }

  void keep_bias_sums() {
    for (int64_t v = units.begin; v < units.end; ++v) {
      const int64_t block = v * lanes / kBlock, lane = v * lanes % kBlock;
      for (int j = 0; j < k.sums_of_unit; ++j) {
        A* recent_sum = bias_sums(false, block) + j * kBlock + lane;
        A* sum = bias_sums(true, block) + j * kBlock + lane;
        store(sum, load<V>(sum) + load<V>(recent_sum));
        store(recent_sum, V{});
      }
    }
  }

  // Rows [0, carried) receive a gradient through W_hh; those past `active` end here, in dh0. Rows
  // [carried, active) start here, from dh_n.
  void run_step(int64_t step, int64_t carried, int64_t active) {
    const Panels<M> panels = k.hidden_panels(d, place.unit_group);
    if (k.in_place && carried > 0) multiply_rows_in_place(step, carried);
    if (k.p.size.cell_states && k.p.dy) add_cell_gradients(step, active);
    for (int64_t i = 0; i < panels.count(); ++i) {
      // Boustrophedon traversal of the weights, as in forward.
      const int64_t panel = step % 2 ? panels.count() - 1 - i : i;
      const auto each = [&](int64_t begin, int64_t end, bool recurrent) {
        for_each_tile(begin, end, [&](int64_t first, int n) {
          A out[kMaxRows * kMaxCols * lanes];
          const bool ended = first >= active;
          recurrent ? product(panels, panel, step, first, n, ended, out)
                    : final_gradient(panels, panel, first, n, out);
          distribute(panels, panel, step, first, n, ended, out);
        });
      };
      each(0, min64(carried, active), true);
      if (k.wants_initial()) each(active, carried, true);
      each(carried, active, false);
    }
    if (k.projection && active > 0) {
      barrier.wait();
      through_projection(step, active);
    }
    if constexpr (kIsAny<Cell>) {
      if (k.normalizes()) normalize(step, active);
      if (k.has_operand()) through_operand(step, active);
    }
    if (k.p.size.steps.resets && kCarries) cut_carried(step, active);
    barrier.wait();
  }

  // All rows of a step with this thread's columns of W_hh, into the row sums.
  void multiply_rows_in_place(int64_t step, int64_t count) const {
    if constexpr (kReadsInPlace) {
      const int64_t t = k.time(d, step - 1);
      const Range columns{hiddens.begin * lanes, min64(hiddens.end * lanes, k.R)};
      for (int64_t first = 0; first < count; first += kInPlaceRows) {
        const int here = static_cast<int>(min64(kInPlaceRows, count - first));
        const A* rows[kInPlaceRows];
        for (int r = 0; r < here; ++r)
          rows[r] = k.hidden_preact_gradients(d, 0, row_of(t, first + r));
        with_constant<kInPlaceRows>(here, [&](auto n) {
          multiply_in_place<Cell::kGates, decltype(n)::value>(
              rows, k.S_rows * k.P * kBlock, Cell::hidden_gate,
              static_cast<const S*>(k.p.weights[d].w_hh), k.H, k.R, columns, k.row_sums_of(worker),
              first, false);
        });
      }
    }
  }

  void product(const Panels<M>& panels, int64_t panel, int64_t step, int64_t first, int n,
               bool ended, A* out) const {
    if constexpr (kIsAny<Cell>) {
      if (!k.recurs || k.hidden_gates() == 0) return clear(out, kMaxRows * kMaxCols * lanes);
    }
    if (k.in_place) {
      const InPlaceSums<A> sums = k.row_sums_of(worker);
      for (int r = 0; r < n; ++r)
        for (int c = 0; c < panels.cols(panel); ++c)
          store(out + (r * kMaxCols + c) * lanes,
                load<V>(sums.all[first + r] + (panels.first_vector(panel) + c) * lanes));
      return;
    }
    const int64_t t = k.time(d, step - 1);
    const Range blocks = k.blocks_of(panels, panel);
    GateProduct<M> tile(k, panels, panel, blocks, k.hidden_gates());
    Lines lines;
    if (!ended && !k.projection)
      tile.first().prefetch = prefetch_lines(panels, panel, step, first, n, lines);
    tile.set_rows(n, [&](int r, int64_t block) {
      return k.hidden_preact_gradients(d, block, row_of(t, first + r));
    });
    multiply_tile(n, panels.cols(panel), tile.first(), out, false);
  }

  // The cache lines that `cell` touches for a tile of the recurrent state. Backward touches each
  // once, long after forward wrote it, so that no cache holds it.
  using Lines = const void * [kMaxRows * kMaxCols * (2 * kMaxPreacts + 2)];
  Prefetch prefetch_lines(const Panels<M>& panels, int64_t panel, int64_t step, int64_t first,
                          int n, Lines& lines) const {
    const int64_t t = k.time(d, step);
    int64_t count = 0;
    for (int c = 0; c < panels.cols(panel); ++c) {
      const int64_t u = (panels.first_vector(panel) + c) * lanes;
      const int64_t block = u / kBlock, lane = u % kBlock;
      for (int r = 0; r < n; ++r) {
        const int64_t row = group.row(first + r);
        const int64_t s = k.p.size.steps.row(t, row);
        for (int j = 0; j < k.P; ++j) {
          lines[count++] = k.saved_gates(d, block, s) + j * kBlock + lane;
          lines[count++] = k.preact_gradients(d, block, s) + j * kBlock + lane;
        }
        if constexpr (kCarries) lines[count++] = carried_into(t, row, u);
        if (k.p.dy) lines[count++] = output_gradient_at(s, u);
      }
    }
    return {lines, count};
  }

  // The gradient of h_n.
  V final(int64_t n, int64_t u) const {
    if (k.p.d_after)
      return load_first<V>(static_cast<const A*>(k.p.d_after) + k.between(d, n) + u, k.R - u);
    const int64_t at = k.p.size.final_row(d, n) * k.R + u;
    return k.p.dh_n ? load_first<V>(static_cast<const S*>(k.p.dh_n) + at, k.R - u) : V{};
  }

  void final_gradient(const Panels<M>& panels, int64_t panel, int64_t first, int n, A* out) const {
    for (int r = 0; r < n; ++r)
      for (int c = 0; c < panels.cols(panel); ++c)
        store(out + (r * kMaxCols + c) * lanes,
              final(group.row(first + r), (panels.first_vector(panel) + c) * lanes));
  }

  // Passes the gradients of the recurrent state that one tile computed to dh0, or with dy to the
  // cell (or to the projection below it).
  void distribute(const Panels<M>& panels, int64_t panel, int64_t step, int64_t first, int n,
                  bool ended, const A* out) const {
    for (int c = 0; c < panels.cols(panel); ++c) {
      const int64_t vec = panels.first_vector(panel) + c;
      const int64_t u = vec * lanes;
      for (int r = 0; r < n; ++r) {
        const int64_t row = group.row(first + r);
        V dh = load<V>(out + (r * kMaxCols + c) * lanes);
        if (ended) {
          if (k.wants_initial()) put_initial(row, u, dh);
          continue;
        }
        const int64_t t = k.time(d, step);
        const int64_t s = k.p.size.steps.row(t, row);
        if (k.p.size.steps.resets) dh = within_boundaries(t, row, u, dh);
        const V total = dh + output_gradient(s, u);
        if (k.projection) {
          // A pair of lanes may hold one past the last hidden unit, read times a zero weight.
          store(k.hidden_gradients(d, u / kBlock, s) + u % kBlock, keep_first(total, k.R - u));
        } else {
          cell(t, row, s, vec, total);
        }
      }
    }
  }

  void put_initial(int64_t row, int64_t u, V dh) const {
    // A carried h enters the first step twice: in the product and in the cell.
    if (k.keeps_hidden() && !k.p.d_before)
      dh += load<V>(k.carried_gradients(d, row, k.cells()) + u);
    if (k.p.size.steps.resets) dh = within_boundaries(d == 0 ? -1 : k.T, row, u, dh);
    if (k.p.d_before)
      store_first(static_cast<A*>(k.p.d_before) + k.between(d, row) + u, dh, k.R - u);
    else
      put_state(k.p.dh0, row, false, k.R, u, dh);
  }

  // The gradient of the hidden state after step t, less what a boundary there gives to the reset.
  LSTM_FUSED_COLD V within_boundaries(int64_t t, int64_t row, int64_t u, const V& dh) const {
    if (!k.p.size.steps.ends_before_reset(d, t, row)) return dh;
    add_to_reset(k.dh_reset, k.Rp, row, u, dh);
    return V{};
  }

  // The same for the carried states before a step.
  LSTM_FUSED_COLD void cut_carried(int64_t step, int64_t active) const {
    for (int64_t i = 0; i < active; ++i) {
      const int64_t n = group.row(i);
      if (!k.p.size.steps.begins_anew(d, k.time(d, step), n)) continue;
      for (int c = 0; c < k.carried(); ++c)
        for (int64_t u = units.begin * lanes; u < units.end * lanes; u += lanes) {
          A* dc = k.carried_gradients(d, n, c) + u;
          if (c < k.cells())
            add_to_reset(k.dc_reset, k.cells() * k.Hp, n, c * k.Hp + u, load<V>(dc));
          else
            add_to_reset(k.dh_reset, k.Rp, n, u, load<V>(dc));
          store(dc, V{});
        }
    }
  }

  // The gradients of the cell states of a step that y holds.
  LSTM_FUSED_COLD void add_cell_gradients(int64_t step, int64_t active) const {
    for (int64_t i = 0; i < active; ++i) {
      const int64_t s = row_of(k.time(d, step), i);
      for (int c = 0; c < k.cells(); ++c) {
        const S* from = static_cast<const S*>(k.p.dy) + k.p.size.cell_at(d, s) + c * k.H;
        A* dc = k.carried_gradients(d, group.row(i), c);
        for (int64_t u = units.begin * lanes; u < units.end * lanes; u += lanes)
          store(dc + u, load<V>(dc + u) + load_first<V>(from + u, k.H - u));
      }
    }
  }

  // sums (D, N, width), or null where they are not wanted.
  void add_to_reset(A* sums, int64_t width, int64_t row, int64_t u, const V& v) const {
    if (!sums) return;
    A* to = sums + (d * k.N + row) * width + u;
    store(to, load<V>(to) + v);
  }

  // The gradient of an initial state, (D, state_rows, width), or of what resets put in.
  void put_state(void* states, int64_t row, bool reset, int64_t width, int64_t u,
                 const V& v) const {
    const int64_t at = k.p.size.initial_row(d, row, reset) * width + u;
    store_first(static_cast<S*>(states) + at, v, width - u);
  }
  void put_cell(int64_t row, bool reset, int c, int64_t u, const V& v) const {
    const int64_t at = (k.p.size.initial_row(d, row, reset) * k.cells() + c) * k.H + u;
    store_first(static_cast<S*>(k.p.dc0) + at, v, k.H - u);
  }

  const S* output_gradient_at(int64_t s, int64_t u) const {
    return static_cast<const S*>(k.p.dy) + k.p.size.hidden_at(d, s) + u;
  }
  V output_gradient(int64_t s, int64_t u) const {
    return k.p.dy ? load_first<V>(output_gradient_at(s, u), k.R - u) : V{};
  }

  void through_projection(int64_t step, int64_t active) const {
    const Panels<M> panels = k.projection_panels(d, place.unit_group);
    const int64_t t = k.time(d, step);
    for (int64_t panel = 0; panel < panels.count(); ++panel) {
      for_each_tile(0, active, [&](int64_t first, int n) {
        A out[kMaxRows * kMaxCols * lanes];
        const int cols = panels.cols(panel);
        const int64_t whole = k.R / kBlock, rest = k.R % kBlock;
        TileProduct<M> tile(panels.panel(panel), panels.depth, M::kPair, kBlock / M::kPair, whole,
                            k.S_rows * kBlock);
        for (int r = 0; r < n; ++r) tile.rows[r] = k.hidden_gradients(d, 0, row_of(t, first + r));
        if (whole > 0) multiply_tile(n, cols, tile, out, false);
        if (rest > 0) {
          for (int r = 0; r < n; ++r) tile.rows[r] += whole * tile.segment_stride;
          tile.steps = k.steps_of(rest);
          tile.segments = 1;
          tile.first = whole * kBlock / M::kPair;
          multiply_tile(n, cols, tile, out, whole > 0);
        }
        for (int r = 0; r < n; ++r)
          for (int c = 0; c < cols; ++c)
            cell(t, group.row(first + r), row_of(t, first + r), panels.first_vector(panel) + c,
                 load<V>(out + (r * kMaxCols + c) * lanes));
      });
    }
  }

  void finish_states() const {
    for (int64_t i = 0; i < group.count; ++i) {
      const int64_t n = group.row(i), at = d * k.N + n;
      const auto each_vector = [&](Range vectors, const auto& f) {
        for (int64_t v = vectors.begin; v < vectors.end; ++v) f(v * lanes);
      };
      // A document without a step keeps its initial state.
      if (k.p.dh0 && n >= k.p.size.steps.active(0))
        each_vector(hiddens, [&](int64_t u) { put_state(k.p.dh0, n, false, k.R, u, final(n, u)); });
      if constexpr (kCarries) {
        for (int c = 0; c < k.carried(); ++c)
          each_vector(units, [&](int64_t u) {
            const V dc = load<V>(k.carried_gradients(d, n, c) + u);
            if (k.p.d_before)
              store_first(static_cast<A*>(k.p.d_before) + k.between(d, n) + k.R + c * k.H + u, dc,
                          k.H - u);
            else if (c < k.cells() && k.p.dc0)
              put_cell(n, false, c, u, dc);
          });
      }
      if (k.p.unfinished) continue;
      if (k.dh_reset)
        each_vector(hiddens, [&](int64_t u) {
          put_state(k.p.dh0, n, true, k.R, u, load<V>(k.dh_reset + at * k.Rp + u));
        });
      for (int c = 0; k.dc_reset && c < k.cells(); ++c)
        each_vector(units, [&](int64_t u) {
          put_cell(n, true, c, u, load<V>(k.dc_reset + (at * k.cells() + c) * k.Hp + u));
        });
    }
  }
};

}  // namespace
}  // namespace lstm_fused
