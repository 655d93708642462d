// The one kernel behind every plan. A CTA owns some tiles of 16 units and walks over some tiles of
// batch rows; for each it takes the product of its rows of A with the tile of B, its warps sharing
// k, adds their parts in a fixed order, and hands each unit's sums to the epilogue. What differs:
//   step     one step a launch; A and B stream through a ring in shared memory
//   grid     A stays in shared memory for the whole sequence, B streams, CTAs meet each step
//   cluster  A and B stay in shared memory; a unit's result is sent to every CTA of the cluster
// Grid: (CTAs that share the units, groups that share the batch, directions).
#pragma once

#include "arithmetic.h"
#include "params.h"
#include "plan.h"
#include "ptx/async_copy.h"
#include "ptx/barrier.h"
#include "ptx/cluster.h"
#include "ptx/threads.h"

namespace lstm_fused::cuda {

// kMostTiles: unit tiles of a CTA the kernel is compiled for.
template <class Math, class Epilogue, int kTiles, PlanKind kKind, int kMostTiles>
struct Recurrence {
  using S = typename Math::Storage;
  using Acc = typename Math::Acc;
  using Unit = typename Epilogue::Unit;
  static constexpr int kM = Epilogue::kGates;
  static constexpr int kRows = 8 * kTiles;  // of the batch, in a tile
  static constexpr int kSplit = split_of(kKind);
  static constexpr int kChunk =
      kKind == PlanKind::kStep ? kStepChunk : grid_chunk(Math::kTensorCores, kRows);
  // A thread's elements of a tile: one unit, every so many rows.
  static constexpr int kRowsAtOnce = 2 * kSplit;
  static constexpr int kOwn = kRows <= kRowsAtOnce ? 1 : kRows / kRowsAtOnce;

  // Weights in registers: the first steps of k of each warp's.
  static constexpr int kHeld = held_steps(kKind, Math::kTensorCores, kM, kRows, kMostTiles);
  static constexpr int kHeldBytes = kHeld * kSplit * kKBytes;
  static constexpr int kStepsOfStage = kChunk / (kSplit * kKBytes);  // of each warp

  const RecurrenceParams& p;
  const int unit_tiles;  // of this CTA
  const int d;
  const int unit0;
  const int k_bytes;
  const int a_row;  // bytes between rows of A in shared memory
  const int own_unit, own_row;
  char* a;
  char* b;  // the ring, or both halves of B
  uint32_t held[kHeld ? kHeld : 1][kM][4];
  Acc* sums;  // (kSplit, unit_tiles, kM, kRows, kSumUnits)

  LSTM_FUSED_DEVICE explicit Recurrence(const RecurrenceParams& params)
      : p(params),
        unit_tiles(kKind == PlanKind::kCluster ? thread_count() / (32 * kSplit) : 1),
        d(block_index().z),
        unit0(static_cast<int>(block_index().x) * unit_tiles * kUnitTile),
        k_bytes(static_cast<int>(p.product.in.bytes)),
        a_row((kKind == PlanKind::kStep ? kChunk : shared_k()) + kPadBytes),
        // Units lie beside each other in memory, so neighbours take neighbours.
        own_unit(thread_index() % (unit_tiles * kUnitTile)),
        own_row(thread_index() / (unit_tiles * kUnitTile)) {
    char* memory = shared_memory();
    a = memory;
    b = memory + (kKind == PlanKind::kStep ? 0 : a_rows() * a_row);
    sums = reinterpret_cast<Acc*>(kKind == PlanKind::kCluster ? b + 2 * half_bytes() : b);
  }

  // Bytes of k of the weights that lie in shared memory.
  LSTM_FUSED_DEVICE int shared_k() const { return k_bytes > kHeldBytes ? k_bytes - kHeldBytes : 0; }
  LSTM_FUSED_DEVICE int a_rows() const { return unit_tiles * kM * kUnitTile; }
  LSTM_FUSED_DEVICE int half_bytes() const { return kRows * (k_bytes + kPadBytes); }

