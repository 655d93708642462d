// Runs the kernels of bench/exchange.h under the thread sanitizer: each step's values must
// arrive.
#include "bench/exchange.h"

#include <cstdio>
#include <vector>

namespace gpu = lstm_fused::cuda;

namespace {

constexpr int kSteps = 5, kThreads = 64;

template <class Kernel>
int run(const char* what, Kernel kernel, int ctas, int groups, int cluster, int bytes) {
  std::vector<char> buffer(2 * groups * ctas * gpu::kWritten);
  std::vector<unsigned long long> counters(groups);
  std::vector<float> stored(groups * ctas * gpu::kStoredSteps * gpu::kStored * kThreads);
  std::vector<int> wrong(groups * ctas * kThreads, 1);
  gpu::LaunchConfig config{};
  config.grid = dim3(ctas, groups);
  config.threads = kThreads;
  config.shared_bytes = cluster ? gpu::cluster_shared(ctas, bytes) : bytes;
  config.cluster = cluster;
  config.cooperative = !cluster;
  const gpu::ExchangeParams p{kSteps,          bytes,         buffer.data(),
                              counters.data(), stored.data(), wrong.data()};
  gpu::ConfiguredDevices configured;
  if (const char* error = gpu::launch_kernel(kernel, config, p, configured)) {
    std::printf("%s of %d: %s\n", what, ctas, error);
    return 1;
  }
  int total = 0;
  for (const int n : wrong) total += n;
  std::printf("%s of %d, %d bytes: %d wrong\n", what, ctas, bytes, total);
  return total;
}

}  // namespace

int main() {
  int wrong = 0;
  for (const int bytes : {0, 512, 2048}) wrong += run("grid", gpu::grid_exchange, 3, 2, 0, bytes);
  for (const int ctas : {2, 4})
    for (const int bytes : {128, 512, 2048})
      wrong += run("cluster", gpu::cluster_exchange, ctas, 1, ctas, bytes);
  return wrong != 0;
}
