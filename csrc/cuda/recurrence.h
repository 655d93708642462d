// The kernel of the plans step, grid and cluster. A CTA has some tiles of 16 units and takes some
// tiles of batch rows in turn. For each it computes the product of its rows of A with the tile of
// B, split-k over its warps, adds the warps' partial sums in a fixed order, and runs the epilogue.
// The plans differ in where the operands are and in how B gets from one step to the next:
//   step     one step a launch; A and B are streamed through a cp.async pipeline
//   grid     A is resident in registers and shared memory for the whole sequence, B is streamed;
//            the CTAs of a row group synchronize through a barrier in global memory
//   cluster  A and B are resident; each CTA sends its part of the next B to the shared memory of
//            all CTAs of its thread-block cluster
// Grid: (CTAs that partition the units, row groups, directions).
#pragma once

#include "epilogue.h"
#include "exchange.h"
#include "params.h"
#include "plan.h"
#include "ptx/threads.h"
#include "tile_product.h"

namespace lstm_fused::cuda {

template <class Math, class Epilogue, int kRowTiles, PlanKind kKind, int kCompiledUnitTiles>
struct Recurrence : TileProduct<Math, Epilogue, kRowTiles, kKind, kCompiledUnitTiles> {
  using Base = TileProduct<Math, Epilogue, kRowTiles, kKind, kCompiledUnitTiles>;
  using Base::buffer_bytes, Base::partials_of, Base::load_resident_operands;
  using Base::first_unit, Base::k_bytes, Base::a, Base::b, Base::buffer;
  using Base::kM, Base::kRows, Base::kSplitK, Base::p, Base::d, Base::unit_tiles;
  using typename Base::Acc, typename Base::Index, typename Base::S;
  using Unit = typename Epilogue::Unit;
  using Rows = StepRowsOf<Index>;

  // The elements of a tile that a thread runs the epilogue for: one unit, every kRowStride-th row.
  static constexpr int kRowStride = 2 * kSplitK;
  static constexpr int kOwned = kRows <= kRowStride ? 1 : kRows / kRowStride;

  using Cluster = ClusterExchange<S, kRows, Epilogue::kOut>;

  const int owned_unit, owned_row;
  char* b_target;  // first_target, where B is in global memory

  LSTM_FUSED_DEVICE explicit Recurrence(const RecurrenceParams& params)
      : Base(params),
        // Consecutive threads have consecutive units, so that global accesses coalesce.
        owned_unit(thread_index() % (unit_tiles * kUnitTile)),
        owned_row(thread_index() / (unit_tiles * kUnitTile)) {
    if constexpr (kKind != PlanKind::kCluster) b_target = kept(first_target());
  }

  // This thread's unit of row 0 of buffer 0 of the B that a step writes, of its i-th row of a tile,
  // and the columns of a run.
  LSTM_FUSED_DEVICE char* first_target() const {
    return p.product.out.at(0, d, owned_row) + (first_unit + owned_unit) * sizeof(S);
  }
  LSTM_FUSED_DEVICE S* target(Index s, Index n0, int i) const {
    if constexpr (kKind == PlanKind::kCluster)
      return reinterpret_cast<S*>(buffer(s + 1) +
                                  (owned_row + i * kRowStride) * (k_bytes + kPadBytes)) +
             first_unit + owned_unit;
    else
      return reinterpret_cast<S*>(b_target + p.product.out.buffer(s + 1) +
                                  wide_product(n0 + i * kRowStride, Index(p.product.out.bytes)));
  }
  LSTM_FUSED_DEVICE int columns() const {
    return static_cast<int>(p.product.out.bytes) / static_cast<int>(sizeof(S)) / Epilogue::kOut;
  }
  LSTM_FUSED_DEVICE bool has_unit() const {
    return first_unit + owned_unit < static_cast<int>(p.product.units);
  }

  // Calls f(i, element) for each of this thread's elements of the tile that the epilogue wants.
  template <class F>
  LSTM_FUSED_DEVICE void for_each_owned(const Rows& rows, Index n0, F f) const {
    if (!has_unit()) return;
    const Index count = Epilogue::row_count(rows);
    LSTM_FUSED_UNROLL
    for (int i = 0; i < kOwned; ++i) {
      const int row = owned_row + i * kRowStride;
      if (row < kRows && n0 + row < count)
        f(i, Element<Index>{rows, d, n0 + row, Index(first_unit + owned_unit)});
    }
  }

