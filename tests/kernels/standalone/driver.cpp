// Runs problems through the kernels without Python and torch, so that it can be cross-compiled:
//   driver <isa> <problems> <results>
// problems.py writes the one file and reads the other; their layout is `solve` below. Numbers in
// headers are int64.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "../../../csrc/cpu/launch.h"
#include "../../../csrc/cpu/system.h"
#include "backward.h"

using namespace lstm_fused;

namespace {

struct Header {
  int64_t cell, dtype, T, N, I, H, P, D;  // P: projection size or 0
  int64_t bias, state, packed;
  int64_t threads, row_groups, unit_groups;  // threads 0: planned
  int64_t format;                            // WeightFormat; but for plain weights forward alone
};

class Problems {
 public:
  Problems(const char* in, const char* out)
      : in_(std::fopen(in, "rb")), out_(std::fopen(out, "wb")) {
    if (!in_ || !out_) throw std::runtime_error("cannot open a file");
  }
  ~Problems() {
    std::fclose(in_);
    std::fclose(out_);
  }

  // False: there is no further problem.
  bool next(Header& header) {
    memory_.clear();
    results_.clear();
    return std::fread(&header, sizeof(header), 1, in_) == 1;
  }
  // Of the file, in this order.
  void* given(int64_t bytes) {
    void* p = take(bytes);
    if (std::fread(p, 1, bytes, in_) != static_cast<size_t>(bytes))
      throw std::runtime_error("the file of problems is cut off");
    return p;
  }
  // NaN until a kernel writes it; goes to the file of results if it is one.
  void* wanted(int64_t bytes, bool result = true) {
    void* p = take(bytes);
    std::memset(p, 0xff, bytes);
    if (result) results_.push_back({p, bytes});
    return p;
  }
  void write_results(Isa forward, Isa backward) {
    char names[2][16] = {};
    std::snprintf(names[0], sizeof(names[0]), "%s", name(forward));
    std::snprintf(names[1], sizeof(names[1]), "%s", name(backward));
    put(names, sizeof(names));
    for (const Result& r : results_) put(r.data, r.bytes);
  }

 private:
  struct Result {
    const void* data;
    int64_t bytes;
  };

  void* take(int64_t bytes) {
    memory_.emplace_back(allocate_aligned(64, round_up(bytes + 1, 64), false), &free_aligned);
    return memory_.back().get();
  }
  void put(const void* data, int64_t bytes) {
    if (std::fwrite(data, 1, bytes, out_) != static_cast<size_t>(bytes))
      throw std::runtime_error("cannot write the results");
  }

