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
#include "primitives.h"

namespace lstm_fused::cuda {

constexpr int max_threads(PlanKind kind) {
  return kind == PlanKind::kCluster ? kMaxClusterThreads : 32 * kStepSplit;
}
constexpr int split_of(PlanKind kind) {
  return kind == PlanKind::kCluster ? kClusterSplit : kStepSplit;
}

template <class Math, class Epilogue, int kTiles, PlanKind kKind>
struct Recurrence {
  using S = typename Math::Storage;
  using Acc = typename Math::Acc;
  static constexpr int kM = Epilogue::kGates;
  static constexpr int kRows = 8 * kTiles;  // of the batch, in a tile
  static constexpr int kSplit = split_of(kKind);
  static constexpr int kChunk = kKind == PlanKind::kStep ? kStepChunk : kGridChunk;
  static constexpr int kSumRow = kRows + 1;  // off each other's banks
  // Units x rows of a tile over its threads.
  static constexpr int kOwn = kRows <= 2 * kSplit ? 1 : kRows / (2 * kSplit);

  // Weights in registers: the first steps of k of each warp's.
  static constexpr int kHeld =
      kKind == PlanKind::kGrid ? held_steps(Math::kTensorCores, kM, kRows) : 0;
  static constexpr int kHeldBytes = kHeld * kSplit * kKBytes;
  static constexpr int kStepsOfStage = kChunk / (kSplit * kKBytes);  // of each warp
  static_assert(kHeld % kStepsOfStage == 0);

  const RecurrenceParams& p;
  const int unit_tiles;  // of this CTA
  const int d;
  const int64_t unit0;
  const int64_t k_bytes;
  const int64_t a_row;  // bytes between rows of A in shared memory
  char* a;
  char* b;  // the ring, or both halves of B
  uint32_t held[kHeld ? kHeld : 1][kM][4];
  Acc* sums;  // (kSplit, unit_tiles, kM * 16, kSumRow)

  LSTM_FUSED_DEVICE explicit Recurrence(const RecurrenceParams& params)
      : p(params),
        unit_tiles(kKind == PlanKind::kCluster ? thread_count() / (32 * kSplit) : 1),
        d(block_index().z),
        unit0(static_cast<int64_t>(block_index().x) * unit_tiles * kUnitTile),
        k_bytes(p.product.in.bytes),
        a_row((kKind == PlanKind::kStep ? kChunk : shared_k()) + kPadBytes) {
    char* memory = shared_memory();
    a = memory;
    b = memory + (kKind == PlanKind::kStep ? 0 : a_rows() * a_row);
    sums = reinterpret_cast<Acc*>(kKind == PlanKind::kCluster ? b + 2 * half_bytes() : b);
  }

  // Bytes of k of the weights that lie in shared memory.
  LSTM_FUSED_DEVICE int64_t shared_k() const {
    return k_bytes > kHeldBytes ? k_bytes - kHeldBytes : 0;
  }
  LSTM_FUSED_DEVICE int a_rows() const { return unit_tiles * kM * kUnitTile; }
  LSTM_FUSED_DEVICE int64_t half_bytes() const { return kRows * (k_bytes + kPadBytes); }

  // Bytes [from, from + bytes) of k of this CTA's rows of A: unit tile by unit tile, gate by gate.
  LSTM_FUSED_DEVICE void fetch_a(char* to, int64_t to_row, int64_t from, int64_t bytes) const {
    const int pieces = static_cast<int>(bytes / 16);
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
                                 int64_t bytes) const {
    const int pieces = static_cast<int>(bytes / 16);
    for (int i = thread_index(); i < kRows * pieces; i += thread_count()) {
      const int row = i / pieces, piece = i % pieces;
      copy_async(to + row * to_row + piece * 16,
                 p.product.in.at(s, d, n0 + row) + from + piece * 16, true);
    }
  }

  LSTM_FUSED_DEVICE void load_stationary(int64_t n0) {
    fetch_a(a, a_row, kHeldBytes, shared_k());
    if constexpr (kHeld > 0) {
      const int64_t units = p.product.units;
      LSTM_FUSED_UNROLL
      for (int j = 0; j < kHeld; ++j) {
        const int64_t k = (j * kSplit + thread_index() / 32 % kSplit) * kKBytes;
        LSTM_FUSED_UNROLL
        for (int m = 0; m < kM; ++m)
          Math::load_held(held[j][m],
                          p.product.a[d] + (Epilogue::gate(m) * units + unit0) * k_bytes + k,
                          k_bytes, k < k_bytes ? units - unit0 : 0);
      }
    }
    if constexpr (kKind == PlanKind::kCluster)
      for (int half = 0; half < 2; ++half)
        fetch_b(b + half * half_bytes(), k_bytes + kPadBytes, half, n0, 0, k_bytes);
    commit_copies();
    wait_copies<0>();
    sync_block();
  }

  struct Part {
    Acc acc[kM][kTiles][4];
  };

