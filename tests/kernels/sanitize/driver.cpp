// Runs every kernel that this machine can run, on buffers of exactly the size that each needs,
// under the address and undefined-behaviour sanitizers. Outputs start as NaN and must end finite.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "../../../csrc/cpu/checkpoints.h"
#include "../standalone/backward.h"

using namespace lstm_fused;

namespace {

struct Case {
  int64_t T, N, I, H, P;  // P: projection size or 0
  int D;
  bool bias, state, packed;
  // Packed rows as documents, in the reverse order; resets with states of their own, and the cell
  // states of all steps; a checkpoint every so many steps, or 0.
  bool documents, resets;
  int64_t every;
};

// Exact-size allocations, so that one element too far is an error.
class Buffers {
 public:
  explicit Buffers(DType dtype) : dtype_(dtype) {}

  void* random(int64_t count) {
    void* p = take(count * size(dtype_));
    for (int64_t i = 0; i < count; ++i) put(p, i, next());
    return p;
  }
  void* filled(int64_t count, double value) {
    void* p = take(count * size(dtype_));
    for (int64_t i = 0; i < count; ++i) put(p, i, value);
    return p;
  }
  void* nan(int64_t count, bool compute = false) {
    const int64_t bytes = count * (compute ? (dtype_ == DType::kFloat64 ? 8 : 4) : size(dtype_));
    void* p = take(bytes);
    std::memset(p, 0xff, bytes);
    return p;
  }
  void* scratch(int64_t bytes) {
    aligned_.emplace_back(std::aligned_alloc(64, round_up(bytes, 64)), &std::free);
    std::memset(aligned_.back().get(), 0xff, bytes);
    return aligned_.back().get();
  }
  bool finite(const void* p, int64_t count) const {
    for (int64_t i = 0; i < count; ++i)
      if (!std::isfinite(get(p, i))) return false;
    return true;
  }

 private:
  static int64_t size(DType dtype) {
    return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
  }
  void* take(int64_t bytes) {
    owned_.emplace_back(new char[bytes]);
    return owned_.back().get();
  }
  // Small values whose 16-bit forms are easy: multiples of 1/8 within (-1, 1).
  float next() {
    state_ = state_ * 1664525u + 1013904223u;
    return static_cast<float>(static_cast<int>(state_ >> 28) - 8) / 8;
  }
  void put(void* p, int64_t i, float v) const {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    if (dtype_ == DType::kFloat64) static_cast<double*>(p)[i] = v;
    if (dtype_ == DType::kFloat32) static_cast<float*>(p)[i] = v;
    if (dtype_ == DType::kBFloat16) static_cast<uint16_t*>(p)[i] = bits >> 16;
    if (dtype_ == DType::kFloat16) {
      const uint32_t magnitude = bits & 0x7fffffff;
      const uint32_t half = magnitude ? (magnitude >> 13) - (112u << 10) : 0;
      static_cast<uint16_t*>(p)[i] = static_cast<uint16_t>(half | (bits >> 16 & 0x8000));
    }
  }
  double get(const void* p, int64_t i) const {
    if (dtype_ == DType::kFloat64) return static_cast<const double*>(p)[i];
    if (dtype_ == DType::kFloat32) return static_cast<const float*>(p)[i];
    const uint16_t h = static_cast<const uint16_t*>(p)[i];
    const int exponent = dtype_ == DType::kBFloat16 ? 0x7f80 : 0x7c00;
    return (h & exponent) == exponent ? NAN : 0;
  }

