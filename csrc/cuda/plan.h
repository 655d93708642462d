// Which CUDA kernel runs, in which tiles, on how many CTAs: a pure function of the problem and the
// device's properties, so that it can be printed and tested without a GPU.
#pragma once

#include <cstdint>
#include <optional>

#include "../params.h"

namespace lstm_fused::cuda {

enum class PlanKind : int {
  kStep = 0,     // a launch each step, weights streamed: any size, any dtype, capturable
  kGrid = 1,     // one cooperative launch, weights stationary, h through L2
  kCluster = 2,  // one launch, weights stationary in a cluster, h through distributed shared memory
  kGemm = 3,     // a library's product and a launch each step: large batches
};
inline constexpr int kPlanKinds = 4;

// Whether each step has launches of its own, whose sizes are the host's.
constexpr bool in_steps(PlanKind kind) {
  return kind == PlanKind::kStep || kind == PlanKind::kGemm;
}

struct Device {
  int major, minor;
  int sms;
  int shared_bytes;  // that a block may opt in to
  int cluster_ctas;  // of the largest cluster, 1 where there are none
  int clusters;      // of that size that run at once, each CTA with an SM to itself
};

// Whether GPUs of this major compute capability have thread-block clusters.
constexpr bool has_clusters(int major) {
  return major >= 9;
}

struct Problem {
  DType dtype;
  int64_t T, N, H, R;
  int D;
  int gates;  // blocks of rows of w_hh
  bool projection;
  bool tf32;  // products of float32 may be taken in TF32
};

struct Plan {
  PlanKind kind;
  bool backward;
  bool tf32;
  int tile_rows;         // batch rows of a tile
  int unit_tiles;        // tiles of 16 units a CTA has
  int unit_ctas;         // CTAs that share the units; those of a cluster
  int row_groups;        // that share the tiles of the batch
  int threads;           // of a CTA
  int64_t shared_bytes;  // of a CTA
};

// Facts the kernels are compiled with.
inline constexpr int kUnitTile = 16;       // units of a tile: M of the matrix instructions
inline constexpr int kStages = 4;          // of the ring that streams B, and A in a step
inline constexpr int kStepChunk = 256;     // bytes of k in a stage of the step plan
inline constexpr int kPadBytes = 16;       // keeps rows of shared memory off each other's banks
inline constexpr int kSumUnits = 20;       // room for a row's 16 sums, off each other's banks too
inline constexpr int kStepSplit = 8;       // warps that share the k of a unit tile
inline constexpr int kClusterSplit = 4;    // the same in a cluster
inline constexpr int kMaxUnitTiles = 4;    // of a CTA in a cluster
inline constexpr int kStepRows = 16;       // the one tile the step plan is compiled for
inline constexpr int kPointUnits = 32;     // of a CTA of the gemm plan's launches,
inline constexpr int kPointRows = 8;       // which has a thread for each unit of each of its rows
inline constexpr int kMaxGridY = 65535;    // of a grid, along y
inline constexpr int kKBytes = 32;         // of k that one matrix instruction takes
inline constexpr int kBarrierBytes = 128;  // a counter has its cache line to itself

// Bytes of k in a stage of the grid plan's ring, which streams B alone: three stages under way hide
// a trip to L2 better the more they hold. Where all weights lie in shared memory they need the
// room.
constexpr int grid_chunk(bool tensor_cores, int tile_rows) {
  return tensor_cores ? 16384 / tile_rows : 512;
}

constexpr int split_of(PlanKind kind) {
  return kind == PlanKind::kCluster ? kClusterSplit : kStepSplit;
}

// Unit tiles of a CTA that a kernel is compiled for: in a cluster 2, 3 or 4, whose threads share
// the registers of an SM.
constexpr int compiled_tiles(PlanKind kind, int unit_tiles) {
  return kind != PlanKind::kCluster ? 1 : unit_tiles < 2 ? 2 : unit_tiles;
}
constexpr int max_threads(PlanKind kind, int unit_tiles) {
  return 32 * split_of(kind) * compiled_tiles(kind, unit_tiles);
}

// Steps of k whose weights a warp keeps in registers, where weights are stationary: what its
// threads' registers leave beside sums of so many rows. gates: m-tiles of a unit tile, 4 registers
// each. Plain multiply-adds want the weights in another layout.
constexpr int held_steps(PlanKind kind, bool tensor_cores, int gates, int tile_rows,
                         int unit_tiles) {
  if (!tensor_cores || kind == PlanKind::kStep) return 0;
  constexpr int in_cluster[][2] = {{128, 96}, {80, 48}, {32, 8}};  // of 8 rows, of 16
  const int registers = kind == PlanKind::kGrid
                            ? (tile_rows < 32 ? 96 : 32)
                            : in_cluster[compiled_tiles(kind, unit_tiles) - 2][tile_rows > 8];
  return registers / (4 * gates);
}

// Bytes of a row of `values` operands, padded to whole instructions.
int64_t row_bytes(DType dtype, int64_t values);

// Shared memory of a CTA. gates: m-tiles of a unit tile; k_bytes: of a row of A and B.
int64_t shared_bytes(PlanKind kind, DType dtype, bool tensor_cores, int gates, int unit_tiles,
                     int tile_rows, int64_t k_bytes);

// Whether the kernels run on the device at all.
bool supported(const Device& device);

// The plan of one kind, if the device has the room for it.
std::optional<Plan> plan_as(PlanKind kind, const Problem& problem, const Device& device,
                            bool backward);

// The best plan for a device that is supported; stepwise: of those that are in steps.
Plan make_plan(const Problem& problem, const Device& device, bool backward, bool stepwise = false);

const char* name(PlanKind kind);

}  // namespace lstm_fused::cuda
