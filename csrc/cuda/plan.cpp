#include "plan.h"

#include <algorithm>

#include "architectures.h"
#include "arithmetic.h"

namespace lstm_fused::cuda {
namespace {

// Up to this many steps a persistent plan does not amortize loading the weights.
constexpr int64_t kMaxStreamedSteps = 3;
// With more waves of clusters, or more tiles of the batch for a CTA in each step, a product over
// the whole batch uses the device better.
constexpr int64_t kMaxWaves = 2;
constexpr int64_t kMaxTilesPerGroup = 4;
// In a step plan each row tile loads all weights from L2. Beyond this many bytes of repeated loads
// they take longer than a gemm plan's second launch and its results' way through memory.
constexpr int64_t kMaxReloadedBytes = 16 << 20;

int64_t k_bytes(const Problem& p, bool backward) {
  return backward ? p.gates * row_bytes(p.dtype, p.H) : row_bytes(p.dtype, p.R);
}

int64_t unit_tiles(const Problem& p) {
  return ceil_div(p.H, kUnitTile);
}

Plan with_tiles(PlanKind kind, const Problem& p, bool backward, int64_t tile_rows, int64_t tiles,
                int64_t ctas, int64_t groups) {
  Plan plan{};
  plan.kind = kind;
  plan.backward = backward;
  plan.tf32 = facts(arithmetic_of(p.dtype, p.tf32)).tf32;
  plan.tile_rows = static_cast<int>(tile_rows);
  plan.unit_tiles = static_cast<int>(tiles);
  plan.unit_ctas = static_cast<int>(ctas);
  plan.row_groups = static_cast<int>(groups);
  plan.threads = static_cast<int>(32 * split_k(kind) * tiles);
  const bool tensor_cores = facts(arithmetic_of(p.dtype, p.tf32)).tensor_cores;
  plan.shared_bytes = shared_bytes(kind, p.dtype, tensor_cores, backward ? 1 : p.gates,
                                   plan.unit_tiles, plan.tile_rows, k_bytes(p, backward));
  return plan;
}

// A persistent kernel counts rows in int: of all steps, and of two states of both directions.
bool supports_persistence(const Problem& p) {
  const bool countable = std::max<int64_t>(p.T, 4) * p.N * p.D <= INT32_MAX;
  return !p.projection && countable && facts(arithmetic_of(p.dtype, p.tf32)).persistent;
}

// As many row groups as there are SMs for, and the smallest tile with which each group then has one
// tile, so that a barrier waits for fewer rows.
std::optional<Plan> plan_grid(const Problem& p, const Device& device, bool backward) {
  const int64_t ctas = unit_tiles(p);
  const int64_t max_groups = device.sms / (ctas * p.D);
  if (!supports_persistence(p) || max_groups == 0) return std::nullopt;
  std::optional<Plan> best;
  for (const int64_t rows : {8, 16, 32}) {
    const int64_t tiles = std::max<int64_t>(1, ceil_div(p.N, rows));
    const Plan plan =
        with_tiles(PlanKind::kGrid, p, backward, rows, 1, ctas, std::min(max_groups, tiles));
    if (plan.shared_bytes > device.shared_bytes) break;
    best = plan;
    if (tiles <= max_groups) break;
  }
  return best;
}

// How many clusters of `ctas` CTAs are active at once.
int64_t active_clusters(const Device& device, int64_t ctas) {
  return int64_t{device.clusters} * device.cluster_ctas / ctas;
}

// The largest cluster that reduces the unit tiles of a CTA: more SMs work on a tile of the batch.
// Sizes are powers of two, so some CTAs may have no units, but fewer than half of them.
std::optional<Plan> plan_cluster(const Problem& p, const Device& device, bool backward) {
  if (!supports_persistence(p) || !has_clusters(device.major)) return std::nullopt;
  for (int64_t size = device.cluster_ctas; size >= 2; size /= 2) {
    const int64_t tiles = ceil_div(unit_tiles(p), size);
    if (tiles > kMaxUnitTiles || ceil_div(unit_tiles(p), size / 2) == tiles) continue;
    std::optional<Plan> best;
    for (const int64_t rows : {8, 16}) {
      const int64_t clusters = std::max<int64_t>(1, ceil_div(p.N, rows));
      if (clusters > kMaxGridY) continue;
      const Plan plan = with_tiles(PlanKind::kCluster, p, backward, rows, tiles, size, clusters);
      if (plan.shared_bytes > device.shared_bytes) break;
      best = plan;
      if (clusters * p.D <= active_clusters(device, size)) break;
    }
    if (best) return best;
  }
  return std::nullopt;
}

Plan plan_step(const Problem& p, bool backward) {
  const int64_t groups = std::clamp<int64_t>(ceil_div(p.N, kStepRows), 1, kMaxGridY);
  return with_tiles(PlanKind::kStep, p, backward, kStepRows, 1, unit_tiles(p), groups);
}

Plan plan_gemm(const Problem& p, bool backward) {
  Plan plan = plan_step(p, backward);
  plan.kind = PlanKind::kGemm;
  plan.tile_rows = kPointwiseRows;
  plan.unit_tiles = kPointwiseUnits / kUnitTile;
  plan.unit_ctas = static_cast<int>(ceil_div(p.H, kPointwiseUnits));
  plan.row_groups =
      static_cast<int>(std::clamp<int64_t>(ceil_div(p.N, kPointwiseRows), 1, kMaxGridY));
  plan.threads = kPointwiseUnits * kPointwiseRows;
  plan.shared_bytes = 0;
  if (!p.normalizes) return plan;
  plan.threads = static_cast<int>(std::clamp<int64_t>(round_up(p.H, 32), 32, kMaxRowThreads));
  plan.tile_rows = 1;
  plan.unit_tiles = plan.threads / kUnitTile;
  plan.unit_ctas = 1;
  plan.row_groups = static_cast<int>(std::clamp<int64_t>(p.N, 1, kMaxGridY));
  plan.shared_bytes = row_shared_bytes(plan.threads);
  return plan;
}

bool is_profitable(const Plan& plan, const Problem& p, const Device& device) {
  if (p.T <= kMaxStreamedSteps) return false;
  if (plan.kind == PlanKind::kCluster)
    return plan.row_groups * p.D <= kMaxWaves * active_clusters(device, plan.unit_ctas);
  return ceil_div(ceil_div(p.N, plan.tile_rows), plan.row_groups) <= kMaxTilesPerGroup;
}

}  // namespace

int64_t row_bytes(DType dtype, int64_t values) {
  return round_up(values * storage_bytes(dtype), kSliceBytes);
}

int64_t shared_bytes(PlanKind kind, DType dtype, bool tensor_cores, int gates, int unit_tiles,
                     int tile_rows, int64_t k_bytes) {
  const bool streamed = kind == PlanKind::kStep;  // A
  const int64_t split = split_k(kind), a_rows = int64_t{unit_tiles} * gates * kUnitTile;
  const int64_t partials =
      split * unit_tiles * gates * tile_rows * kPartialStride * compute_bytes(dtype);
  const int64_t resident =
      resident_slices(kind, tensor_cores, gates, tile_rows, unit_tiles) * split * kSliceBytes;
  const int64_t a = a_rows * (std::max<int64_t>(0, k_bytes - resident) + kPadBytes);
  if (kind == PlanKind::kCluster)
    return a + 2 * tile_rows * (k_bytes + kPadBytes) + partials + 2 * kMbarrierBytes;
  const int64_t chunk = streamed ? kStepChunk : grid_chunk(tensor_cores, tile_rows);
  const int64_t stages = kStages * (tile_rows + (streamed ? a_rows : 0)) * (chunk + kPadBytes);
  return (streamed ? 0 : a) + std::max(stages, partials);
}

bool supported(const Device& device) {
  return device.major >= kArchitectures[0].device.major;
}

std::optional<Plan> plan_as(PlanKind kind, const Problem& p, const Device& device, bool backward) {
  if (p.described && kind != PlanKind::kGemm) return std::nullopt;
  if (kind == PlanKind::kCluster) return plan_cluster(p, device, backward);
  if (kind == PlanKind::kGrid) return plan_grid(p, device, backward);
  return kind == PlanKind::kGemm ? plan_gemm(p, backward) : plan_step(p, backward);
}

Plan forced_plan(PlanKind kind, const Problem& p, const Device& device, bool backward) {
  if (const std::optional<Plan> plan = plan_as(kind, p, device, backward)) return *plan;
  return p.described ? plan_gemm(p, backward) : plan_step(p, backward);
}

Plan make_plan(const Problem& p, const Device& device, bool backward, bool stepwise) {
  if (p.described) return plan_gemm(p, backward);
  if (!stepwise)
    for (const PlanKind kind : {PlanKind::kCluster, PlanKind::kGrid})
      if (const std::optional<Plan> plan = plan_as(kind, p, device, backward))
        if (is_profitable(*plan, p, device)) return *plan;
  const int64_t weights = p.gates * p.H * p.R * storage_bytes(p.dtype);
  const bool large = (ceil_div(p.N, kStepRows) - 1) * weights > kMaxReloadedBytes;
  return large ? plan_gemm(p, backward) : plan_step(p, backward);
}

// docs/cuda.md has the predictions: nothing was measured. To be replaced by thresholds from data.
const char* cudnn_reason(const Plan& plan, const Problem& p) {
  if (p.described || !is_stepwise(plan.kind)) return nullptr;
  return plan.kind == PlanKind::kGemm
             ? "the gemm plan, with two launches a step, is not predicted to be faster"
             : "the step plan, with a launch for each step, is not predicted to be faster";
}

const char* name(PlanKind kind) {
  constexpr const char* names[kPlanKinds] = {"step", "grid", "cluster", "gemm"};
  return names[static_cast<int>(kind)];
}

}  // namespace lstm_fused::cuda
