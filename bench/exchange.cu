// Measures the exchange between CTAs; bench/gpu.py builds this and calls it through ctypes.
#include "exchange.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace lstm_fused::cuda {
namespace {

constexpr int kFewSteps = 500, kManySteps = 4500, kTries = 5;
constexpr int kSharedBytes = 64 << 10;
constexpr int kMaxCtas = 128;
constexpr size_t kWrongBytes = kMaxCtas * kExchangeThreads * sizeof(int);
constexpr size_t kStoredBytes =
    kMaxCtas * kStoredSteps * kStored * kExchangeThreads * sizeof(float);

const char* failure = nullptr;  // of the last measurement

bool check(const char* error) {
  if (error) failure = error;
  return !error;
}
bool check(cudaError_t error) {
  return check(error_of(error));
}

struct Run {
  ExchangeParams p{};
  cudaEvent_t begin = nullptr, end = nullptr;
  LaunchConfig config{};
  ConfiguredDevices configured;

  Run(int ctas, int bytes) {
    failure = nullptr;
    p.bytes = bytes;
    config.grid = dim3(ctas);
    config.threads = kExchangeThreads;
    check(cudaMalloc(&p.buffer, 2 * kMaxCtas * kWritten)) &&
        check(cudaMalloc(&p.counters, sizeof *p.counters)) &&
        check(cudaMalloc(&p.stored, kStoredBytes)) && check(cudaMalloc(&p.wrong, kWrongBytes)) &&
        check(cudaMemset(p.wrong, 0, kWrongBytes)) && check(cudaEventCreate(&begin)) &&
        check(cudaEventCreate(&end));
  }

  ~Run() {
    for (void* memory : {static_cast<void*>(p.buffer), static_cast<void*>(p.counters),
                         static_cast<void*>(p.stored), static_cast<void*>(p.wrong)})
      cudaFree(memory);
    if (begin) cudaEventDestroy(begin);
    if (end) cudaEventDestroy(end);
    cudaGetLastError();  // a launch that was refused is no error of the next call
  }

  // Milliseconds of so many steps.
  template <class Kernel>
  float time(Kernel kernel, int steps) {
    float milliseconds = 0;
    p.steps = steps;
    check(cudaMemset(p.counters, 0, sizeof *p.counters)) && check(cudaEventRecord(begin)) &&
        check(launch_kernel(kernel, config, p, configured)) && check(cudaEventRecord(end)) &&
        check(cudaEventSynchronize(end)) && check(cudaEventElapsedTime(&milliseconds, begin, end));
    return milliseconds;
  }

  // Nanoseconds a step, negative after a failure. The time of a launch does not count: it is in the
  // short run as in the long one.
  template <class Kernel>
  double step_ns(Kernel kernel) {
    float few = INFINITY, many = INFINITY;
    for (int i = 0; i < kTries && !failure; ++i) {
      few = std::min(few, time(kernel, kFewSteps));
      many = std::min(many, time(kernel, kManySteps));
    }
    std::vector<int> wrong(kWrongBytes / sizeof(int));
    if (!failure) check(cudaMemcpy(wrong.data(), p.wrong, kWrongBytes, cudaMemcpyDeviceToHost));
    const bool right = std::all_of(wrong.begin(), wrong.end(), [](int n) { return n == 0; });
    if (!failure && !right) failure = "values were read that were not of their step";
    return failure ? -1 : (many - few) * 1e6 / (kManySteps - kFewSteps);
  }
};

}  // namespace
}  // namespace lstm_fused::cuda

using namespace lstm_fused::cuda;

extern "C" {

const char* exchange_failure() {
  return failure;
}

// `ctas` pass a barrier through L2, then each reads `bytes` that others wrote.
double grid_ns(int ctas, int bytes) {
  Run run(ctas, bytes);
  run.config.shared_bytes = kSharedBytes;
  run.config.cooperative = true;
  return run.step_ns(grid_exchange);
}

// `ctas` of a cluster send each other `bytes`.
double cluster_ns(int ctas, int bytes) {
  Run run(ctas, bytes);
  run.config.shared_bytes = cluster_shared(ctas, bytes);
  run.config.cluster = ctas;
  return run.step_ns(cluster_exchange);
}
}