  // Bytes [from, from + bytes) of k of this CTA's rows of A: unit tile by unit tile, gate by gate.
  LSTM_FUSED_DEVICE void fetch_a(char* to, int64_t to_row, int64_t from, int64_t bytes) const {
    const int pieces = bytes / 16;
    for (int i = thread_index(); i < a_rows() * pieces; i += thread_count()) {
      const int row = i / pieces, piece = i % pieces;
      const int gate = row / kUnitTile % kM;
      const int64_t unit = unit0 + row / (kUnitTile * kM) * kUnitTile + row % kUnitTile;
      const bool valid = unit < p.product.units;
      const int64_t at = valid ? (Epilogue::gate(gate) * p.product.units + unit) * k_bytes : 0;
      copy_async(to + row * to_row + piece * 16, p.product.a[d] + at + from + piece * 16, valid);
    }
  }

  LSTM_FUSED_DEVICE void fetch_b(char* to, int64_t to_row, int64_t s, int64_t n0, int64_t from,
                                 int pieces) const {
    const char* rows = p.product.in.at(s, d, n0) + from;
    for (int i = thread_index(); i < kRows * pieces; i += thread_count()) {
      const int row = i / pieces, piece = i % pieces;
      copy_async(to + row * to_row + piece * 16, rows + row * k_bytes + piece * 16, true);
    }
  }

  LSTM_FUSED_DEVICE void load_stationary(int64_t n0) {
    fetch_a(a, a_row, kHeldBytes, shared_k());
    if constexpr (kHeld > 0) {
      const int64_t units = p.product.units;
      LSTM_FUSED_UNROLL
      for (int j = 0; j < kHeld; ++j) {
        const int k = k_of(j);
        const int64_t first = unit0 + thread_index() / 32 / kSplit * kUnitTile;
        LSTM_FUSED_UNROLL
        for (int m = 0; m < kM; ++m)
          Math::load_held(held[j][m],
                          p.product.a[d] + (Epilogue::gate(m) * units + first) * k_bytes + k,
                          k_bytes, k < k_bytes ? units - first : 0);
      }
    }
    if constexpr (kKind == PlanKind::kCluster)
      for (int half = 0; half < 2; ++half)
        fetch_b(b + half * half_bytes(), k_bytes + kPadBytes, half, n0, 0, k_bytes / 16);
    commit_copies();
    wait_copies<0>();
    sync_block();
  }

  struct Part {
    Acc acc[kM][kTiles][4];
  };

  // Byte of k where this warp's step j begins.
  LSTM_FUSED_DEVICE int k_of(int j) const {
    return (j * kSplit + thread_index() / 32 % kSplit) * kKBytes;
  }

  // The product of the weights in registers with B, whose first byte of k lies at b_at.
  LSTM_FUSED_DEVICE void multiply_held(Part& part, const char* b_at, int b_stride) const {
    sync_warp();
    LSTM_FUSED_UNROLL
    for (int j = 0; j < kHeld; ++j)
      if (k_of(j) < k_bytes) Math::multiply_held(part.acc, held[j], b_at + k_of(j), b_stride);
  }

  // The steps of k before `bytes` that are this warp's, from its step `first` on.
  LSTM_FUSED_DEVICE void multiply(Part& part, const char* a_at, int a_stride, const char* b_at,
                                  int b_stride, int bytes, int first) const {
    sync_warp();
    a_at += thread_index() / 32 / kSplit * kM * kUnitTile * a_stride;
    for (int k = k_of(first); k < bytes; k += kSplit * kKBytes)
      Math::template multiply<kM, kTiles>(part.acc, a_at + k, kUnitTile * a_stride, a_stride,
                                          b_at + k, b_stride);
  }

  LSTM_FUSED_DEVICE int chunk_bytes(int chunk) const {
    const int left = k_bytes - chunk * kChunk;
    return left < kChunk ? left : kChunk;
  }

