// The kernel of the plans step, grid and cluster. A CTA has some tiles of 16 units and takes some
// tiles of batch rows in turn. For each it computes the product of its rows of A with the tile of
// B, split-k over its warps, adds the warps' partial sums in a fixed order, and runs the epilogue.
// The plans differ in where the operands are and in how B gets from one step to the next:
//   step     one step a launch; A and B are streamed through a cp.async pipeline
//   grid     A is resident in registers and shared memory for the whole sequence, B is streamed;
//            the CTAs of a row group synchronize through a barrier in global memory
//   cluster  A and B are resident; each CTA writes its partial of the next B into the shared memory
//   of
//            all CTAs of its thread-block cluster
// Grid: (CTAs that partition the units, row groups, directions).
#pragma once

#include "params.h"
#include "plan.h"
#include "ptx/async_copy.h"
#include "ptx/barrier.h"
#include "ptx/cluster.h"
#include "ptx/threads.h"
#include "tile.h"

namespace lstm_fused::cuda {

// kRowTiles: tiles of 8 batch rows in a row tile. kCompiledUnitTiles: the unit tiles of a CTA that
// the kernel is compiled for; a cluster may have fewer.
template <class Math, class Epilogue, int kRowTiles, PlanKind kKind, int kCompiledUnitTiles>
struct Recurrence {
  using S = typename Math::Storage;
  using Acc = typename Math::Acc;
  using Unit = typename Epilogue::Unit;
  static constexpr int kM = Epilogue::kGates;
  static constexpr int kRows = 8 * kRowTiles;
  static constexpr int kSplitK = split_k(kKind);  // warps that share a unit tile
  // Of k, in a stage of the pipeline.
  static constexpr int kChunkBytes =
      kKind == PlanKind::kStep ? kStepChunk : grid_chunk(Math::kTensorCores, kRows);
  // The elements of a tile that a thread runs the epilogue for: one unit, every kRowStride-th row.
  static constexpr int kRowStride = 2 * kSplitK;
  static constexpr int kOwned = kRows <= kRowStride ? 1 : kRows / kRowStride;

  // Register-resident weights: the first k slices of each warp.
  static constexpr int kResident =
      resident_slices(kKind, Math::kTensorCores, kM, kRows, kCompiledUnitTiles);
  static constexpr int kResidentBytes = kResident * kSplitK * kSliceBytes;
  static constexpr int kSlicesOfChunk = kChunkBytes / (kSplitK * kSliceBytes);  // for each warp

  const RecurrenceParams& p;
  const int unit_tiles;  // of this CTA
  const int d;
  const int first_unit;
  const int k_bytes;
  const int a_stride;  // bytes between rows of A in shared memory
  const int owned_unit, owned_row;
  char* a;
  char* b;  // the stages of the pipeline; in a cluster both buffers of B
  uint32_t resident[kResident ? kResident : 1][kM][4];
  Acc* partials;  // (kSplitK, unit_tiles, kM, kRows, kPartialStride)

  LSTM_FUSED_DEVICE explicit Recurrence(const RecurrenceParams& params)
      : p(params),
        unit_tiles(kKind == PlanKind::kCluster ? thread_count() / (32 * kSplitK) : 1),
        d(block_index().z),
        first_unit(static_cast<int>(block_index().x) * unit_tiles * kUnitTile),
        k_bytes(static_cast<int>(p.product.in.bytes)),
        a_stride((kKind == PlanKind::kStep ? kChunkBytes : shared_k()) + kPadBytes),
        // Consecutive threads have consecutive units, so that global accesses coalesce.
        owned_unit(thread_index() % (unit_tiles * kUnitTile)),
        owned_row(thread_index() / (unit_tiles * kUnitTile)) {
    char* memory = shared_memory();
    a = memory;
    b = memory + (kKind == PlanKind::kStep ? 0 : a_rows() * a_stride);
    partials = reinterpret_cast<Acc*>(kKind == PlanKind::kCluster ? b + 2 * buffer_bytes() : b);
  }