  std::FILE *in_, *out_;
  std::vector<std::unique_ptr<void, void (*)(void*)>> memory_;
  std::vector<Result> results_;
};

// The pass by its plan, or with the partition of the header; returns the ISA of the code that ran.
template <class Params, class Call, class Bytes>
Isa run(const Header& h, const Problem& problem, Params& params, Plan plan, Bytes bytes, Call call,
        Problems& file) {
  if (h.threads == 0) {
    launch(problem, params);
    return last_run().plan->isa;
  }
  plan.threads = static_cast<int>(h.threads);
  plan.row_groups = static_cast<int>(h.row_groups);
  plan.unit_groups = static_cast<int>(h.unit_groups);
  plan.direction_groups = plan.threads / (plan.row_groups * plan.unit_groups);
  const Kernel& kernel = kernel_for(plan.isa, problem.cell, problem.dtype);
  params.scratch = file.wanted((kernel.*bytes)(params, plan), false);
  if (!(kernel.*call)(params, plan)) throw std::runtime_error("OpenMP granted fewer threads");
  return plan.isa;
}

// A matrix of weights (gates * rows, K), or its panels and their scales.
void read_weights(const Header& h, int64_t gates, int64_t rows, int64_t K, const void*& weights,
                  const void*& scales, Problems& file) {
  const int64_t units = gates * ceil_div(rows, kBlock) * kBlock;
  switch (static_cast<WeightFormat>(h.format)) {
    case WeightFormat::kPlain:
      weights = file.given(gates * rows * K * storage_bytes(static_cast<DType>(h.dtype)));
      break;
    case WeightFormat::kInt8:
      weights = file.given(units * round_up(K, 4));
      scales = file.given(units * ceil_div(K, kQuantizationGroup) * 2);
      break;
    case WeightFormat::kBFloat16: weights = file.given(units * round_up(K, 2) * 2);
  }
}

void solve(const Header& h, Isa isa, Problems& file) {
  const CellKind cell = static_cast<CellKind>(h.cell);
  const DType dtype = static_cast<DType>(h.dtype);
  const CellInfo& cell_info = info(cell);
  const int64_t G = cell_info.gates, T = h.T, N = h.N, I = h.I, H = h.H, D = h.D;
  const int64_t R = h.P ? h.P : H, b = storage_bytes(dtype), wide = compute_bytes(dtype);
  const bool has_c = cell_info.cells > 0;

  std::vector<int64_t> offsets{0};
  const int64_t* sizes =
      h.packed ? static_cast<int64_t*>(file.given(T * sizeof(int64_t))) : nullptr;
  for (int64_t t = 0; t < T; ++t) offsets.push_back(offsets.back() + (sizes ? sizes[t] : N));
  const int64_t S = offsets.back();

  ForwardParams f{};
  f.size = {{T, N, sizes, sizes ? offsets.data() : nullptr},
            I,
            H,
            R,
            R,
            static_cast<int>(D),
            cell_info.cells};
  f.x = {file.given(S * I * b), N * I, I};
  if (h.state) f.h0 = file.given(D * N * R * b);
  if (h.state && has_c) f.c0 = file.given(D * N * H * b);
  for (int64_t d = 0; d < D; ++d) {
    Weights& w = f.weights[d];
    read_weights(h, G, H, I, w.w_ih, w.s_ih, file);
    read_weights(h, G, H, R, w.w_hh, w.s_hh, file);
    if (h.bias) w.b_ih = file.given(G * H * b);
    if (h.bias) w.b_hh = file.given(G * H * b);
    if (h.P) read_weights(h, 1, R, H, w.w_hr, w.s_hr, file);
  }
  f.y = file.wanted(S * D * R * b);
  f.h_n = file.wanted(D * N * R * b);
  if (has_c) f.c_n = file.wanted(D * N * H * b);
  Layer layer{};
  layer.cell = cell;
  layer.dtype = dtype;
  layer.size = f.size;
  layer.projection = h.P > 0;
  layer.format = static_cast<WeightFormat>(h.format);
  const bool training = layer.format == WeightFormat::kPlain;
  const Problem problem = problem_of(layer, training);
  const Machine machine{isa, 1};
  const auto run_forward = [&] {
    return run(h, problem, f, plan_forward(problem, machine), &Kernel::forward_scratch,
               &Kernel::forward, file);
  };
  if (!training) {
    const Isa forward = run_forward();
    return file.write_results(forward, forward);
  }
  const int64_t units = f.size.blocks() * kBlock;
  f.gates = file.wanted(D * S * cell_info.preacts * units * wide, false);
  if (cell_info.carried() > 0) f.saved_states = file.wanted(D * S * units * wide, false);

  BackwardParams g = backward_of(f);
  g.dy = file.given(S * D * R * b);
  g.dh_n = file.given(D * N * R * b);
  if (has_c) g.dc_n = file.given(D * N * H * b);
  g.dx = file.wanted(S * I * b);
  for (int64_t d = 0; d < D; ++d) {
    WeightGradients& w = g.dweights[d];
    w.w_ih = file.wanted(G * H * I * b);
    w.w_hh = file.wanted(G * H * R * b);
    if (h.bias) w.b_ih = file.wanted(G * H * b);
    if (h.bias) w.b_hh = file.wanted(G * H * b);
    if (h.P) w.w_hr = file.wanted(R * H * b);
  }
  if (h.state) g.dh0 = file.wanted(D * N * R * b);
  if (h.state && has_c) g.dc0 = file.wanted(D * N * H * b);

  const Isa forward = run_forward();
  const Isa backward = run(h, problem, g, plan_backward(problem, machine),
                           &Kernel::backward_scratch, &Kernel::backward, file);
  file.write_results(forward, backward);
}

}  // namespace

int main(int count, char** arguments) {
  try {
    if (count != 4) throw std::runtime_error("usage: driver <isa> <problems> <results>");
    force_isa(arguments[1]);
    Problems file(arguments[2], arguments[3]);
    int solved = 0;
    for (Header header; file.next(header); ++solved) solve(header, current_isa(), file);
    std::printf("%d problems by %s\n", solved, name(current_isa()));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "driver: %s\n", error.what());
    return 1;
  }
}