  LSTM_FUSED_DEVICE char* stage(int chunk) const {
    constexpr int kStageRows = kRows + (kKind == PlanKind::kStep ? kM * kUnitTile : 0);
    return b + chunk % kStages * (kStageRows * (kChunk + kPadBytes));
  }

  // Chunk of k into its stage of the ring: B, then A where it is not stationary.
  LSTM_FUSED_DEVICE void fetch_chunk(int chunk, int chunks, int64_t s, int64_t n0) const {
    if (chunk < chunks) {
      char* to = stage(chunk);
      const int bytes = chunk_bytes(chunk);
      // A constant to divide by, of all chunks but a last one.
      if (bytes == kChunk)
        fetch_b(to, kChunk + kPadBytes, s, n0, chunk * kChunk, kChunk / 16);
      else
        fetch_b(to, kChunk + kPadBytes, s, n0, chunk * kChunk, bytes / 16);
      if constexpr (kKind == PlanKind::kStep)
        fetch_a(to + kRows * (kChunk + kPadBytes), kChunk + kPadBytes, chunk * kChunk,
                chunk_bytes(chunk));
    }
    commit_copies();
  }

  // Until everybody's copies of this chunk are there, and everybody is done with the stage that the
  // next fetch overwrites.
  LSTM_FUSED_DEVICE void advance(int chunk, int chunks, int64_t s, int64_t n0) const {
    wait_copies<kStages - 2>();
    sync_block();
    fetch_chunk(chunk + kStages - 1, chunks, s, n0);
    sync_warp();
  }

  LSTM_FUSED_DEVICE void stream(Part& part, int64_t s, int64_t n0) const {
    const int chunks = static_cast<int>(ceil_div(k_bytes, kChunk));
    for (int c = 0; c < kStages - 1; ++c) fetch_chunk(c, chunks, s, n0);
    constexpr int kHeldStages = kHeld / kStepsOfStage;  // that need no weights from shared memory
    constexpr int kMixed = kHeld % kStepsOfStage;       // steps of the stage after them
    if constexpr (kHeld > 0) {
      LSTM_FUSED_UNROLL
      for (int c = 0; c < kHeldStages + (kMixed > 0); ++c)
        if (c < chunks) {
          advance(c, chunks, s, n0);
          const int bytes = chunk_bytes(c);
          LSTM_FUSED_UNROLL
          for (int i = 0; i < (c < kHeldStages ? kStepsOfStage : kMixed); ++i)
            if (k_of(i) < bytes)
              Math::multiply_held(part.acc, held[c * kStepsOfStage + i], stage(c) + k_of(i),
                                  kChunk + kPadBytes);
          if (kMixed > 0 && c == kHeldStages)
            multiply(part, a - kMixed * kSplit * kKBytes, a_row, stage(c), kChunk + kPadBytes,
                     bytes, kMixed);
        }
    }
    for (int c = kHeldStages + (kMixed > 0); c < chunks; ++c) {
      advance(c, chunks, s, n0);
      const char* at = stage(c);
      const bool streamed = kKind == PlanKind::kStep;
      multiply(part, streamed ? at + kRows * (kChunk + kPadBytes) : a + c * kChunk - kHeldBytes,
               a_row, at, kChunk + kPadBytes, chunk_bytes(c), 0);
    }
    wait_copies<0>();
    sync_block();  // the ring becomes the room for sums
  }

  LSTM_FUSED_DEVICE Acc* sums_of(int k_part, int tile, int m) const {
    return sums + ((k_part * unit_tiles + tile) * kM + m) * (kRows * kSumUnits);
  }

  LSTM_FUSED_DEVICE void store_sums(const Part& part) const {
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    LSTM_FUSED_UNROLL
    for (int m = 0; m < kM; ++m) {
      Acc* to = sums_of(warp % kSplit, warp / kSplit, m) + 2 * (lane % 4) * kSumUnits + lane / 4;
      LSTM_FUSED_UNROLL
      for (int j = 0; j < kTiles; ++j) LSTM_FUSED_UNROLL
      for (int i = 0; i < 4; ++i) to[(j * 8 + i % 2) * kSumUnits + i / 2 * 8] = part.acc[m][j][i];
    }
  }