  // The steps of k in [0, bytes) that are this warp's.
  LSTM_FUSED_DEVICE void multiply(Part& part, const char* a_at, int64_t a_stride, const char* b_at,
                                  int64_t b_stride, int64_t bytes) const {
    const int warp = thread_index() / 32;
    sync_warp();
    a_at += warp / kSplit * kM * kUnitTile * a_stride;
    for (int64_t k = warp % kSplit * kKBytes; k < bytes; k += kSplit * kKBytes)
      Math::template multiply<kM, kTiles>(part.acc, a_at + k, kUnitTile * a_stride, a_stride,
                                          b_at + k, b_stride);
  }

  LSTM_FUSED_DEVICE int64_t chunk_bytes(int64_t chunk) const {
    const int64_t left = k_bytes - chunk * kChunk;
    return left < kChunk ? left : kChunk;
  }

  LSTM_FUSED_DEVICE char* stage(int64_t chunk) const {
    constexpr int kStageRows = kRows + (kKind == PlanKind::kStep ? kM * kUnitTile : 0);
    return b + chunk % kStages * (kStageRows * (kChunk + kPadBytes));
  }

  // Chunk of k into its stage of the ring: B, then A where it is not stationary.
  LSTM_FUSED_DEVICE void fetch_chunk(int64_t chunk, int64_t chunks, int64_t s, int64_t n0) const {
    if (chunk < chunks) {
      char* to = stage(chunk);
      fetch_b(to, kChunk + kPadBytes, s, n0, chunk * kChunk, chunk_bytes(chunk));
      if constexpr (kKind == PlanKind::kStep)
        fetch_a(to + kRows * (kChunk + kPadBytes), kChunk + kPadBytes, chunk * kChunk,
                chunk_bytes(chunk));
    }
    commit_copies();
  }

  // Until everybody's copies of this chunk are there, and everybody is done with the stage that the
  // next fetch overwrites.
  LSTM_FUSED_DEVICE void advance(int64_t chunk, int64_t chunks, int64_t s, int64_t n0) const {
    wait_copies<kStages - 2>();
    sync_block();
    fetch_chunk(chunk + kStages - 1, chunks, s, n0);
    sync_warp();
  }

  LSTM_FUSED_DEVICE void stream(Part& part, int64_t s, int64_t n0) const {
    const int64_t chunks = ceil_div(k_bytes, kChunk);
    for (int64_t c = 0; c < kStages - 1; ++c) fetch_chunk(c, chunks, s, n0);
    if constexpr (kHeld > 0) {
      LSTM_FUSED_UNROLL
      for (int c = 0; c < kHeld / kStepsOfStage; ++c)
        if (c < chunks) {
          advance(c, chunks, s, n0);
          const int64_t bytes = chunk_bytes(c);
          LSTM_FUSED_UNROLL
          for (int i = 0; i < kStepsOfStage; ++i) {
            const int64_t k = (i * kSplit + thread_index() / 32 % kSplit) * kKBytes;
            if (k < bytes)
              Math::multiply_held(part.acc, held[c * kStepsOfStage + i], stage(c) + k,
                                  kChunk + kPadBytes);
          }
        }
    }
    for (int64_t c = kHeld / kStepsOfStage; c < chunks; ++c) {
      advance(c, chunks, s, n0);
      const char* at = stage(c);
      const bool streamed = kKind == PlanKind::kStep;
      multiply(part, streamed ? at + kRows * (kChunk + kPadBytes) : a + c * kChunk - kHeldBytes,
               a_row, at, kChunk + kPadBytes, chunk_bytes(c));
    }
    wait_copies<0>();
    sync_block();  // the ring becomes the room for sums
  }

  LSTM_FUSED_DEVICE void store_sums(const Part& part) const {
    const int lane = thread_index() % 32, warp = thread_index() / 32;
    const int tile = warp / kSplit, k_part = warp % kSplit;
    Acc* to = sums + (k_part * unit_tiles + tile) * (kM * kUnitTile * kSumRow);
    LSTM_FUSED_UNROLL
    for (int m = 0; m < kM; ++m) LSTM_FUSED_UNROLL
    for (int j = 0; j < kTiles; ++j) LSTM_FUSED_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int row = m * kUnitTile + lane / 4 + (i / 2) * 8;
      to[row * kSumRow + j * 8 + 2 * (lane % 4) + i % 2] = part.acc[m][j][i];
    }
  }

  // Element e of the tile: units lie beside each other in memory, so neighbours take neighbours.
  LSTM_FUSED_DEVICE bool element(int own, int& unit, int& row) const {
    const int units = unit_tiles * kUnitTile, e = thread_index() + own * thread_count();
    unit = e % units;
    row = e / units;
    return row < kRows;
  }

