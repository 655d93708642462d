// What this machine can do at most: multiply-adds, reading memory, synchronizing threads.
//
// A Python module, compiled on demand for this processor (bench/roofline.py). Every function runs
// its work on `threads` threads at once.
#include <omp.h>
#include <pybind11/pybind11.h>

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

// Independent accumulators: more than latency times throughput of any multiply-add unit so far, and
// few enough to stay in 16 registers.
constexpr int kAccumulators = 12;

using Clock = std::chrono::steady_clock;

double since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};

// Keeps the compiler from computing the result at compile time, or not at all.
template <class V>
void keep(V& value) {
  asm volatile("" : "+x"(value));
}

template <class T>
struct MultiplyAdd {
  using V = typename VectorOf<T>::type;
  static constexpr double kFlops = 2.0 * kBytes / sizeof(T);
  V a = V{} + T(0.999), b = V{} + T(0.001);
  void step(V& sum) const { sum = sum * a + b; }
};

#if defined(__AVX512BF16__)
struct DotBfloat16 {  // the instruction that multiplies pairs of bfloat16 into float32
  using V = __m512;
  static constexpr double kFlops = 64;  // 16 sums of 2 products
  __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.9f), _mm512_set1_ps(0.9f));
  void step(V& sum) const { sum = _mm512_dpbf16_ps(sum, a, a); }
};
#endif

// Runs work(thread) -> units again and again on all threads; units a second of all together.
template <class Work>
double rate(int threads, double seconds, Work work) {
  double total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
  {
    const int thread = omp_get_thread_num();
    work(thread);
#pragma omp barrier
    const auto begin = Clock::now();
    double units = 0;
    do {
      units += work(thread);
    } while (since(begin) < seconds);
    total += units / since(begin);
  }
  return total;
}

template <class Unit>
double peak(int threads, double seconds) {
  return rate(threads, seconds, [](int) {
    constexpr int kLoops = 2000;
    Unit unit;
    keep(unit.a);
    typename Unit::V sums[kAccumulators] = {};
    for (auto& sum : sums) keep(sum);
    for (int n = 0; n < kLoops; ++n)
      for (auto& sum : sums) unit.step(sum);
    for (auto& sum : sums) keep(sum);
    return kLoops * kAccumulators * Unit::kFlops;
  });
}

// Floating-point operations a second, a multiply-add being two; 0 without such an instruction.
double fma_peak_float32(int threads, double seconds) {
  return peak<MultiplyAdd<float>>(threads, seconds);
}
double fma_peak_float64(int threads, double seconds) {
  return peak<MultiplyAdd<double>>(threads, seconds);
}
double fma_peak_bfloat16(int threads, double seconds) {
#if defined(__AVX512BF16__)
  return peak<DotBfloat16>(threads, seconds);
#else
  return 0 * threads * seconds;
#endif
}

// Bytes a second that all threads read, each its own `bytes` over and over; 0 without memory.
double read_bandwidth(int64_t bytes, int threads, double seconds) {
  using V = VectorOf<int32_t>::type;
  constexpr int64_t kUnroll = 8;
  const int64_t size = (bytes / (kUnroll * kBytes)) * (kUnroll * kBytes);
  char* all = static_cast<char*>(std::aligned_alloc(4096, (size * threads + 4095) / 4096 * 4096));
  if (size == 0 || all == nullptr) return 0;
#pragma omp parallel num_threads(threads)
  std::memset(all + size * omp_get_thread_num(), 1, size);  // first touch by the thread that reads
  const double found = rate(threads, seconds, [=](int thread) {
    const V* mine = reinterpret_cast<const V*>(all + size * thread);
    // A single pass over a small buffer is too short for the clock.
    const int64_t passes = 1 + (int64_t(1) << 20) / size;
    V sum[kUnroll] = {};
    for (int64_t pass = 0; pass < passes; ++pass) {
      for (int64_t k = 0; k < size / kBytes; k += kUnroll)
        for (int64_t u = 0; u < kUnroll; ++u) sum[u] += mine[k + u];
      for (auto& each : sum) keep(each);
    }
    return double(size) * passes;
  });
  std::free(all);
  return found;
}

// Seconds of one barrier among threads that all spin.
double barrier_seconds(int threads, int count) {
  double taken = 0;
#pragma omp parallel num_threads(threads)
  {
#pragma omp barrier
    const auto begin = Clock::now();
    for (int n = 0; n < count; ++n) {
#pragma omp barrier
    }
#pragma omp master
    taken = since(begin);
  }
  return taken / count;
}

// Seconds of handing an empty task to a team and waiting for all.
double fork_join_seconds(int threads, int count) {
  volatile int sink = 0;
  const auto begin = Clock::now();
  for (int n = 0; n < count; ++n) {
#pragma omp parallel num_threads(threads)
    if (omp_get_thread_num() == 0) sink = sink + 1;
  }
  return since(begin) / count;
}

}  // namespace

PYBIND11_MODULE(roofline, m) {
  m.def("fma_peak_float32", &fma_peak_float32);
  m.def("fma_peak_float64", &fma_peak_float64);
  m.def("fma_peak_bfloat16", &fma_peak_bfloat16);
  m.def("read_bandwidth", &read_bandwidth);
  m.def("barrier_seconds", &barrier_seconds);
  m.def("fork_join_seconds", &fork_join_seconds);
}
