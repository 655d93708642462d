// Runs every plan forward and backward, for every cell of torch.nn, under the thread sanitizer, and
// compares the results with a plain loop over time; and the sums of rows that are normalized.
// Arguments: the plans to run, or "sums"; all without any.
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "cuda/launch.h"
#include "cuda/normalized.h"
#include "device.h"
#include "memory.h"
// After cuda/launch.h, which declares the functions that cells call.
#include "cells/gru.h"
#include "cells/rnn.h"

using namespace lstm_fused;
namespace gpu = lstm_fused::cuda;

namespace {

// All that kernels access is between guard pages.
template <class T>
using Guarded = std::vector<T, gpu::GuardedAllocator<T>>;
using Floats = Guarded<float>;

struct Case {
  int64_t T, N, H;
  int D;
  bool state, packed;
  bool resets;  // also a reset state where there is an initial one, and all cell states
};

uint32_t state = 1;
float next() {
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(static_cast<int>(state >> 20) - 2048) / 2048;
}
Floats random(int64_t count, float scale = 1) {
  Floats v(count);
  for (float& x : v) x = next() * scale;
  return v;
}

// One layer's data, forward and backward; (S, D, ...) and (D, N, H) as params.h has them. Initial
// states and their gradients have state_rows rows, y and dy y_width columns.
template <class Cell>
struct Layer {
  static constexpr int G = Cell::kGates, preacts = Cell::kPreacts;
  Case c;
  int64_t S = 0, state_rows, y_width;
  Guarded<int64_t> sizes, offsets{0};
  Guarded<uint8_t> resets;
  Floats pre, b_ih[2], b_hh[2], w[2], h0, c0, dy, dh_n, dc_n;
  Floats y, h_n, c_n, gates, saved_states, d_gates, dh0, dc0;

  explicit Layer(const Case& given) : c(given) {
    for (int64_t t = 0; t < c.T; ++t) {
      sizes.push_back(c.packed ? std::max<int64_t>(1, c.N - 3 * t) : c.N);
      offsets.push_back(offsets.back() + sizes.back());
    }
    S = offsets.back();
    for (int64_t row = 0; c.resets && row < S; ++row) resets.push_back(next() > 0.3f);
    state_rows = c.resets && c.state ? 2 * c.N : c.N;
    y_width = c.D * c.H * (cell_states() ? 2 : 1);
    pre = random(S * c.D * G * c.H);
    for (int d = 0; d < c.D; ++d) {
      w[d] = random(G * c.H * c.H, 0.3f);
      b_ih[d] = random(G * c.H);
      b_hh[d] = random(G * c.H);
    }
    const int64_t states = c.D * c.N * c.H;
    h0 = random(c.D * state_rows * c.H);
    c0 = random(c.D * state_rows * c.H);
    dy = random(S * y_width);
    dh_n = random(states);
    dc_n = random(states);
    y.assign(S * y_width, NAN);
    h_n.assign(states, NAN);
    c_n = h_n;
    dh0.assign(c.D * state_rows * c.H, NAN);
    dc0 = dh0;
    gates.assign(S * c.D * preacts * c.H, NAN);
    saved_states.assign(S * c.D * c.H, NAN);
    d_gates = gates;
  }

  bool cell_states() const { return c.resets && Cell::kCarry == Carry::kCell; }
  // Whether step t of row n begins anew in direction d: before it in time, or after it.
  bool anew(int d, int64_t t, int64_t n) const {
    const int64_t later = d == 0 ? t : t + 1;
    return c.resets && later < c.T && n < sizes[later] && resets[offsets[later] + n];
  }
  // Element u of what row n begins with, of h0 or c0.
  float initial(const Floats& states, int d, int64_t n, int64_t u, bool reset) const {
    if (!c.state) return 0;
    return states[(d * state_rows + (reset ? c.N : 0) + n) * c.H + u];
  }