  LSTM_FUSED_DEVICE void sum_of(int unit, int row, Acc (&total)[kM]) const {
    LSTM_FUSED_UNROLL
    for (int m = 0; m < kM; ++m) {
      const int at = (m * kUnitTile + unit % kUnitTile) * kSumRow + row;
      total[m] = 0;
      LSTM_FUSED_UNROLL
      for (int k = 0; k < kSplit; ++k)
        total[m] += sums[(k * unit_tiles + unit / kUnitTile) * (kM * kUnitTile * kSumRow) + at];
    }
  }

  LSTM_FUSED_DEVICE S* next(int64_t s, int64_t n0, int row) const {
    if constexpr (kKind == PlanKind::kCluster)
      return reinterpret_cast<S*>(b + ((s + 1) & 1) * half_bytes() + row * (k_bytes + kPadBytes));
    else
      return reinterpret_cast<S*>(p.product.out.at(s + 1, d, n0 + row));
  }

  LSTM_FUSED_DEVICE void tile(const StepRows& rows, int64_t s, int64_t n0) const {
    typename Epilogue::Fetched fetched[kOwn];
    int64_t reach = Epilogue::reach(rows);
    LSTM_FUSED_UNROLL
    for (int own = 0; own < kOwn; ++own) {
      int unit, row;
      if (element(own, unit, row) && n0 + row < reach && unit0 + unit < p.product.units)
        Epilogue::fetch(p, rows, d, n0 + row, unit0 + unit, fetched[own]);
    }
    Part part{};
    if constexpr (kKind == PlanKind::kCluster)
      multiply(part, a, a_row, b + (s & 1) * half_bytes(), k_bytes + kPadBytes, k_bytes);
    else
      stream(part, s, n0);
    store_sums(part);
    sync_block();
    const int64_t run = p.product.out.bytes / static_cast<int64_t>(sizeof(S)) / Epilogue::kOut;
    LSTM_FUSED_UNROLL
    for (int own = 0; own < kOwn; ++own) {
      int unit, row;
      if (!element(own, unit, row) || n0 + row >= reach || unit0 + unit >= p.product.units)
        continue;
      Acc total[kM];
      sum_of(unit, row, total);
      S out[Epilogue::kOut];
      if (!Epilogue::apply(p, rows, d, n0 + row, unit0 + unit, fetched[own], total, out)) continue;
      S* to = next(s, n0, row) + unit0 + unit;
      LSTM_FUSED_UNROLL
      for (int v = 0; v < Epilogue::kOut; ++v) to[v * run] = out[v];
    }
    sync_block();  // sums are read: their room may be written again
  }

  // This CTA's columns of the next B, 16 bytes at a time, to all other CTAs of the cluster.
  LSTM_FUSED_DEVICE void send(int64_t s) const {
    const int64_t run = k_bytes / Epilogue::kOut;
    const int64_t from = unit0 * static_cast<int64_t>(sizeof(S));
    const int64_t wanted = static_cast<int64_t>(unit_tiles) * kUnitTile * sizeof(S);
    const int64_t width = from + wanted <= run ? wanted : run > from ? run - from : 0;
    const int pieces = static_cast<int>(width / 16);
    const int each = kRows * Epilogue::kOut * pieces;
    const int others = cluster_size() - 1, self = cluster_rank();
    char* half = b + ((s + 1) & 1) * half_bytes();
    for (int i = thread_index(); i < each * others; i += thread_count()) {
      const int rank = i / each + (i / each >= self), rest = i % each;
      const int row = rest / (Epilogue::kOut * pieces), v = rest / pieces % Epilogue::kOut;
      send_shared(half + row * (k_bytes + kPadBytes) + v * run + from + rest % pieces * 16, rank);
    }
  }

  LSTM_FUSED_DEVICE void run() {
    const int64_t group = block_index().y, groups = block_count().y;
    if constexpr (kKind != PlanKind::kStep) load_stationary(group * kRows);
    if constexpr (kKind == PlanKind::kCluster) sync_cluster();
    for (int64_t s = p.s_begin; s < p.s_end; ++s) {
      const StepRows rows = kKind == PlanKind::kStep
                                ? p.rows[d]
                                : rows_at(p.steps, s, Epilogue::kBackward != (d == 1));
      const int64_t reach = Epilogue::reach(rows);
      for (int64_t n0 = group * kRows; n0 < reach; n0 += groups * kRows) tile(rows, s, n0);
      if constexpr (kKind == PlanKind::kGrid)
        if (s + 1 < p.s_end)
          sync_ctas(p.barrier + d * groups + group,
                    static_cast<unsigned long long>(block_count().x) * (s - p.s_begin + 1));
      if constexpr (kKind == PlanKind::kCluster) {
        send(s);
        sync_cluster();
      }
    }
  }
};

template <class Math, class Epilogue, int kTiles, PlanKind kKind>
LSTM_FUSED_KERNEL(max_threads(kKind))
recurrence_kernel(const LSTM_FUSED_CONSTANT RecurrenceParams p) {
  Recurrence<Math, Epilogue, kTiles, kKind>(p).run();
}

}  // namespace lstm_fused::cuda