  // Bytes of k of the weights in shared memory.
  LSTM_FUSED_DEVICE int shared_k() const {
    return k_bytes > kResidentBytes ? k_bytes - kResidentBytes : 0;
  }
  LSTM_FUSED_DEVICE int a_rows() const { return unit_tiles * kM * kUnitTile; }
  LSTM_FUSED_DEVICE int buffer_bytes() const { return kRows * (k_bytes + kPadBytes); }

  // Copies bytes [from, from + bytes) of k of this CTA's rows of A: by unit tile, then by gate.
  LSTM_FUSED_DEVICE void copy_a(char* to, int64_t to_stride, int64_t from, int64_t bytes) const {
    const int vectors = bytes / 16;
    for (int i = thread_index(); i < a_rows() * vectors; i += thread_count()) {
      const int row = i / vectors, vector = i % vectors;
      const int gate = row / kUnitTile % kM;
      const int64_t unit = first_unit + row / (kUnitTile * kM) * kUnitTile + row % kUnitTile;
      const bool valid = unit < p.product.units;
      const int64_t at = valid ? (Epilogue::gate(gate) * p.product.units + unit) * k_bytes : 0;
      copy_async(to + row * to_stride + vector * 16, p.product.a[d] + at + from + vector * 16,
                 valid);
    }
  }

  LSTM_FUSED_DEVICE void copy_b(char* to, int64_t to_stride, int64_t s, int64_t n0, int64_t from,
                                int vectors) const {
    const char* rows = p.product.in.at(s, d, n0) + from;
    for (int i = thread_index(); i < kRows * vectors; i += thread_count()) {
      const int row = i / vectors, vector = i % vectors;
      copy_async(to + row * to_stride + vector * 16, rows + row * k_bytes + vector * 16, true);
    }
  }

  LSTM_FUSED_DEVICE void load_resident_operands(int64_t n0) {
    copy_a(a, a_stride, kResidentBytes, shared_k());
    if constexpr (kResident > 0) {
      const int64_t units = p.product.units;
      LSTM_FUSED_UNROLL
      for (int j = 0; j < kResident; ++j) {
        const int k = k_of(j);
        const int64_t first = first_unit + thread_index() / 32 / kSplitK * kUnitTile;
        LSTM_FUSED_UNROLL
        for (int m = 0; m < kM; ++m)
          Math::load_resident(resident[j][m],
                              p.product.a[d] + (Epilogue::gate(m) * units + first) * k_bytes + k,
                              k_bytes, k < k_bytes ? units - first : 0);
      }
    }
    if constexpr (kKind == PlanKind::kCluster)
      for (int i = 0; i < 2; ++i)
        copy_b(b + i * buffer_bytes(), k_bytes + kPadBytes, i, n0, 0, k_bytes / 16);
    commit_copies();
    wait_copies<0>();
    sync_block();
  }

  struct Partial {
    Acc acc[kM][kRowTiles][4];
  };

  // First byte of k of this warp's slice j: split-k assigns slices to warps in turn.
  LSTM_FUSED_DEVICE int k_of(int j) const {
    return (j * kSplitK + thread_index() / 32 % kSplitK) * kSliceBytes;
  }

  // Adds the product of the register-resident weights with B, whose k starts at b_at.
  LSTM_FUSED_DEVICE void multiply_resident(Partial& partial, const char* b_at, int b_stride) const {
    sync_warp();
    LSTM_FUSED_UNROLL
    for (int j = 0; j < kResident; ++j)
      if (k_of(j) < k_bytes)
        Math::multiply_resident(partial.acc, resident[j], b_at + k_of(j), b_stride);
  }

  // Adds the product of this warp's slices of k in [k_of(first), bytes), with A in shared memory.
  LSTM_FUSED_DEVICE void multiply(Partial& partial, const char* a_at, int a_stride,
                                  const char* b_at, int b_stride, int bytes, int first) const {
    sync_warp();
    a_at += thread_index() / 32 / kSplitK * kM * kUnitTile * a_stride;
    for (int k = k_of(first); k < bytes; k += kSplitK * kSliceBytes)
      Math::template multiply<kM, kRowTiles>(partial.acc, a_at + k, kUnitTile * a_stride, a_stride,
                                             b_at + k, b_stride);
  }