  Steps steps() const {
    return {c.T, c.N, c.packed ? sizes.data() : nullptr, c.packed ? offsets.data() : nullptr};
  }
  int64_t at(int64_t s, int d, bool backward, int64_t n) const {
    return (offset_of(s, d, backward) + n) * c.D + d;
  }
  int64_t offset_of(int64_t s, int d, bool backward) const {
    return gpu::rows_at(steps(), s, backward != (d == 1)).offset;
  }
};

bool close(float a, float b) {
  return std::fabs(a - b) <= 2e-4f * (1 + std::fabs(b));
}

// The pre-activations of a unit at one step, from h of the step before.
template <class Cell>
void compute_preacts(const Layer<Cell>& l, const Floats& h, int64_t row, int d, int64_t n,
                     int64_t u, float (&preacts)[Cell::kPreacts]) {
  constexpr int G = Cell::kGates, first = Cell::kPreacts - G;
  const int64_t H = l.c.H;
  for (float& s : preacts) s = 0;
  for (int j = 0; j < G; ++j) {
    const int in = Cell::input_gate(j), hidden = Cell::hidden_gate(j);
    preacts[j] += l.pre[(row * G + in) * H + u] + l.b_ih[d][in * H + u];
    preacts[first + j] += l.b_hh[d][hidden * H + u];
    for (int64_t k = 0; k < H; ++k)
      preacts[first + j] += l.w[d][(hidden * H + u) * H + k] * h[(d * l.c.N + n) * H + k];
  }
}

template <class Cell>
bool check_forward(const Layer<Cell>& l) {
  const Case& c = l.c;
  const Floats& start = Cell::kCarry == Carry::kCell ? l.c0 : l.h0;
  Floats h(l.h_n.size()), carried(h.size());
  const auto begin = [&](int d, int64_t n, bool reset) {
    for (int64_t u = 0; u < c.H; ++u) {
      h[(d * c.N + n) * c.H + u] = l.initial(l.h0, d, n, u, reset);
      carried[(d * c.N + n) * c.H + u] = l.initial(start, d, n, u, reset);
    }
  };
  for (int d = 0; d < c.D; ++d)
    for (int64_t n = 0; n < c.N; ++n) begin(d, n, false);
  bool good = true;
  for (int64_t s = 0; s < c.T; ++s)
    for (int d = 0; d < c.D; ++d) {
      const int64_t active = gpu::rows_at(l.steps(), s, d == 1).active;
      for (int64_t n = 0; n < active; ++n)
        if (l.anew(d, d == 0 ? s : c.T - 1 - s, n)) begin(d, n, true);
      const Floats h_prev = h;
      for (int64_t n = 0; n < active; ++n)
        for (int64_t u = 0; u < c.H; ++u) {
          const int64_t row = l.at(s, d, false, n), at = (d * c.N + n) * c.H + u;
          float preacts[Cell::kPreacts], cell = 0;
          compute_preacts(l, h_prev, row, d, n, u, preacts);
          h[at] = Cell::forward(preacts, carried[at], cell);
          carried[at] = cell;
          const float* y = &l.y[row / c.D * l.y_width + d * c.H + u];
          good = good && close(*y, h[at]);
          if (l.cell_states()) good = good && close(y[c.D * c.H], cell);
        }
    }
  for (size_t i = 0; i < h.size(); ++i) {
    good = good && close(l.h_n[i], h[i]);
    if (Cell::kCarry == Carry::kCell) good = good && close(l.c_n[i], carried[i]);
  }
  return good;
}

// Starts from what forward saved; check_forward has checked that by its outputs.
template <class Cell>
bool check_backward(const Layer<Cell>& l) {
  constexpr int G = Cell::kGates, kPreacts = Cell::kPreacts;
  const Case& c = l.c;
  const int64_t H = c.H;
  bool good = true;
  for (int d = 0; d < c.D; ++d)
    for (int64_t n = 0; n < c.N; ++n) {
      Floats dh(H), dc(H), dh_reset(H, 0.0f), dc_reset(H, 0.0f);
      for (int64_t u = 0; u < H; ++u) {
        dh[u] = l.dh_n[(d * c.N + n) * H + u];
        dc[u] = Cell::kCarry == Carry::kCell ? l.dc_n[(d * c.N + n) * H + u] : 0;
      }
      for (int64_t s = 0; s < c.T; ++s) {
        const gpu::StepRows rows = gpu::rows_at(l.steps(), s, d == 0);
        if (n >= rows.active) continue;
        const int64_t row = (rows.offset + n) * c.D + d;
        const bool anew = l.anew(d, d == 0 ? c.T - 1 - s : s, n);
        Floats through(H, 0.0f);
        for (int64_t u = 0; u < H; ++u) {
          float saved[kPreacts], d_sum[kPreacts], prev = 0, cell = 0;
          for (int j = 0; j < kPreacts; ++j) saved[j] = l.gates[(row * kPreacts + j) * H + u];
          if (Cell::kCarry != Carry::kNone) {
            const Floats& start = Cell::kCarry == Carry::kCell ? l.c0 : l.h0;
            cell = l.saved_states[row * H + u];
            if (n < rows.active_next && !anew)
              prev = l.saved_states[((rows.offset_next + n) * c.D + d) * H + u];
            else
              prev = l.initial(start, d, n, u, anew);
          }
          const float* dy = &l.dy[(rows.offset + n) * l.y_width + d * H + u];
          if (l.cell_states()) dc[u] += dy[c.D * H];
          Cell::backward(saved, prev, cell, dh[u] + *dy, dc[u], d_sum);
          for (int j = 0; j < kPreacts; ++j)
            good = good && close(l.d_gates[(row * kPreacts + j) * H + u], d_sum[j]);
          for (int j = 0; j < G; ++j)
            for (int64_t k = 0; k < H; ++k)
              through[k] +=
                  d_sum[kPreacts - G + j] * l.w[d][(Cell::hidden_gate(j) * H + u) * H + k];
        }
        dh = through;
        if (!anew) continue;
        for (int64_t u = 0; u < H; ++u) {
          dh_reset[u] += dh[u];
          dc_reset[u] += dc[u];
          dh[u] = dc[u] = 0;
        }
      }
      for (int64_t part = 0; part < l.state_rows / c.N; ++part)
        for (int64_t u = 0; u < H; ++u) {
          const int64_t at = (d * l.state_rows + part * c.N + n) * H + u;
          const float d_h = part ? dh_reset[u] : dh[u], d_c = part ? dc_reset[u] : dc[u];
          const float more = Cell::kCarry == Carry::kHidden ? d_c : 0;
          good = good && close(l.dh0[at], d_h + more);
          if (Cell::kCarry == Carry::kCell) good = good && close(l.dc0[at], d_c);
        }
    }
  return good;
}

// (G * H, H) in rows of `bytes` bytes, or transposed (H, G, ...) for backward.
template <class Cell>
Floats operand(const Layer<Cell>& l, int d, bool backward, int64_t bytes) {
  constexpr int G = Cell::kGates;
  const int64_t H = l.c.H, columns = bytes / 4, each = columns / G;
  Floats a((backward ? H : G * H) * columns, 0.0f);
  for (int g = 0; g < G; ++g)
    for (int64_t u = 0; u < H; ++u)
      for (int64_t k = 0; k < H; ++k)
        a[backward ? k * columns + g * each + u : (g * H + u) * columns + k] =
            l.w[d][(g * H + u) * H + k];
  return a;
}

// The products of the gemm plan, by a plain loop.
class LoopGemm final : public gpu::Gemm {
 public:
  const void* multiply(const gpu::Product& p, int gates, int64_t s, int d, int64_t rows) override {
    const int64_t columns = p.in.bytes / 4, height = gates * p.units;
    const float* a = reinterpret_cast<const float*>(p.a[d]);
    const float* b = reinterpret_cast<const float*>(p.in.at(s, d, 0));
    results_[d].assign(rows * height, 0.0f);
    for (int64_t i = 0; i < rows * height; ++i)
      for (int64_t k = 0; k < columns; ++k)
        results_[d][i] += b[i / height * columns + k] * a[i % height * columns + k];
    return results_[d].data();
  }