  LSTM_FUSED_DEVICE void sum_of(int row, Acc (&total)[kM]) const {
    const int at = row * kSumUnits + own_unit % kUnitTile;
    LSTM_FUSED_UNROLL
    for (int m = 0; m < kM; ++m) {
      total[m] = 0;
      LSTM_FUSED_UNROLL
      for (int k = 0; k < kSplit; ++k) total[m] += sums_of(k, own_unit / kUnitTile, m)[at];
    }
  }

  LSTM_FUSED_DEVICE S* next(int64_t s, int64_t n0, int row) const {
    if constexpr (kKind == PlanKind::kCluster)
      return reinterpret_cast<S*>(b + ((s + 1) & 1) * half_bytes() + row * (k_bytes + kPadBytes));
    else
      return reinterpret_cast<S*>(p.product.out.at(s + 1, d, n0 + row));
  }

  // f(element, row) for each of this thread's elements of the tile that are wanted.
  template <class F>
  LSTM_FUSED_DEVICE void each_own(const StepRows& rows, int64_t n0, F f) const {
    if (unit0 + own_unit >= p.product.units) return;
    const int64_t reach = Epilogue::reach(rows);
    LSTM_FUSED_UNROLL
    for (int own = 0; own < kOwn; ++own) {
      const int row = own_row + own * kRowsAtOnce;
      if (row < kRows && n0 + row < reach) f(own, row);
    }
  }

  LSTM_FUSED_DEVICE void fetch(const StepRows& rows, int64_t n0, Unit (&units)[kOwn]) const {
    each_own(rows, n0, [&](int own, int row) {
      Epilogue::fetch(p, rows, d, n0 + row, unit0 + own_unit, units[own]);
    });
  }

  // The product, and what the next one needs of it.
  LSTM_FUSED_DEVICE void tile(const StepRows& rows, int64_t s, int64_t n0,
                              Unit (&units)[kOwn]) const {
    Part part{};
    if constexpr (kKind == PlanKind::kCluster) {
      const char* half = b + (s & 1) * half_bytes();
      if constexpr (kHeld > 0) multiply_held(part, half, k_bytes + kPadBytes);
      multiply(part, a - kHeldBytes, a_row, half, k_bytes + kPadBytes, k_bytes, kHeld);
    } else {
      stream(part, s, n0);
    }
    store_sums(part);
    sync_block();
    const int64_t run = p.product.out.bytes / static_cast<int64_t>(sizeof(S)) / Epilogue::kOut;
    each_own(rows, n0, [&](int own, int row) {
      Acc total[kM];
      sum_of(row, total);
      S out[Epilogue::kOut];
      if (!Epilogue::apply(rows, n0 + row, units[own], total, out)) return;
      S* to = next(s, n0, row) + unit0 + own_unit;
      LSTM_FUSED_UNROLL
      for (int v = 0; v < Epilogue::kOut; ++v) to[v * run] = out[v];
    });
    sync_block();  // sums are read: their room may be written again
  }

  LSTM_FUSED_DEVICE void store(const StepRows& rows, int64_t n0, const Unit (&units)[kOwn]) const {
    each_own(rows, n0, [&](int own, int row) {
      Epilogue::store(p, rows, d, n0 + row, unit0 + own_unit, units[own]);
    });
  }