  LSTM_FUSED_DEVICE int chunk_bytes(int chunk) const {
    const int left = k_bytes - chunk * kChunkBytes;
    return left < kChunkBytes ? left : kChunkBytes;
  }

  LSTM_FUSED_DEVICE char* stage(int chunk) const {
    constexpr int kStageRows = kRows + (kKind == PlanKind::kStep ? kM * kUnitTile : 0);
    return b + chunk % kStages * (kStageRows * (kChunkBytes + kPadBytes));
  }

  // Starts the copy of a chunk of k into its stage: B, then A where it is not resident. Past the
  // last chunk the group is empty, so that wait_copies can count groups.
  LSTM_FUSED_DEVICE void copy_chunk(int chunk, int chunks, int64_t s, int64_t n0) const {
    if (chunk < chunks) {
      char* to = stage(chunk);
      const int bytes = chunk_bytes(chunk);
      // All chunks but the last have a constant size, which makes the divisions of copy_b cheap.
      if (bytes == kChunkBytes)
        copy_b(to, kChunkBytes + kPadBytes, s, n0, chunk * kChunkBytes, kChunkBytes / 16);
      else
        copy_b(to, kChunkBytes + kPadBytes, s, n0, chunk * kChunkBytes, bytes / 16);
      if constexpr (kKind == PlanKind::kStep)
        copy_a(to + kRows * (kChunkBytes + kPadBytes), kChunkBytes + kPadBytes, chunk * kChunkBytes,
               chunk_bytes(chunk));
    }
    commit_copies();
  }

  // Waits for the copies of this chunk. After the barrier all threads have finished with the stage
  // that is overwritten next: that of the chunk before.
  LSTM_FUSED_DEVICE void advance(int chunk, int chunks, int64_t s, int64_t n0) const {
    wait_copies<kStages - 2>();
    sync_block();
    copy_chunk(chunk + kStages - 1, chunks, s, n0);
    sync_warp();
  }

  LSTM_FUSED_DEVICE void multiply_streamed(Partial& partial, int64_t s, int64_t n0) const {
    const int chunks = static_cast<int>(ceil_div(k_bytes, kChunkBytes));
    for (int c = 0; c < kStages - 1; ++c) copy_chunk(c, chunks, s, n0);
    // Chunks whose weights are all register-resident, and resident slices of the chunk after them.
    constexpr int kResidentChunks = kResident / kSlicesOfChunk;
    constexpr int kMixed = kResident % kSlicesOfChunk;
    if constexpr (kResident > 0) {
      LSTM_FUSED_UNROLL
      for (int c = 0; c < kResidentChunks + (kMixed > 0); ++c)
        if (c < chunks) {
          advance(c, chunks, s, n0);
          const int bytes = chunk_bytes(c);
          LSTM_FUSED_UNROLL
          for (int i = 0; i < (c < kResidentChunks ? kSlicesOfChunk : kMixed); ++i)
            if (k_of(i) < bytes)
              Math::multiply_resident(partial.acc, resident[c * kSlicesOfChunk + i],
                                      stage(c) + k_of(i), kChunkBytes + kPadBytes);
          if (kMixed > 0 && c == kResidentChunks)
            multiply(partial, a - kMixed * kSplitK * kSliceBytes, a_stride, stage(c),
                     kChunkBytes + kPadBytes, bytes, kMixed);
        }
    }
    for (int c = kResidentChunks + (kMixed > 0); c < chunks; ++c) {
      advance(c, chunks, s, n0);
      const char* at = stage(c);
      const bool streamed = kKind == PlanKind::kStep;
      multiply(
          partial,
          streamed ? at + kRows * (kChunkBytes + kPadBytes) : a + c * kChunkBytes - kResidentBytes,
          a_stride, at, kChunkBytes + kPadBytes, chunk_bytes(c), 0);
    }
    wait_copies<0>();
    sync_block();  // partials overwrite the stages
  }

