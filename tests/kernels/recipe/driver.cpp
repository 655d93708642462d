// Runs the cell `leaky` through the persistent and the direct kernel and prints the largest
// difference of y from plain loops. KERNELS: the function of the first ISA.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu/kernels.h"

using namespace lstm_fused;

namespace {

std::vector<float> drawn(int64_t count) {
  std::vector<float> values(count);
  for (float& v : values) v = static_cast<float>(std::rand()) / RAND_MAX - 0.5f;
  return values;
}

float largest_error(int64_t T, int64_t N, int64_t I, int64_t H) {
  const std::vector<float> x = drawn(T * N * I), w_ih = drawn(H * I), w_hh = drawn(H * H);
  std::vector<float> y(T * N * H), h_n(N * H), c_n(N * H);
  ForwardParams p{};
  p.size = {{T, N, nullptr, nullptr}, I, H, H, H, 1, 1};
  p.x = {x.data(), N * I, I};
  p.weights[0] = {w_ih.data(), w_hh.data(), nullptr, nullptr, nullptr};
  p.y = y.data();
  p.h_n = h_n.data();
  p.c_n = c_n.data();
  const Problem problem{CellKind::kLeaky, DType::kFloat32, T, N, I, H, H, 1, false, false};
  const Plan plan = plan_forward(problem, {static_cast<Isa>(0), 1});
  const Kernel& kernel = *KERNELS(problem.cell, problem.dtype);
  p.scratch = std::aligned_alloc(64, round_up(kernel.forward_scratch(p, plan), 64));
  if (!kernel.forward(p, plan)) return INFINITY;
  std::free(p.scratch);
  std::vector<double> h(N * H, 0.0);
  float error = 0;
  for (int64_t t = 0; t < T; ++t) {
    const std::vector<double> before = h;
    for (int64_t n = 0; n < N; ++n)
      for (int64_t u = 0; u < H; ++u) {
        double preact = 0;
        for (int64_t i = 0; i < I; ++i) preact += x[(t * N + n) * I + i] * w_ih[u * I + i];
        for (int64_t i = 0; i < H; ++i) preact += before[n * H + i] * w_hh[u * H + i];
        h[n * H + u] = (before[n * H + u] + std::tanh(preact)) / 2;
        error =
            std::max(error, std::fabs(static_cast<float>(h[n * H + u] - y[(t * N + n) * H + u])));
      }
  }
  return error;
}

}  // namespace

int main() {
  std::printf("%g %g\n", largest_error(9, 5, 7, 19), largest_error(1, 2, 7, 19));
}