  // This CTA's columns of the next B, 16 bytes at a time, to all other CTAs of the cluster: a
  // thread sends one piece to some of them, or some pieces to all.
  LSTM_FUSED_DEVICE void send(int64_t s) const {
    const int run = k_bytes / Epilogue::kOut;
    const int from = static_cast<int>(unit0 * sizeof(S));
    const int wanted = unit_tiles * kUnitTile * static_cast<int>(sizeof(S));
    const int pieces = (from + wanted <= run ? wanted : run > from ? run - from : 0) / 16;
    const int all = kRows * Epilogue::kOut * pieces;
    if (all == 0) return;
    const int threads = thread_count(), at_once = all < threads ? all : threads;
    const int others = cluster_size() - 1, self = cluster_rank();
    char* half = b + ((s + 1) & 1) * half_bytes();
    for (int i = thread_index() % at_once; i < all; i += at_once) {
      const int row = i / pieces / Epilogue::kOut, v = i / pieces % Epilogue::kOut;
      char* piece = half + row * (k_bytes + kPadBytes) + v * run + from + i % pieces * 16;
      for (int r = thread_index() / at_once; r < others; r += threads / at_once)
        if (thread_index() < threads / at_once * at_once) copy_to_cta(piece, r + (r >= self));
    }
  }

  // The rows a CTA waits for from the others have come.
  LSTM_FUSED_DEVICE void arrive(int64_t s, char* counter) const {
    if constexpr (kKind == PlanKind::kGrid) barrier_arrive(counter);
    if constexpr (kKind == PlanKind::kCluster) {
      send(s);
      cluster_barrier_arrive();
    }
  }
  LSTM_FUSED_DEVICE void wait(int64_t s, char* counter) const {
    if constexpr (kKind == PlanKind::kGrid)
      barrier_wait(counter, static_cast<unsigned long long>(block_count().x) * (s - p.s_begin + 1));
    if constexpr (kKind == PlanKind::kCluster) cluster_barrier_wait();
  }

  LSTM_FUSED_DEVICE StepRows rows_of(int64_t s) const {
    if constexpr (kKind == PlanKind::kStep) return p.rows[d];
    return rows_at(p.steps, s, Epilogue::kBackward != (d == 1));
  }

  // Between a meeting's two halves lies what the others do not wait for: the last step's stores,
  // and the next step's rows and, where a CTA has one tile of rows, what that fetches.
  LSTM_FUSED_DEVICE void run() {
    const int64_t group = block_index().y, groups = block_count().y;
    const int64_t first = group * kRows, stride = groups * kRows;
    const bool one_tile = kKind != PlanKind::kStep && first + stride >= p.N;
    char* counter = p.barrier + (d * groups + group) * kBarrierBytes;
    if constexpr (kKind != PlanKind::kStep) load_stationary(first);
    if constexpr (kKind == PlanKind::kCluster) {
      cluster_barrier_arrive();
      cluster_barrier_wait();
    }
    Unit units[kOwn];
    StepRows rows = rows_of(p.s_begin);
    if (one_tile) fetch(rows, first, units);
    for (int64_t s = p.s_begin; s < p.s_end; ++s) {
      const int64_t reach = Epilogue::reach(rows);
      if (first >= reach) arrive(s, counter);
      for (int64_t n0 = first; n0 < reach; n0 += stride) {
        if (!one_tile) fetch(rows, n0, units);
        tile(rows, s, n0, units);
        if (n0 + stride >= reach) arrive(s, counter);
        store(rows, n0, units);
      }
      if (s + 1 < p.s_end) {
        rows = rows_of(s + 1);
        if (one_tile) fetch(rows, first, units);
      }
      if (kKind == PlanKind::kCluster || s + 1 < p.s_end) wait(s, counter);
    }
  }
};

template <class Math, class Epilogue, int kTiles, PlanKind kKind, int kMostTiles>
LSTM_FUSED_KERNEL(max_threads(kKind, kMostTiles))
recurrence_kernel(const LSTM_FUSED_CONSTANT RecurrenceParams p) {
  if constexpr (kKind != PlanKind::kCluster || kHasClusters)
    Recurrence<Math, Epilogue, kTiles, kKind, kMostTiles>(p).run();
}

}  // namespace lstm_fused::cuda