  LSTM_FUSED_DEVICE Acc* partials_of(int k_part, int tile, int m) const {
    return partials + ((k_part * unit_tiles + tile) * kM + m) * (kRows * kPartialStride);
  }

  LSTM_FUSED_DEVICE void store_partials(const Partial& partial) const {
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    LSTM_FUSED_UNROLL
    for (int m = 0; m < kM; ++m) {
      Acc* to = partials_of(warp % kSplitK, warp / kSplitK, m) + 2 * (lane % 4) * kPartialStride +
                lane / 4;
      LSTM_FUSED_UNROLL
      for (int j = 0; j < kRowTiles; ++j) LSTM_FUSED_UNROLL
      for (int i = 0; i < 4; ++i)
        to[(j * 8 + i % 2) * kPartialStride + i / 2 * 8] = partial.acc[m][j][i];
    }
  }

  LSTM_FUSED_DEVICE void reduce(int row, Acc (&product)[kM]) const {
    const int at = row * kPartialStride + owned_unit % kUnitTile;
    LSTM_FUSED_UNROLL
    for (int m = 0; m < kM; ++m) {
      product[m] = 0;
      LSTM_FUSED_UNROLL
      for (int k = 0; k < kSplitK; ++k) product[m] += partials_of(k, owned_unit / kUnitTile, m)[at];
    }
  }

  LSTM_FUSED_DEVICE S* next_row(int64_t s, int64_t n0, int row) const {
    if constexpr (kKind == PlanKind::kCluster)
      return reinterpret_cast<S*>(b + ((s + 1) & 1) * buffer_bytes() + row * (k_bytes + kPadBytes));
    else
      return reinterpret_cast<S*>(p.product.out.at(s + 1, d, n0 + row));
  }

  // Calls f(i, row) for each of this thread's elements of the tile that the epilogue wants.
  template <class F>
  LSTM_FUSED_DEVICE void for_each_owned(const StepRows& rows, int64_t n0, F f) const {
    if (first_unit + owned_unit >= p.product.units) return;
    const int64_t count = Epilogue::row_count(rows);
    LSTM_FUSED_UNROLL
    for (int i = 0; i < kOwned; ++i) {
      const int row = owned_row + i * kRowStride;
      if (row < kRows && n0 + row < count) f(i, row);
    }
  }

  LSTM_FUSED_DEVICE void fetch(const StepRows& rows, int64_t n0, Unit (&units)[kOwned]) const {
    for_each_owned(rows, n0, [&](int i, int row) {
      Epilogue::fetch(p, rows, d, n0 + row, first_unit + owned_unit, units[i]);
    });
  }

  // The product of a tile, and the epilogue up to the outputs that the next product takes.
  LSTM_FUSED_DEVICE void tile(const StepRows& rows, int64_t s, int64_t n0,
                              Unit (&units)[kOwned]) const {
    Partial partial{};
    if constexpr (kKind == PlanKind::kCluster) {
      const char* buffer = b + (s & 1) * buffer_bytes();
      if constexpr (kResident > 0) multiply_resident(partial, buffer, k_bytes + kPadBytes);
      multiply(partial, a - kResidentBytes, a_stride, buffer, k_bytes + kPadBytes, k_bytes,
               kResident);
    } else {
      multiply_streamed(partial, s, n0);
    }
    store_partials(partial);
    sync_block();
    const int64_t columns = p.product.out.bytes / static_cast<int64_t>(sizeof(S)) / Epilogue::kOut;
    for_each_owned(rows, n0, [&](int i, int row) {
      Acc product[kM];
      reduce(row, product);
      S out[Epilogue::kOut];
      const int u = first_unit + owned_unit;
      if (!Epilogue::apply(p, rows, d, n0 + row, u, units[i], product, out)) return;
      S* to = next_row(s, n0, row) + first_unit + owned_unit;
      LSTM_FUSED_UNROLL
      for (int v = 0; v < Epilogue::kOut; ++v) to[v * columns] = out[v];
    });
    sync_block();  // the next tile overwrites the partial sums
  }