 private:
  Floats results_[2];
};

template <class Cell, class Math>
const char* run(Layer<Cell>& l, gpu::PlanKind kind, bool backward) {
  const Case& c = l.c;
  gpu::Device device{};
  gpu::read_device(0, device);
  const gpu::Problem problem{DType::kFloat32, c.T, c.N, c.H, c.H, c.D, Cell::kGates, false, false};
  const std::optional<gpu::Plan> plan = gpu::plan_as(kind, problem, device, backward);
  if (!plan) return "the plan does not fit";
  const int64_t bytes =
      gpu::row_bytes(DType::kFloat32, c.H) * (backward ? int64_t{Cell::kGates} : 1);
  const int64_t rows = round_up(c.N, plan->tile_rows);
  Floats exchange(2 * c.D * rows * bytes / 4, 0.0f), carry(c.D * c.N * c.H, NAN);
  Floats dh_reset(c.D * c.N * c.H, 0.0f), dc_reset = dh_reset;
  Guarded<char> barrier(c.D * plan->row_groups * gpu::kBarrierBytes, 0);
  Floats a[2];
  gpu::RecurrenceParams p{};
  if (!gpu::is_stepwise(kind)) p.steps = l.steps();
  p.s_end = c.T + backward;
  p.N = c.N;
  p.H = p.R = c.H;
  p.D = c.D;
  p.cell_states = l.cell_states();
  p.y_width = l.y_width;
  p.state_rows = l.state_rows;
  if (c.resets) p.resets = l.resets.data();
  const gpu::Exchange e{reinterpret_cast<char*>(exchange.data()), c.D * rows * bytes, rows, bytes};
  p.product = {{nullptr, nullptr}, c.H, e, e};
  for (int d = 0; d < c.D; ++d) {
    a[d] = operand(l, d, backward, bytes);
    p.product.a[d] = reinterpret_cast<const char*>(a[d].data());
    p.b_ih[d] = l.b_ih[d].data();
    p.b_hh[d] = l.b_hh[d].data();
  }
  p.barrier = barrier.data();
  p.pre = l.pre.data();
  p.gates = l.gates.data();
  p.saved_states = l.saved_states.data();
  p.h0 = c.state ? l.h0.data() : nullptr;
  p.c0 = c.state ? l.c0.data() : nullptr;
  p.y = l.y.data();
  p.h_n = l.h_n.data();
  p.c_n = l.c_n.data();
  p.carry = carry.data();
  p.dy = l.dy.data();
  p.dh_n = l.dh_n.data();
  p.dc_n = l.dc_n.data();
  p.d_gates = l.d_gates.data();
  p.dh0 = l.dh0.data();
  p.dc0 = l.dc0.data();
  if (l.state_rows > c.N) {
    p.dh_reset = dh_reset.data();
    p.dc_reset = dc_reset.data();
  }
  const Steps steps = l.steps();
  LoopGemm loop;
  return gpu::launch_plan<Cell, Math>(*plan, p, nullptr, steps, loop, nullptr);
}

template <class Cell>
bool passes(const Case& c, gpu::PlanKind kind) {
  Layer<Cell> l(c);
  const char* error = run<Cell, gpu::FusedMultiplyAdd<float>>(l, kind, false);
  bool good = !error && check_forward(l);
  if (!error) error = run<Cell, gpu::FusedMultiplyAdd<float>>(l, kind, true);
  good = good && !error && check_backward(l);
  if (!error) error = gpu::damage_of_allocations();
  good = good && !error;
  if (!good)
    std::printf("wrong: %s plan, %d gates, %d preacts, T%ld N%ld H%ld D%d%s%s%s: %s\n",
                gpu::name(kind), Cell::kGates, Cell::kPreacts, c.T, c.N, c.H, c.D,
                c.state ? " state" : "", c.packed ? " packed" : "", c.resets ? " resets" : "",
                error ? error : "numbers");
  return good;
}

struct SumsParams {
  float* out;  // (threads, 6), each (rounds,)
};
constexpr int kSums = gpu::kMaxRowSums, kRounds = 3;

LSTM_FUSED_KERNEL(gpu::kMaxRowThreads, 1) sums_kernel(const SumsParams p) {
  const int thread = gpu::thread_index();
  for (int round = 0; round < kRounds; ++round) {
    float values[kSums];
    for (int k = 0; k < kSums; ++k) values[k] = static_cast<float>((thread + round) * (k + 1));
    gpu::sum_over_row(values, [](int k, double sum) { return sum / (k + 1); });
    for (int k = 0; k < kSums; ++k) p.out[(thread * kSums + k) * kRounds + round] = values[k];
  }
}

// Every thread gets the sums of all threads, time after time.
bool sums_pass(int threads) {
  Floats out(threads * kSums * kRounds, NAN);
  gpu::ConfiguredDevices devices;
  const char* error = gpu::launch_kernel(
      sums_kernel, {dim3(1), threads, gpu::row_shared_bytes(threads), 0, false, nullptr},
      SumsParams{out.data()}, devices);
  bool good = !error;
  for (size_t i = 0; i < out.size(); ++i) {
    const int round = static_cast<int>(i % kRounds);
    good = good && out[i] == static_cast<float>(threads * (threads - 1) / 2 + threads * round);
  }
  if (!good) std::printf("wrong: sums of %d threads: %s\n", threads, error ? error : "numbers");
  return good;
}

}  // namespace

int main(int count, char** arguments) {
  const Case cases[] = {{4, 11, 40, 2, true, true, true},
                        {3, 9, 36, 1, false, false, false},
                        {4, 9, 20, 2, false, false, true}};
  int ran = 0, failed = 0;
  if (count == 1 || std::string(arguments[1]) == "sums")
    for (const int threads : {32, 96, 256}) {
      ++ran;
      failed += !sums_pass(threads);
    }
  for (int kind = 0; kind < gpu::kPlanKinds; ++kind) {
    const gpu::PlanKind k = static_cast<gpu::PlanKind>(kind);
    bool wanted = count == 1;
    for (int i = 1; i < count; ++i) wanted = wanted || std::string(gpu::name(k)) == arguments[i];
    if (!wanted) continue;
    for (const Case& c : cases) {
      ran += 4;
      failed += !passes<Lstm>(c, k);
      failed += !passes<Gru>(c, k);
      failed += !passes<RnnTanh>(c, k);
      failed += !passes<RnnRelu>(c, k);
    }
  }
  std::printf("%d runs, %d failed\n", ran, failed);
  return failed != 0;
}