  LSTM_FUSED_DEVICE void fetch(const Rows& rows, Index n0, Unit (&units)[kOwned],
                               bool follows) const {
    for_each_owned(rows, n0, [&](int i, const Element<Index>& e) {
      Epilogue::fetch(p, e, units[i], follows);
    });
  }

  // The product of a tile, and the epilogue up to the outputs that the next product takes.
  LSTM_FUSED_DEVICE void tile(const Rows& rows, Index s, Index n0,
                              const typename Epilogue::Constants& constants,
                              Unit (&units)[kOwned]) const {
    Base::multiply_tile(s, n0);
    const int run = columns();
    for_each_owned(rows, n0, [&](int i, const Element<Index>& e) {
      Acc product[kM];
      Base::reduce(owned_row + i * kRowStride, owned_unit, product);
      S out[Epilogue::kOut];
      if (!Epilogue::apply(p, e, constants, units[i], product, out)) return;
      S* to = target(s, n0, i);
      LSTM_FUSED_UNROLL
      for (int v = 0; v < Epilogue::kOut; ++v) to[v * run] = Math::operand(out[v]);
    });
  }

  LSTM_FUSED_DEVICE void store(const Rows& rows, Index n0, const Unit (&units)[kOwned],
                               bool followed) const {
    for_each_owned(rows, n0, [&](int i, const Element<Index>& e) {
      Epilogue::store(p, e, units[i], followed);
    });
  }

  // Rows of the batch at step s, and the first of them.
  struct ActiveRows {
    Index active, offset;
  };
  LSTM_FUSED_DEVICE ActiveRows active_rows(Index s) const {
    const Index T = static_cast<Index>(p.steps.T);
    if (s < 0 || s >= T) return {0, 0};
    const Index t = Epilogue::kBackward != (d == 1) ? T - 1 - s : s;
    if (!p.steps.sizes) return {Index(p.N), t * Index(p.N)};
    return {static_cast<Index>(p.steps.sizes[t]), static_cast<Index>(p.steps.offsets[t])};
  }
  LSTM_FUSED_DEVICE Rows rows_of(Index s) const {
    const ActiveRows now = active_rows(s), next = active_rows(s + 1);
    return {now.active, active_rows(s - 1).active, next.active, now.offset, next.offset};
  }

  // All steps of a persistent plan. The exchange of a step is split: between send and wait a
  // CTA does what the others do not wait for, which is the stores of the step and, if it has a
  // single tile of rows, the prefetch of the next step's inputs. exchange: with
  //   send(s)       after the last tile of step s: this CTA's part of the next B is written
  //   wait(s)       until all parts are
  // one_tile: whether the CTA has a single tile of rows. Its units then stay with their threads.
  template <class Exchange>
  LSTM_FUSED_DEVICE void run_steps(Index first, Index stride, bool one_tile,
                                   const Exchange& exchange) {
    typename Epilogue::Constants constants;
    if (has_unit()) constants.load(p, d, Index(first_unit + owned_unit));
    Unit units[kOwned];
    const Index begin = static_cast<Index>(p.s_begin), end = static_cast<Index>(p.s_end);
    Rows rows = rows_of(begin);
    // What packed data has in memory is loaded a step before it is used.
    ActiveRows later = active_rows(begin + 2);
    if (one_tile) fetch(rows, first, units, false);
    for (Index s = begin; s < end; ++s) {
      const bool more = s + 1 < end;
      const Index count = Epilogue::row_count(rows);
      for (Index n0 = first;; n0 += stride) {
        const bool any = n0 < count, last = one_tile || n0 + stride >= count;
        if (any) {
          if (!one_tile) fetch(rows, n0, units, false);
          tile(rows, s, n0, constants, units);
        }
        if (last && more) exchange.send(s);
        if (!last) sync_block();  // the next tile overwrites the partial sums
        if (any) store(rows, n0, units, one_tile && more);
        if (last) break;
      }
      if (!more) break;
      rows = {rows.active_next, rows.active, later.active, rows.offset_next, later.offset};
      later = active_rows(s + 3);
      if (one_tile) fetch(rows, first, units, true);
      exchange.wait(s);
    }
  }

