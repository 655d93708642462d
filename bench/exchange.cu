// Prints as one JSON object what it takes CTAs to meet and to exchange data, in nanoseconds a step.
// bench/exchange.py builds and runs it.
#include "exchange.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/device.h"

namespace lstm_fused::cuda {
namespace {

constexpr int kFew = 500, kMany = 4500, kTries = 5;
constexpr int kSharedBytes = 64 << 10;
constexpr int kMostCtas = 128;

void check(const char* error, const char* what) {
  if (!error) return;
  std::fprintf(stderr, "%s: %s\n", what, error);
  std::exit(1);
}

struct Memory {
  char* buffer;
  unsigned long long* counters;
  int* wrong;
  cudaStream_t stream;
  cudaEvent_t begin, end;

  Memory() {
    check(error_of(cudaMalloc(&buffer, 2 * kMostCtas * kHandedOn)), "memory");
    check(error_of(cudaMalloc(&counters, kCounterBytes)), "memory");
    check(error_of(cudaMalloc(&wrong, kWrongBytes)), "memory");
    check(error_of(cudaMemset(wrong, 0, kWrongBytes)), "memory");
    check(error_of(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking)), "stream");
    check(error_of(cudaEventCreate(&begin)), "event");
    check(error_of(cudaEventCreate(&end)), "event");
    check(error_of(cudaDeviceSynchronize()), "memory");
  }

  static constexpr size_t kCounterBytes = kMostCtas * 128;
  static constexpr size_t kWrongBytes = kMostCtas * kExchangeThreads * sizeof(int);

  // Milliseconds of what `enqueue` puts on the stream.
  template <class Enqueue>
  float time(Enqueue&& enqueue) {
    check(error_of(cudaMemsetAsync(counters, 0, kCounterBytes, stream)), "counters");
    check(error_of(cudaEventRecord(begin, stream)), "event");
    enqueue();
    check(error_of(cudaEventRecord(end, stream)), "event");
    check(error_of(cudaEventSynchronize(end)), "kernel");
    float milliseconds = 0;
    check(error_of(cudaEventElapsedTime(&milliseconds, begin, end)), "event");
    return milliseconds;
  }

  int count_wrong() {
    std::vector<int> found(kWrongBytes / sizeof(int));
    check(error_of(cudaMemcpy(found.data(), wrong, kWrongBytes, cudaMemcpyDeviceToHost)), "wrong");
    check(error_of(cudaMemset(wrong, 0, kWrongBytes)), "wrong");
    int total = 0;
    for (const int n : found) total += n;
    return total;
  }
};

LaunchConfig on(const Carry& memory, dim3 grid) {
  LaunchConfig config{};
  config.grid = grid;
  config.threads = kExchangeThreads;
  config.stream = memory.stream;
  return config;
}

bool first = true;
int all_wrong = 0;

void print(const char* what, int ctas, int groups, int apart, int bytes, double ns) {
  std::printf(
      "%s\n  {\"what\": \"%s\", \"ctas\": %d, \"groups\": %d, \"apart\": %d, "
      "\"bytes\": %d, \"ns\": %.1f}",
      first ? "" : ",", what, ctas, groups, apart, bytes, ns);
  first = false;
}

// The time of a launch does not count: it is in the short run as in the long one.
template <class Kernel>
double step_ns(Memory& memory, Kernel kernel, const LaunchConfig& config, ExchangeParams p,
               ConfiguredDevices& configured) {
  double best[2] = {1e30, 1e30};
  for (int i = 0; i < kTries; ++i)
    for (int is_long = 0; is_long < 2; ++is_long) {
      p.steps = is_long ? kMany : kFew;
      const float ms =
          memory.time([&] { check(launch_kernel(kernel, config, p, configured), "launch"); });
      best[is_long] = std::min<double>(best[is_long], ms);
      all_wrong += memory.count_wrong();
    }
  return (best[1] - best[0]) * 1e6 / (kMany - kFew);
}

void measure_grid(Memory& memory, int ctas, int groups, int apart, int bytes) {
  static ConfiguredDevices configured;
  LaunchConfig config = on(memory, dim3(ctas, groups));
  config.shared_bytes = kSharedBytes;
  config.cooperative = true;
  const ExchangeParams p{0, bytes, apart, memory.buffer, memory.counters, memory.wrong};
  print("grid", ctas, groups, apart, bytes, step_ns(memory, grid_exchange, config, p, configured));
}

void measure_cluster(Memory& memory, int ctas, int bytes) {
  static ConfiguredDevices configured;
  LaunchConfig config = on(memory, dim3(ctas));
  config.shared_bytes = 2 * ctas * bytes;
  config.cluster = ctas;
  const ExchangeParams p{0, bytes, 1, memory.buffer, memory.counters, memory.wrong};
  print("cluster", ctas, 1, 1, bytes, step_ns(memory, cluster_exchange, config, p, configured));
}

// From one launch to the next, one by one and in a graph.
void measure_launches(Memory& memory) {
  static ConfiguredDevices configured;
  const LaunchConfig config = on(memory, dim3(48));
  const auto launch = [&](int times) {
    for (int i = 0; i < times; ++i)
      check(launch_kernel(no_exchange, config, ExchangeParams{}, configured), "launch");
  };
  launch(1);
  float best = 1e30f;
  for (int i = 0; i < kTries; ++i) best = std::min(best, memory.time([&] { launch(kMany); }));
  print("launch", 48, 1, 1, 0, best * 1e6 / kMany);

  cudaGraph_t graph;
  cudaGraphExec_t ready;
  check(error_of(cudaStreamBeginCapture(memory.stream, cudaStreamCaptureModeGlobal)), "capture");
  launch(kFew);
  check(error_of(cudaStreamEndCapture(memory.stream, &graph)), "capture");
  check(error_of(cudaGraphInstantiate(&ready, graph, 0)), "graph");
  best = 1e30f;
  for (int i = 0; i <= kTries; ++i) {  // the first uploads it
    const float ms =
        memory.time([&] { check(error_of(cudaGraphLaunch(ready, memory.stream)), "graph"); });
    if (i) best = std::min(best, ms);
  }
  print("graph", 48, 1, 1, 0, best * 1e6 / kFew);
}

void run() {
  int index = 0;
  check(error_of(cudaGetDevice(&index)), "device");
  cudaDeviceProp properties;
  check(error_of(cudaGetDeviceProperties(&properties, index)), "device");
  Device device{};
  check(read_device(index, device), "device");
  Carry carry;
  std::printf("{\"device\": \"%s\", \"measured\": [", properties.name);
  for (const int ctas : {16, 32, 48, 64, 128})
    if (ctas <= device.sms)
      for (const int kilobytes : {0, 12, 24, 48}) measure_grid(memory, ctas, 1, 1, kilobytes << 10);
  // Groups beside each other, their counters side by side as the kernels' are, and apart.
  for (const int apart : {1, 16})
    for (const int ctas : {16, 48})
      if (96 <= device.sms) measure_grid(memory, ctas, 96 / ctas, apart, 12 << 10);
  for (int ctas = 2; ctas <= device.cluster_ctas; ctas *= 2)
    for (const int bytes : {0, 512, 2048}) measure_cluster(memory, ctas, bytes);
  measure_launches(memory);
  std::printf("\n], \"wrong\": %d}\n", all_wrong);
}

}  // namespace
}  // namespace lstm_fused::cuda

int main() {
  lstm_fused::cuda::run();
}
