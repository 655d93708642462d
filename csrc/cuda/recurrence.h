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

#include <type_traits>

#include "epilogue.h"
#include "exchange.h"
#include "params.h"
#include "plan.h"
#include "ptx/async_copy.h"
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
  // A persistent kernel counts rows in int (params.h).
  using Index = std::conditional_t<kKind == PlanKind::kStep, int64_t, int>;
  using Rows = StepRowsOf<Index>;
  static constexpr int kM = Epilogue::kGates;
  static constexpr int kRows = 8 * kRowTiles;
  static constexpr int kSplitK = split_k(kKind);             // warps that share a unit tile
  static constexpr int kWarpStride = kSplitK * kSliceBytes;  // of k, between a warp's slices
  // Of k, in a stage of the pipeline.
  static constexpr int kChunkBytes =
      kKind == PlanKind::kStep ? kStepChunk : grid_chunk(Math::kTensorCores, kRows);
  // The elements of a tile that a thread runs the epilogue for: one unit, every kRowStride-th row.
  static constexpr int kRowStride = 2 * kSplitK;
  static constexpr int kOwned = kRows <= kRowStride ? 1 : kRows / kRowStride;

  // Register-resident weights: the first k slices of each warp.
  static constexpr int kResident =
      resident_slices(kKind, Math::kTensorCores, kM, kRows, kCompiledUnitTiles);
  static constexpr int kResidentBytes = kResident * kWarpStride;
  static constexpr int kSlicesOfChunk = kChunkBytes / kWarpStride;  // for each warp
  // Accumulators that a warp's slices take in turn: a matrix instruction that adds to what the one
  // before it computed waits for it, so that at least four are independent.
  static constexpr int kChains =
      !Math::kTensorCores || kM * kRowTiles > 2 ? 1 : 4 / (kM * kRowTiles);
  static constexpr bool kRounded = kKind != PlanKind::kStep;  // A, once for all steps
  // Slices whose operands are loaded at once.
  static constexpr int kBatch = !Math::kTensorCores ? 1 : kChains > 2 ? kChains : 2;
  // The same where not all resident slices are there. With more unit tiles they mostly are, and
  // registers are few.
  static constexpr int kPartBatch = kCompiledUnitTiles > 2 ? 1 : kBatch;

  using Cluster = ClusterExchange<S, kRows, Epilogue::kOut>;

  const RecurrenceParams& p;
  const int unit_tiles;  // of this CTA
  const int d;
  const int warp;
  const int first_unit;
  const int k_bytes;
  const int a_stride;  // bytes between rows of A in shared memory
  const int owned_unit, owned_row;
  char* a;
  char* b;  // the stages of the pipeline; in a cluster both buffers of B
  uint32_t resident[kResident ? kResident : 1][kM][4];
  Acc* partials;  // (warps, kM, kRows, kPartialStride)
  // Not in a cluster. What is read of B and written to the next one: first_source, first_target.
  const char* b_source;
  char* b_target;

  LSTM_FUSED_DEVICE explicit Recurrence(const RecurrenceParams& params)
      : p(params),
        unit_tiles(kKind == PlanKind::kCluster ? thread_count() / (32 * kSplitK) : 1),
        d(block_index().z),
        warp(warp_index()),
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
    if constexpr (kKind != PlanKind::kCluster) {
      b_source = kept(first_source());
      b_target = kept(first_target());
    }
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

  LSTM_FUSED_DEVICE void copy_b(char* to, int64_t s, int64_t n0) const {
    const char* rows = p.product.in.at(s, d, n0);
    const int vectors = k_bytes / 16;
    for (int i = thread_index(); i < kRows * vectors; i += thread_count()) {
      const int row = i / vectors, vector = i % vectors;
      copy_async(to + row * (k_bytes + kPadBytes) + vector * 16,
                 rows + int64_t{row} * k_bytes + vector * 16, true);
    }
  }

  LSTM_FUSED_DEVICE void load_resident_operands(int64_t n0) {
    copy_a(a, a_stride, kResidentBytes, shared_k());
    if constexpr (kResident > 0) {
      const int64_t units = p.product.units;
      LSTM_FUSED_UNROLL
      for (int j = 0; j < kResident; ++j) {
        const int k = k_of(j);
        const int64_t first = first_unit + warp / kSplitK * kUnitTile;
        LSTM_FUSED_UNROLL
        for (int m = 0; m < kM; ++m)
          Math::load_resident(resident[j][m],
                              p.product.a[d] + (Epilogue::gate(m) * units + first) * k_bytes + k,
                              k_bytes, k < k_bytes ? units - first : 0);
      }
    }
    if constexpr (kKind == PlanKind::kCluster)
      for (int i = 0; i < 2; ++i) copy_b(b + i * buffer_bytes(), i, n0);
    commit_copies();
    wait_copies<0>();
    sync_block();
    if constexpr (Math::kRounds) {
      for (int i = thread_index() * 16; i < a_rows() * a_stride; i += thread_count() * 16)
        if (i % a_stride < shared_k()) Math::round_vector(a + i);
      sync_block();
    }
  }

  struct Partial {
    Acc acc[kChains][kM][kRowTiles][4];
  };

  // First byte of k of this warp's slice j: split-k assigns slices to warps in turn.
  LSTM_FUSED_DEVICE int k_of(int j) const { return (j * kSplitK + warp % kSplitK) * kSliceBytes; }

  // Adds the product of the register-resident slices [first, first + count), as far as there are
  // so many, with B, whose k starts at b_at with that of slice `first`; bytes: of k from there on.
  // Where all are there, no branch parts the matrix instructions.
  LSTM_FUSED_DEVICE void multiply_resident(Partial& partial, int first, int count, const char* b_at,
                                           int b_stride, int bytes) const {
    sync_warp();
    const auto multiply = [&](auto slices, int j) {
      Math::template multiply_resident<slices>(partial.acc, &resident[first + j], b_at + k_of(j),
                                               b_stride, kWarpStride);
    };
    constexpr std::integral_constant<int, kBatch> batch;
    constexpr std::integral_constant<int, kPartBatch> part_batch;
    constexpr std::integral_constant<int, 1> one;
    if (bytes >= count * kWarpStride) {
      LSTM_FUSED_UNROLL
      for (int j = 0; j + kBatch <= count; j += kBatch) multiply(batch, j);
      LSTM_FUSED_UNROLL
      for (int j = count - count % kBatch; j < count; ++j) multiply(one, j);
      return;
    }
    LSTM_FUSED_UNROLL
    for (int j = 0; j < count; j += kPartBatch) {
      if (kPartBatch > 1 && j + kPartBatch <= count && bytes >= (j + kPartBatch) * kWarpStride) {
        multiply(part_batch, j);
        continue;
      }
      LSTM_FUSED_UNROLL
      for (int i = j; i < j + kPartBatch && i < count; ++i)
        if (k_of(i) < bytes) multiply(one, i);
    }
  }

  // Adds the product of this warp's slices of k in [k_of(first), bytes), with A in shared memory.
  LSTM_FUSED_DEVICE void multiply(Partial& partial, const char* a_at, int a_stride,
                                  const char* b_at, int b_stride, int bytes, int first) const {
    sync_warp();
    a_at += warp / kSplitK * kM * kUnitTile * a_stride + k_of(first);
    b_at += k_of(first);
    int left = (bytes - k_of(first) + kWarpStride - 1) / kWarpStride;
    LSTM_FUSED_NO_UNROLL
    for (; left >= kBatch; left -= kBatch) {
      Math::template multiply<kBatch, kRounded>(partial.acc, a_at, kUnitTile * a_stride, a_stride,
                                                b_at, b_stride, kWarpStride);
      a_at += kBatch * kWarpStride;
      b_at += kBatch * kWarpStride;
    }
    LSTM_FUSED_NO_UNROLL
    for (; left > 0; --left) {
      Math::template multiply<1, kRounded>(partial.acc, a_at, kUnitTile * a_stride, a_stride, b_at,
                                           b_stride, kWarpStride);
      a_at += kWarpStride;
      b_at += kWarpStride;
    }
  }

  LSTM_FUSED_DEVICE int chunk_bytes(int chunk) const {
    const int left = k_bytes - chunk * kChunkBytes;
    return left < kChunkBytes ? left : kChunkBytes;
  }

  LSTM_FUSED_DEVICE char* stage(int chunk) const {
    constexpr int kStageRows = kRows + (kKind == PlanKind::kStep ? kM * kUnitTile : 0);
    return b + chunk % kStages * (kStageRows * (kChunkBytes + kPadBytes));
  }

  // How the threads of a pipeline's CTA share out the rows of a chunk: so many consecutive ones
  // have a row, so that no address needs a division by a number that is not constant.
  static constexpr int kChunkLanes = kChunkBytes / 16 < 32 ? kChunkBytes / 16 : 32;
  static constexpr int kChunkRows = max_threads(PlanKind::kGrid, 1) / kChunkLanes;  // at once
  static constexpr int kChunkCopies = kChunkBytes / 16 / kChunkLanes;  // of a thread, in a row
  static_assert(max_threads(PlanKind::kStep, 1) == max_threads(PlanKind::kGrid, 1));

  // Copies a thread's part of a row of a chunk; bytes: of k from the thread's first byte on.
  LSTM_FUSED_DEVICE static void copy_row(char* to, const char* from, int bytes, bool valid) {
    LSTM_FUSED_UNROLL
    for (int v = 0; v < kChunkCopies; ++v) {
      const int at = v * kChunkLanes * 16;
      if (at < bytes) copy_async(to + at, from + at, valid);
    }
  }

  // Where this thread's part of B starts in row 0 of buffer 0, and which of the tile copy_chunk
  // takes.
  LSTM_FUSED_DEVICE const char* first_source() const {
    return p.product.in.at(0, d, thread_index() / kChunkLanes) + thread_index() % kChunkLanes * 16;
  }
  LSTM_FUSED_DEVICE const char* source(Index s, Index n0) const {
    return kept(b_source + p.product.in.buffer(s) + wide_product(n0, Index(k_bytes)));
  }

  // Starts the copy of a chunk of k into its stage: B, then A where it is not resident. Past the
  // last chunk the group is empty, so that wait_copies can count groups.
  LSTM_FUSED_DEVICE void copy_chunk(int chunk, int chunks, const char* source) const {
    if (chunk < chunks) {
      constexpr int kStride = kChunkBytes + kPadBytes;
      const int row = thread_index() / kChunkLanes, at = thread_index() % kChunkLanes * 16;
      char* to = stage(chunk) + row * kStride + at;
      const int bytes = k_bytes - chunk * kChunkBytes - at;
      source += chunk * kChunkBytes;
      LSTM_FUSED_UNROLL
      for (int r = 0; r < kRows; r += kChunkRows)
        copy_row(to + r * kStride, source + r * k_bytes, bytes, true);
      if constexpr (kKind == PlanKind::kStep) {
        static_assert(kChunkRows == kUnitTile);
        const int64_t units = p.product.units;
        const bool valid = first_unit + row < units;
        const int64_t unit = valid ? first_unit + row : 0;
        LSTM_FUSED_UNROLL
        for (int m = 0; m < kM; ++m)
          copy_row(to + (kRows + m * kUnitTile) * kStride,
                   p.product.a[d] + (Epilogue::gate(m) * units + unit) * k_bytes +
                       chunk * kChunkBytes + at,
                   bytes, valid);
      }
    }
    commit_copies();
  }

  // Waits for the copies of this chunk. After the barrier all threads have finished with the stage
  // that is overwritten next: that of the chunk before.
  LSTM_FUSED_DEVICE void advance(int chunk, int chunks, const char* source) const {
    wait_copies<kStages - 2>();
    sync_block();
    copy_chunk(chunk + kStages - 1, chunks, source);
  }

  LSTM_FUSED_DEVICE void multiply_streamed(Partial& partial, Index s, Index n0) const {
    constexpr int kStride = kChunkBytes + kPadBytes;
    const int chunks = static_cast<int>(ceil_div(k_bytes, kChunkBytes));
    const char* from = source(s, n0);
    LSTM_FUSED_UNROLL
    for (int c = 0; c < kStages - 1; ++c) copy_chunk(c, chunks, from);
    // Chunks whose weights are all register-resident, and resident slices of the chunk after them.
    constexpr int kResidentChunks = kResident / kSlicesOfChunk;
    constexpr int kMixed = kResident % kSlicesOfChunk;
    if constexpr (kResident > 0) {
      LSTM_FUSED_UNROLL
      for (int c = 0; c < kResidentChunks + (kMixed > 0); ++c)
        if (c < chunks) {
          advance(c, chunks, from);
          const int bytes = chunk_bytes(c);
          multiply_resident(partial, c * kSlicesOfChunk,
                            c < kResidentChunks ? kSlicesOfChunk : kMixed, stage(c), kStride,
                            bytes);
          if (kMixed > 0 && c == kResidentChunks)
            multiply(partial, a - kMixed * kWarpStride, a_stride, stage(c), kStride, bytes, kMixed);
        }
    }
    LSTM_FUSED_NO_UNROLL
    for (int c = kResidentChunks + (kMixed > 0); c < chunks; ++c) {
      advance(c, chunks, from);
      const char* at = stage(c);
      const bool streamed = kKind == PlanKind::kStep;
      multiply(partial, streamed ? at + kRows * kStride : a + c * kChunkBytes - kResidentBytes,
               a_stride, at, kStride, chunk_bytes(c), 0);
    }
    wait_copies<0>();
    sync_block();  // partials overwrite the stages
  }

  LSTM_FUSED_DEVICE Acc* partials_of(int of_warp, int m) const {
    return partials + (of_warp * kM + m) * (kRows * kPartialStride);
  }

  LSTM_FUSED_DEVICE void store_partials(const Partial& partial) const {
    const int lane = thread_index() % 32;
    LSTM_FUSED_UNROLL
    for (int m = 0; m < kM; ++m) {
      Acc* to = partials_of(warp, m) + 2 * (lane % 4) * kPartialStride + lane / 4;
      LSTM_FUSED_UNROLL
      for (int j = 0; j < kRowTiles; ++j) LSTM_FUSED_UNROLL
      for (int i = 0; i < 4; ++i) {
        Acc sum = partial.acc[0][m][j][i];
        LSTM_FUSED_UNROLL
        for (int chain = 1; chain < kChains; ++chain) sum += partial.acc[chain][m][j][i];
        to[(j * 8 + i % 2) * kPartialStride + i / 2 * 8] = sum;
      }
    }
  }

  LSTM_FUSED_DEVICE void reduce(int row, Acc (&product)[kM]) const {
    const int first_warp = owned_unit / kUnitTile * kSplitK;
    const int at = row * kPartialStride + owned_unit % kUnitTile;
    LSTM_FUSED_UNROLL
    for (int m = 0; m < kM; ++m) {
      product[m] = 0;
      LSTM_FUSED_UNROLL
      for (int k = 0; k < kSplitK; ++k) product[m] += partials_of(first_warp + k, m)[at];
    }
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
  // Of a cluster.
  LSTM_FUSED_DEVICE char* buffer(Index s) const { return b + (s & 1) * buffer_bytes(); }

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
    Partial partial{};
    if constexpr (kKind == PlanKind::kCluster) {
      const char* from = buffer(s);
      if constexpr (kResident > 0)
        multiply_resident(partial, 0, kResident, from, k_bytes + kPadBytes, k_bytes);
      multiply(partial, a - kResidentBytes, a_stride, from, k_bytes + kPadBytes, k_bytes,
               kResident);
    } else {
      multiply_streamed(partial, s, n0);
    }
    store_partials(partial);
    sync_block();
    const int run = columns();
    for_each_owned(rows, n0, [&](int i, const Element<Index>& e) {
      Acc product[kM];
      reduce(owned_row + i * kRowStride, product);
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

  // All steps of a persistent plan. The barrier of a step is split: between arrive and wait a CTA
  // does what the others do not wait for, which is the stores of the step and, if it has a single
  // tile of rows, the prefetch of the next step's inputs. exchange: with
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