  LSTM_FUSED_DEVICE void store(const StepRows& rows, int64_t n0,
                               const Unit (&units)[kOwned]) const {
    for_each_owned(rows, n0, [&](int i, int row) {
      Epilogue::store(p, rows, d, n0 + row, first_unit + owned_unit, units[i]);
    });
  }

  // Copies this CTA's columns of the next B to all other CTAs of the cluster through distributed
  // shared memory, in vectors of 16 bytes. A thread copies one vector to some CTAs, or several
  // vectors to all of them.
  LSTM_FUSED_DEVICE void send_to_cluster(int64_t s) const {
    const int run = k_bytes / Epilogue::kOut;  // bytes of one output's columns in a row of B
    const int from = static_cast<int>(first_unit * sizeof(S));
    const int wanted = unit_tiles * kUnitTile * static_cast<int>(sizeof(S));
    const int vectors = (from + wanted <= run ? wanted : run > from ? run - from : 0) / 16;
    const int all = kRows * Epilogue::kOut * vectors;
    if (all == 0) return;
    const int threads = thread_count(), at_once = all < threads ? all : threads;
    const int others = cluster_size() - 1, self = cluster_rank();
    char* buffer = b + ((s + 1) & 1) * buffer_bytes();
    for (int i = thread_index() % at_once; i < all; i += at_once) {
      const int row = i / vectors / Epilogue::kOut, v = i / vectors % Epilogue::kOut;
      char* vector = buffer + row * (k_bytes + kPadBytes) + v * run + from + i % vectors * 16;
      for (int r = thread_index() / at_once; r < others; r += threads / at_once)
        if (thread_index() < threads / at_once * at_once) copy_to_cta(vector, r + (r >= self));
    }
  }

  // The barrier at the end of step s: this CTA's part of the next B is written, and then all parts.
  LSTM_FUSED_DEVICE void arrive(int64_t s, char* counter) const {
    if constexpr (kKind == PlanKind::kGrid) barrier_arrive(counter);
    if constexpr (kKind == PlanKind::kCluster) {
      send_to_cluster(s);
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

  // The barrier of a step is split: between arrive and wait a CTA does what the others do not wait
  // for, which is the stores of the step and, if it has a single tile of rows, the prefetch of the
  // next step's inputs.
  LSTM_FUSED_DEVICE void run() {
    const int64_t group = block_index().y, groups = block_count().y;
    const int64_t first = group * kRows, stride = groups * kRows;
    const bool one_tile = kKind != PlanKind::kStep && first + stride >= p.N;
    char* counter = p.barrier + (d * groups + group) * kBarrierBytes;
    if constexpr (kKind != PlanKind::kStep) load_resident_operands(first);
    if constexpr (kKind == PlanKind::kCluster) {
      cluster_barrier_arrive();
      cluster_barrier_wait();
    }
    Unit units[kOwned];
    StepRows rows = rows_of(p.s_begin);
    if (one_tile) fetch(rows, first, units);
    for (int64_t s = p.s_begin; s < p.s_end; ++s) {
      const int64_t count = Epilogue::row_count(rows);
      if (first >= count) arrive(s, counter);
      for (int64_t n0 = first; n0 < count; n0 += stride) {
        if (!one_tile) fetch(rows, n0, units);
        tile(rows, s, n0, units);
        if (n0 + stride >= count) arrive(s, counter);
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

template <class Math, class Epilogue, int kRowTiles, PlanKind kKind, int kCompiledUnitTiles>
LSTM_FUSED_KERNEL(max_threads(kKind, kCompiledUnitTiles), 1)
recurrence_kernel(const LSTM_FUSED_CONSTANT RecurrenceParams p) {
  if constexpr (kKind != PlanKind::kCluster || kHasClusters)
    Recurrence<Math, Epilogue, kRowTiles, kKind, kCompiledUnitTiles>(p).run();
}

}  // namespace lstm_fused::cuda