  DType dtype_;
  uint32_t state_ = 1;
  std::vector<std::unique_ptr<char[]>> owned_;
  std::vector<std::unique_ptr<void, void (*)(void*)>> aligned_;
};

// The forward pass of f again, with weights of another format.
bool run_quantized(const Case& c, CellKind cell, Isa isa, int threads, const ForwardParams& f,
                   WeightFormat format) {
  Buffers b(DType::kFloat32), weights(DType::kBFloat16);
  const LayerSizes& s = f.size;
  ForwardParams q = f;
  q.gates = q.saved_states = nullptr;
  const auto panels = [&](int64_t gates, int64_t rows, int64_t K, const void*& w,
                          const void*& scales) {
    const int64_t units = gates * ceil_div(rows, kBlock) * kBlock;
    const bool int8 = format == WeightFormat::kInt8;
    w = weights.random(int8 ? units * round_up(K, 4) / 2 : units * round_up(K, 2));
    scales = int8 ? weights.random(units * ceil_div(K, kQuantizationGroup)) : nullptr;
  };
  for (int d = 0; d < c.D; ++d) {
    Weights& w = q.weights[d];
    panels(info(cell).gates, s.H, s.I, w.w_ih, w.s_ih);
    panels(info(cell).gates, s.H, s.R, w.w_hh, w.s_hh);
    if (c.P) panels(1, s.R, s.H, w.w_hr, w.s_hr);
  }
  const int64_t y_size = s.steps.rows() * s.y_width();
  q.y = b.nan(y_size);
  q.h_n = b.nan(c.D * c.N * s.R);
  if (q.c_n) q.c_n = b.nan(c.D * c.N * s.H);
  Problem problem{cell, DType::kFloat32, c.T, c.N, c.I, c.H, s.R, c.D, c.P > 0, false};
  problem.format = format;
  const Plan plan = plan_forward(problem, {isa, threads});
  const Kernel& kernel = kernel_for(plan.isa, cell, DType::kFloat32);
  q.scratch = b.scratch(kernel.forward_scratch(q, plan));
  return kernel.forward(q, plan) && b.finite(q.y, y_size) && b.finite(q.h_n, c.D * c.N * s.R) &&
         (!q.c_n || b.finite(q.c_n, c.D * c.N * s.H));
}

bool run(const Case& c, CellKind cell, Isa isa, DType dtype, int threads) {
  const CellInfo& known = info(cell);
  const int64_t G = known.gates, C = known.cells * c.H;
  const bool has_c = C > 0;
  Buffers b(dtype);
  const int64_t R = c.P ? c.P : c.H;
  std::vector<int64_t> sizes, offsets{0};
  for (int64_t t = 0; t < c.T; ++t) {
    sizes.push_back(c.packed ? std::max<int64_t>(1, c.N - t / 2) : c.N);
    offsets.push_back(offsets.back() + sizes.back());
  }
  const int64_t S = offsets.back();
  std::vector<int64_t> starts(c.N), places(c.N), bounds{0};
  for (int64_t i = 0; i < c.N; ++i) {
    const int64_t n = c.N - 1 - i;  // documents begin with the shortest row
    places[n] = i;
    starts[n] = bounds.back();
    bounds.push_back(bounds.back());
    for (const int64_t rows : sizes) bounds.back() += rows > n;
  }
  std::vector<uint8_t> flags(S);
  for (int64_t s = 0; s < S; ++s) flags[s] = s % 3 == 0 || s % 5 == 1;
  ForwardParams f{};
  f.size = {{c.T, c.N, c.packed ? sizes.data() : nullptr, c.packed ? offsets.data() : nullptr},
            c.I,
            c.H,
            R,
            R,
            c.D,
            known.cells};
  if (c.documents) {
    f.size.steps.starts = starts.data();
    f.size.steps.places = f.size.steps.ranks = places.data();  // a reversal is its own inverse
    f.size.steps.bounds = bounds.data();
  }
  if (c.resets) f.size.steps.resets = flags.data();
  f.size.reset_states = c.resets && c.state;
  f.size.cell_states = c.resets && has_c;
  const int64_t initial = c.D * f.size.state_rows(), y_size = S * f.size.y_width();
  f.x = {b.random(S * c.I), c.N * c.I, c.I};
  if (c.state) {
    f.h0 = b.random(initial * R);
    // An sLSTM divides by one of its states.
    if (has_c) f.c0 = known.described ? b.filled(initial * C, 0.5) : b.random(initial * C);
  }
  for (int d = 0; d < c.D; ++d) {
    f.weights[d] = {b.random(G * c.H * c.I), b.random(G * c.H * R),
                    c.bias ? b.random(G * c.H) : nullptr, c.bias ? b.random(G * c.H) : nullptr,
                    c.P ? b.random(R * c.H) : nullptr};
    if (known.vectors) f.weights[d].vectors = b.filled(known.vectors * c.H, 0.5);
    if (known.masks) f.weights[d].masks = b.filled(S * known.masks * c.H, 0.5);
  }
  const int64_t units = f.size.blocks() * kBlock;
  f.y = b.nan(y_size);
  f.h_n = b.nan(c.D * c.N * R);
  if (has_c) f.c_n = b.nan(c.D * c.N * C);
  if (c.every) {
    const int64_t width = f.size.checkpoint_width();
    f.checkpoints = b.nan((ceil_div(c.T, c.every) - 1) * c.D * c.N * width, true);
    f.checkpoint_every = c.every;
  } else {
    f.gates = b.nan(c.D * S * info(cell).preacts * units, true);
    if (known.saved()) f.saved_states = b.nan(c.D * S * units * known.saved(), true);
  }
  const Problem problem{cell, dtype, c.T, c.N, c.I, c.H, R, c.D, c.P > 0, true};
  const Plan forward = plan_forward(problem, {isa, threads});
  const Kernel& kernel = kernel_for(forward.isa, cell, dtype);
  f.unit = kernel.unit;
  f.scratch = b.scratch(kernel.forward_scratch(f, forward));
  if (!kernel.forward(f, forward)) return false;
  if (!b.finite(f.y, y_size) || !b.finite(f.h_n, c.D * c.N * R) ||
      (has_c && !b.finite(f.c_n, c.D * c.N * C)))
    return false;

  if (dtype == DType::kFloat32 && !c.every && !known.described)
    for (const WeightFormat format : {WeightFormat::kInt8, WeightFormat::kBFloat16})
      if (!run_quantized(c, cell, isa, threads, f, format)) return false;

  BackwardParams g = backward_of(f);
  for (int d = 0; d < c.D; ++d)
    g.dweights[d] = {b.nan(G * c.H * c.I),
                     b.nan(G * c.H * R),
                     c.bias ? b.nan(G * c.H) : nullptr,
                     c.bias ? b.nan(G * c.H) : nullptr,
                     c.P ? b.nan(R * c.H) : nullptr,
                     known.vectors ? b.nan(known.vectors * c.H) : nullptr};
  g.dy = b.random(y_size);
  if (c.state) {
    g.dh_n = b.random(c.D * c.N * R);
    g.dh0 = b.nan(initial * R);
    if (has_c) {
      g.dc_n = b.random(c.D * c.N * C);
      g.dc0 = b.nan(initial * C);
    }
  }
  g.dx = b.nan(S * c.I);
  const Plan backward = plan_backward(problem, {isa, threads});
  const Kernel& back = kernel_for(backward.isa, cell, dtype);
  if (c.every) {
    Scratch scratch;
    if (!backward_from_checkpoints(problem, forward, backward, g, scratch)) return false;
  } else {
    g.unit = back.unit;
    g.scratch = b.scratch(back.backward_scratch(g, backward));
    if (!back.backward(g, backward)) return false;
  }
  bool good = b.finite(g.dx, S * c.I);
  if (c.state) good = good && b.finite(g.dh0, initial * R);
  if (g.dc0) good = good && b.finite(g.dc0, initial * C);
  for (int d = 0; d < c.D; ++d) {
    const WeightGradients& w = g.dweights[d];
    good = good && b.finite(w.w_ih, G * c.H * c.I) && b.finite(w.w_hh, G * c.H * R);
    if (c.bias) good = good && b.finite(w.b_ih, G * c.H) && b.finite(w.b_hh, G * c.H);
    if (c.P) good = good && b.finite(w.w_hr, R * c.H);
    if (w.vectors) good = good && b.finite(w.vectors, known.vectors * c.H);
  }
  return good;
}

// Every case of one cell, ISA and dtype; returns how many failed and adds to ran.
int run_all(CellKind cell, Isa isa, DType dtype, int& ran) {
  const Case cases[] = {
      {1, 1, 1, 1, 0, 1, true, true, false},
      {2, 3, 7, 17, 0, 2, true, false, false},
      {5, 7, 16, 33, 0, 2, true, true, true},
      {6, 9, 17, 37, 5, 2, true, true, true},
      {4, 33, 10, 100, 33, 1, false, true, false},
      {9, 5, 3, 64, 0, 1, false, false, true},
      {3, 20, 31, 16, 16, 2, true, false, false},
      {7, 6, 9, 35, 11, 2, true, true, true, true, true},
      {6, 5, 7, 19, 3, 2, true, true, false, false, true, 2},
      {3, 2, 5, 17, 0, 1, false, true, true, false, true},
  };
  int failed = 0;
  for (Case c : cases)
    for (const int threads : {1, 2, 5}) {
      // Such a cell has no projection.
      if (info(cell).cells == 0 || info(cell).keeps_hidden) c.P = 0;
      ++ran;
      if (run(c, cell, isa, dtype, threads)) continue;
      ++failed;
      std::printf("not finite: %s %s %s T%ld N%ld I%ld H%ld P%ld D%d%s%s, every %ld, %d threads\n",
                  info(cell).name, name(isa), name(dtype), c.T, c.N, c.I, c.H, c.P, c.D,
                  c.documents ? ", documents" : "", c.resets ? ", resets" : "", c.every, threads);
    }
  return failed;
}

}  // namespace

int main() {
  int ran = 0, failed = 0;
  for (int isa = 0; isa < kIsaCount; ++isa) {
    if (!runs(static_cast<Isa>(isa))) continue;
    for (int cell = 0; cell < kCellCount; ++cell)
      for (int dtype = 0; dtype < kDTypeCount; ++dtype) {
        // Described cells share their kernels: each runs in one dtype.
        if (kCells[cell].described && cell % kDTypeCount != dtype) continue;
        failed += run_all(static_cast<CellKind>(cell), static_cast<Isa>(isa),
                          static_cast<DType>(dtype), ran);
      }
  }
  std::printf("%d runs, %d failed\n", ran, failed);
  return failed != 0;
}
