// Which CUDA kernel runs, with which tiles, on how many CTAs: a pure function of the problem and of
// the device's properties, so that it can be printed and tested without a GPU.
#pragma once

#include <cstdint>
#include <optional>

#include "../params.h"

namespace lstm_fused::cuda {

enum class PlanKind : int {
  kStep = 0,     // a launch each step, weights streamed: every size and dtype
  kGrid = 1,     // one cooperative launch, weights resident, h exchanged through L2
  kCluster = 2,  // one launch, weights resident, h exchanged through distributed shared memory
  kGemm = 3,     // a product by cuBLAS and a launch each step: large batches
};
inline constexpr int kPlanKinds = 4;

// Whether each step has launches of its own. The other plans are persistent: one launch for the
// whole sequence.
constexpr bool is_stepwise(PlanKind kind) {
  return kind == PlanKind::kStep || kind == PlanKind::kGemm;
}

struct Device {
  int major, minor;
  int sms;
  int shared_bytes;  // that a CTA may opt in to
  int cluster_ctas;  // of the largest cluster, 1 where there are none
  int clusters;      // of that size that are active at once, if each CTA has an SM to itself
};

// Whether GPUs of this major compute capability have thread-block clusters. ptx/cluster.h and
// architectures.h must agree.
constexpr bool has_clusters(int major) {
  return major >= 9;
}

struct Problem {
  DType dtype;
  int64_t T, N, H, R;
  int D;
  int gates;  // of the cell: w_hh has gates * H rows
  bool projection;
  bool tf32;  // whether products of float32 may use TF32
  // Of a described cell, which has the gemm plan alone.
  bool described = false;
  bool normalizes = false;  // over all units of a row: a CTA has a row
};

struct Plan {
  PlanKind kind;
  bool backward;
  bool tf32;
  int tile_rows;         // batch rows of a tile
  int unit_tiles;        // tiles of kUnitTile units that a CTA has
  int unit_ctas;         // CTAs that partition the units; in a cluster plan those of a cluster
  int row_groups;        // groups of unit_ctas CTAs that partition the batch
  int threads;           // of a CTA
  int64_t shared_bytes;  // of a CTA
};

// Constants that the kernels are compiled with.
inline constexpr int kUnitTile = 16;        // units of a tile: M of the matrix instructions
inline constexpr int kSliceBytes = 32;      // bytes of k that one matrix instruction takes
inline constexpr int kStages = 4;           // of the cp.async pipeline
inline constexpr int kStepChunk = 256;      // bytes of k in a stage of a step plan
inline constexpr int kPadBytes = 16;        // after each row in shared memory: no bank conflicts
inline constexpr int kPartialStride = 20;   // between rows of 16 partial sums: no bank conflicts
inline constexpr int kStepSplitK = 8;       // warps that share the k of a unit tile
inline constexpr int kClusterSplitK = 4;    // the same in a cluster
inline constexpr int kMaxUnitTiles = 4;     // of a CTA in a cluster
inline constexpr int kStepRows = 16;        // the one tile_rows that step plans are compiled for
inline constexpr int kPointwiseUnits = 32;  // of a CTA of a gemm plan, which has a thread
inline constexpr int kPointwiseRows = 8;    // for each unit of each of its rows
inline constexpr int kMaxRowThreads = 256;  // of a CTA that has a row of a cell that normalizes
inline constexpr int kMaxRowSums = 6;       // that such a CTA adds up at a time
inline constexpr int kMaxGridY = 65535;     // CTAs of a grid along y
inline constexpr int kBarrierBytes = 128;   // each counter has a cache line to itself
inline constexpr int kMaxClusterCtas = 16;  // more than 8 only where the device allows it
inline constexpr int kMbarrierBytes = 8;    // in shared memory: one of each buffer in a cluster

// Bytes of k in a stage of a grid plan, which streams B alone. Three stages are in flight, and the
// more they hold the better they hide the latency of L2. Without tensor cores no weights are
// register-resident, so shared memory has no space for larger stages.
constexpr int grid_chunk(bool tensor_cores, int tile_rows) {
  return tensor_cores ? 16384 / tile_rows : 512;
}

constexpr int split_k(PlanKind kind) {
  return kind == PlanKind::kCluster ? kClusterSplitK : kStepSplitK;
}

// The unit tiles of a CTA that a kernel is compiled for. In a cluster 2, 3 or 4: the fewer, the
// more registers a thread has.
constexpr int compiled_unit_tiles(PlanKind kind, int unit_tiles) {
  return kind != PlanKind::kCluster ? 1 : unit_tiles < 2 ? 2 : unit_tiles;
}
constexpr int max_threads(PlanKind kind, int unit_tiles) {
  return 32 * split_k(kind) * compiled_unit_tiles(kind, unit_tiles);
}

// How many of a warp's k slices have register-resident weights, in the persistent plans: as many as
// fit beside the accumulators of a tile. gates: m-tiles of a unit tile, 4 registers each. Without
// tensor cores none, since fused multiply-adds need another layout.
constexpr int resident_slices(PlanKind kind, bool tensor_cores, int gates, int tile_rows,
                              int unit_tiles) {
  if (!tensor_cores || kind == PlanKind::kStep) return 0;
  // By compiled_unit_tiles - 2; for tiles of 8 rows and of 16. A single gate is mostly backward's,
  // whose epilogue has more values.
  const int cluster_registers[][2] = {{128, 96}, {gates > 1 ? 96 : 80, 48}, {32, 8}};
  const int registers =
      kind == PlanKind::kGrid
          ? (tile_rows < 32 ? 128 : 32)
          : cluster_registers[compiled_unit_tiles(kind, unit_tiles) - 2][tile_rows > 8];
  return registers / (4 * gates);
}

// Bytes of a row of `values` operands, padded to whole k slices.
int64_t row_bytes(DType dtype, int64_t values);

// Shared memory of a CTA. gates: m-tiles of a unit tile; k_bytes: of a row of A and B.
int64_t shared_bytes(PlanKind kind, DType dtype, bool tensor_cores, int gates, int unit_tiles,
                     int tile_rows, int64_t k_bytes);

// The same of a CTA that has a row: for each of its sums a value of every thread, those of a warp
// that adds them, and the result.
constexpr int64_t row_shared_bytes(int threads) {
  return kMaxRowSums * (threads + 32 + 1) * int64_t{sizeof(double)};
}

// Whether the kernels run on the device at all.
bool supported(const Device& device);

// The plan of one kind, or nothing if it does not support the problem or exceeds the device.
std::optional<Plan> plan_as(PlanKind kind, const Problem& problem, const Device& device,
                            bool backward);

// The plan of one kind; if it does not support the problem, the one that every such problem has.
Plan forced_plan(PlanKind kind, const Problem& problem, const Device& device, bool backward);

// The plan that is expected to be the fastest. The device must be supported. stepwise: only plans
// that launch each step.
Plan make_plan(const Problem& problem, const Device& device, bool backward, bool stepwise = false);

// Why a call without gradients runs torch's own kernels, cuDNN's, in place of this plan; or null
// where this plan is predicted to be clearly ahead, or torch has no such cell.
const char* cudnn_reason(const Plan& plan, const Problem& problem);

const char* name(PlanKind kind);

}  // namespace lstm_fused::cuda