  // Between the CTAs of a cluster. The lanes that have a vector's columns send it.
  struct ClusterSteps {
    const Cluster exchange;
    const Index begin;
    const int buffer_bytes, run;  // of a run of columns in a row of B
    const int vector;             // of this thread, in the first run of its first row of buffer 0
    const bool sends;

    LSTM_FUSED_DEVICE void send(Index s) const {
      sync_warp();
      if (!sends) return;
      const int buffer = (s + 1) & 1, row_stride = buffer_bytes / kRows * kRowStride;
      LSTM_FUSED_UNROLL
      for (int i = 0; i < kOwned; ++i) LSTM_FUSED_UNROLL
      for (int v = 0; v < Epilogue::kOut; ++v)
        exchange.send(vector + buffer * buffer_bytes + i * row_stride + v * run, buffer);
    }
    LSTM_FUSED_DEVICE void wait(Index s) const { exchange.wait((s + 1) & 1, s - begin); }
  };

  LSTM_FUSED_DEVICE void run_in_cluster(Index first) {
    const int run = k_bytes / Epilogue::kOut;
    const int from = first_unit * static_cast<int>(sizeof(S));
    const int all = unit_tiles * kUnitTile * static_cast<int>(sizeof(S));
    if (from < run) {
      load_resident_operands(first);
      char* barriers = reinterpret_cast<char*>(partials_of(unit_tiles * kSplitK, 0));
      const int column =
          from + owned_unit / Cluster::kLanes * Cluster::kLanes * static_cast<int>(sizeof(S));
      const ClusterSteps exchange{
          Cluster(static_cast<int>(barriers - a), k_bytes, from + all < run ? all : run - from,
                  (run + all - 1) / all),
          static_cast<Index>(p.s_begin),
          buffer_bytes(),
          run,
          static_cast<int>(b - a) + owned_row * (k_bytes + kPadBytes) + column,
          column < run};
      cluster_barrier_arrive();
      cluster_barrier_wait();
      run_steps(first, 0, true, exchange);
    } else {
      cluster_barrier_arrive();
      cluster_barrier_wait();
    }
    // No CTA exits while another may store there.
    cluster_barrier_arrive();
    cluster_barrier_wait();
  }

  // The one step of a launch.
  LSTM_FUSED_DEVICE void run_step(Index first, Index stride) {
    typename Epilogue::Constants constants;
    if (has_unit()) constants.load(p, d, Index(first_unit + owned_unit));
    Unit units[kOwned];
    const Rows& rows = p.rows[d];
    const Index count = Epilogue::row_count(rows);
    for (Index n0 = first; n0 < count; n0 += stride) {
      fetch(rows, n0, units, false);
      tile(rows, p.s_begin, n0, constants, units);
      sync_block();  // the next tile overwrites the partial sums
      store(rows, n0, units, false);
    }
  }

  LSTM_FUSED_DEVICE void run() {
    const Index group = block_index().y, groups = block_count().y;
    const Index first = group * kRows, stride = groups * kRows;
    if constexpr (kKind == PlanKind::kStep) {
      run_step(first, stride);
    } else if constexpr (kKind == PlanKind::kCluster) {
      run_in_cluster(first);
    } else {
      load_resident_operands(first);
      char* counter = p.barrier + (d * groups + group) * kBarrierBytes;
      run_steps(first, stride, first + stride >= p.N,
                GridExchange{counter, static_cast<Index>(p.s_begin)});
    }
  }
};

template <class Math, class Epilogue, int kRowTiles, PlanKind kKind, int kCompiledUnitTiles>
LSTM_FUSED_KERNEL(max_threads(kKind, kCompiledUnitTiles), 1)
recurrence_kernel(const LSTM_FUSED_CONSTANT RecurrenceParams p) {
  if constexpr (kKind != PlanKind::kCluster || kHasClusters)
    Recurrence<Math, Epilogue, kRowTiles, kKind, kCompiledUnitTiles>(p).run();
}

}  // namespace lstm_fused::cuda
