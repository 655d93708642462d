// The product of a CTA's tile, of some units with some rows of the batch: where its operands are,
// how they get there, and the warps' partial sums.
#pragma once

#include <type_traits>

#include "epilogue.h"
#include "params.h"
#include "plan.h"
#include "ptx/async_copy.h"
#include "ptx/threads.h"
#include "tile.h"

namespace lstm_fused::cuda {

// kRowTiles: tiles of 8 batch rows in a row tile. kCompiledUnitTiles: the unit tiles of a CTA that
// the kernel is compiled for; a cluster may have fewer.
template <class Math, class Epilogue, int kRowTiles, PlanKind kKind, int kCompiledUnitTiles>
struct TileProduct {
  using S = typename Math::Storage;
  using Acc = typename Math::Acc;
  // A persistent kernel counts rows in int (params.h).
  using Index = std::conditional_t<kKind == PlanKind::kStep, int64_t, int>;
  static constexpr int kM = Epilogue::kGates;
  static constexpr int kRows = 8 * kRowTiles;
  static constexpr int kSplitK = split_k(kKind);             // warps that share a unit tile
  static constexpr int kWarpStride = kSplitK * kSliceBytes;  // of k, between a warp's slices
  // Of k, in a stage of the pipeline.
  static constexpr int kChunkBytes =
      kKind == PlanKind::kStep ? kStepChunk : grid_chunk(Math::kTensorCores, kRows);

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

  const RecurrenceParams& p;
  const int unit_tiles;  // of this CTA
  const int d;
  const int warp;
  const int first_unit;
  const int k_bytes;
  const int a_stride;  // bytes between rows of A in shared memory
  char* a;
  char* b;  // the stages of the pipeline; in a cluster both buffers of B
  uint32_t resident[kResident ? kResident : 1][kM][4];
  Acc* partials;         // (warps, kM, kRows, kPartialStride)
  const char* b_source;  // first_source, where B is streamed

  LSTM_FUSED_DEVICE explicit TileProduct(const RecurrenceParams& params)
      : p(params),
        unit_tiles(kKind == PlanKind::kCluster ? thread_count() / (32 * kSplitK) : 1),
        d(block_index().z),
        warp(warp_index()),
        first_unit(static_cast<int>(block_index().x) * unit_tiles * kUnitTile),
        k_bytes(static_cast<int>(p.product.in.bytes)),
        a_stride((kKind == PlanKind::kStep ? kChunkBytes : shared_k()) + kPadBytes) {
    char* memory = shared_memory();
    a = memory;
    b = memory + (kKind == PlanKind::kStep ? 0 : a_rows() * a_stride);
    partials = reinterpret_cast<Acc*>(kKind == PlanKind::kCluster ? b + 2 * buffer_bytes() : b);
    if constexpr (kKind != PlanKind::kCluster) b_source = kept(first_source());
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

  // The sums of one of this CTA's units, over the warps in a fixed order.
  LSTM_FUSED_DEVICE void reduce(int row, int unit, Acc (&product)[kM]) const {
    const int first_warp = unit / kUnitTile * kSplitK;
    const int at = row * kPartialStride + unit % kUnitTile;
    LSTM_FUSED_UNROLL
    for (int m = 0; m < kM; ++m) {
      product[m] = 0;
      LSTM_FUSED_UNROLL
      for (int k = 0; k < kSplitK; ++k) product[m] += partials_of(first_warp + k, m)[at];
    }
  }

  // Of a cluster: the buffer of B that step s reads.
  LSTM_FUSED_DEVICE char* buffer(Index s) const { return b + (s & 1) * buffer_bytes(); }

  // The partial sums of a tile, which all threads can then reduce.
  LSTM_FUSED_DEVICE void multiply_tile(Index s, Index n0) const {
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
  }
};

}  // namespace lstm_fused::cuda
