// csrc/cuda/primitives.h for the host: threads of CTAs are fibers of one OS thread, run in turns.
//
// A block, a cluster and a warp meet as on a GPU; asynchronous copies happen at the wait that asks
// for them, as late as they may; a launch that can go no further is reported as a deadlock. Under
// the thread sanitizer each fiber is a thread to it, ordered by the barriers alone: instructions
// of a warp order nothing, as on a GPU.
//
// Not shown by it: the order in which other SMs see memory (a missing fence, a stale first-level
// cache), speed, bank conflicts, and whether a launch has room on a device.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#include "plan.h"

#define LSTM_FUSED_DEVICE inline
#define LSTM_FUSED_KERNEL(threads) void
#define LSTM_FUSED_CONSTANT
#define LSTM_FUSED_UNROLL
#define LSTM_FUSED_ROLLED

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace lstm_fused::cuda {

// fibers.cpp. Everything below speaks of the fiber that runs.
namespace fibers {
int thread();
int threads();
dim3 block();
dim3 blocks();
int rank();     // in the cluster
int cluster();  // CTAs of it
char* shared(int rank);
void sync_block();
void sync_warp();
void arrive_cluster();
void wait_cluster();
void add_to(unsigned long long* counter);
void wait_for(unsigned long long* counter, unsigned long long target);
void queue_copy(void* to, const void* from, bool valid);
void commit();
void wait(int pending);
// What all 32 lanes bring to an instruction, 8 words each, once the last of them has.
using Words = uint32_t[32][8];
const Words& gather(const uint32_t (&mine)[8]);
const char* run(const std::function<void()>& kernel, dim3 grid, int threads, int64_t shared_bytes,
                int cluster, bool cooperative);
}  // namespace fibers

inline int thread_index() {
  return fibers::thread();
}
inline int thread_count() {
  return fibers::threads();
}
inline dim3 block_index() {
  return fibers::block();
}
inline dim3 block_count() {
  return fibers::blocks();
}
inline char* shared_memory() {
  return fibers::shared(fibers::rank());
}
inline void sync_block() {
  fibers::sync_block();
}
inline void sync_warp() {
  fibers::sync_warp();
}
inline void copy_async(void* to, const void* from, bool valid) {
  fibers::queue_copy(to, from, valid);
}
inline void commit_copies() {
  fibers::commit();
}
template <int kPending>
void wait_copies() {
  fibers::wait(kPending);
}
inline void arrive_ctas(void* counter) {
  if (fibers::thread() == 0) fibers::add_to(static_cast<unsigned long long*>(counter));
}
inline void wait_ctas(void* counter, unsigned long long target) {
  if (fibers::thread() == 0) fibers::wait_for(static_cast<unsigned long long*>(counter), target);
  fibers::sync_block();
}
inline constexpr bool kHasClusters = true;
inline int cluster_rank() {
  return fibers::rank();
}
inline int cluster_size() {
  return fibers::cluster();
}
inline void arrive_cluster() {
  fibers::arrive_cluster();
}
inline void wait_cluster() {
  fibers::wait_cluster();
}
inline void send_shared(void* place, int rank) {
  const int64_t at = static_cast<char*>(place) - shared_memory();
  std::memcpy(fibers::shared(rank) + at, place, 16);
}

inline void load_matrices_of(uint32_t* r, int count, const void* row) {
  uint32_t mine[8] = {};
  std::memcpy(mine, &row, sizeof row);
  const fibers::Words& all = fibers::gather(mine);
  const int lane = thread_index() % 32;
  for (int i = 0; i < count; ++i) {
    const char* from;
    std::memcpy(&from, all[i * 8 + lane / 4], sizeof from);
    std::memcpy(&r[i], from + lane % 4 * 4, 4);
  }
}
inline void load_matrices(uint32_t (&r)[4], const void* row) {
  load_matrices_of(r, 4, row);
}
inline void load_matrices(uint32_t (&r)[2], const void* row) {
  load_matrices_of(r, 2, row);
}

inline float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t bits_of_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of_bfloat16(uint16_t bits) {
  return float_of_bits(static_cast<uint32_t>(bits) << 16);
}
inline uint16_t bfloat16_of_float(float x) {
  const uint32_t bits = bits_of_float(x);
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float float_of_float16(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign * std::ldexp(static_cast<float>(exponent ? mantissa | 1024 : mantissa),
                           (exponent ? exponent : 1) - 25);
}
inline uint16_t float16_of_float(float x) {
  const uint16_t sign = static_cast<uint16_t>(bits_of_float(x) >> 16 & 0x8000);
  const float size = std::fabs(x);
  if (x != x) return 0x7e00;
  if (size == 0) return sign;
  if (size >= 65520) return sign | 0x7c00;
  int exponent;
  std::frexp(size, &exponent);
  const int last = exponent < -13 ? -24 : exponent - 11;  // the last bit's weight
  const int units = static_cast<int>(std::nearbyint(std::ldexp(size, -last)));
  // Adding carries into the exponent where the mantissa rounds up to the next power of two.
  return static_cast<uint16_t>(sign | (((last + 24) << 10) + units));
}
inline uint32_t round_to_tf32(uint32_t bits) {
  return float_of_bits(bits) != float_of_bits(bits) ? bits : (bits + 0x1000) & 0xffffe000u;
}

// value(word, half): what a 32-bit register holds of an operand; per: values of a register.
template <int kPer, class Value>
void multiply_of(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Value value) {
  const uint32_t mine[8] = {a[0], a[1], a[2], a[3], b[0], b[1], 0, 0};
  const fibers::Words& all = fibers::gather(mine);
  const int lane = thread_index() % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = 2 * (lane % 4) + i % 2;
    for (int k = 0; k < 8 * kPer; ++k) {
      const int half = k / (4 * kPer), at = k % (4 * kPer);
      const uint32_t left = all[row % 8 * 4 + at / kPer][row / 8 + 2 * half];
      const uint32_t right = all[column * 4 + at / kPer][4 + half];
      c[i] += value(left, at % kPer) * value(right, at % kPer);
    }
  }
}
inline void multiply_bfloat16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply_of<2>(c, a, b, [](uint32_t word, int half) {
    return float_of_bfloat16(static_cast<uint16_t>(word >> 16 * half));
  });
}
inline void multiply_float16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply_of<2>(c, a, b, [](uint32_t word, int half) {
    return float_of_float16(static_cast<uint16_t>(word >> 16 * half));
  });
}
inline void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply_of<1>(c, a, b, [](uint32_t word, int) { return float_of_bits(word & 0xffffe000u); });
}

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

// cuBLAS: columns of c (m, n) in a row, of products of columns of a and b, or of their rows if
// turned. The handle comes with the mode that allows TF32, as it may from torch.
inline int& math_mode() {
  static int mode;
  return mode;
}
inline int32_t torch_get_current_cuda_blas_handle(void** handle) {
  math_mode() = 3;
  *handle = nullptr;
  return 0;
}
inline int cublasSetMathMode(void*, int mode) {
  math_mode() = mode;
  return 0;
}
inline double value_at(const void* data, int type, int64_t i, bool tf32) {
  switch (type) {
    case 1: return static_cast<const double*>(data)[i];
    case 14: return float_of_bfloat16(static_cast<const uint16_t*>(data)[i]);
    case 2: return float_of_float16(static_cast<const uint16_t*>(data)[i]);
    default: {
      const float x = static_cast<const float*>(data)[i];
      return tf32 ? float_of_bits(round_to_tf32(bits_of_float(x))) : x;
    }
  }
}
inline int cublasGemmEx_64(void*, int turn_a, int turn_b, int64_t m, int64_t n, int64_t k,
                           const void* alpha, const void* a, int a_type, int64_t a_stride,
                           const void* b, int b_type, int64_t b_stride, const void* beta, void* c,
                           int c_type, int64_t c_stride, int compute, int) {
  const bool wide = compute == 70, tf32 = compute == 77 || math_mode() == 3;
  const double one = wide ? *static_cast<const double*>(alpha) : *static_cast<const float*>(alpha);
  const double zero = wide ? *static_cast<const double*>(beta) : *static_cast<const float*>(beta);
  const bool fits = a_stride >= (turn_a ? k : m) && b_stride >= (turn_b ? n : k) && c_stride >= m;
  if (!fits || one != 1 || zero != 0 || a_type != b_type || c_type != wide) return 7;
  std::vector<double> left(m * k), right(k * n);
  for (int64_t i = 0; i < m * k; ++i)
    left[i] =
        value_at(a, a_type, turn_a ? i / k * a_stride + i % k : i % k * a_stride + i / k, tf32);
  for (int64_t i = 0; i < k * n; ++i)
    right[i] =
        value_at(b, b_type, turn_b ? i % k * b_stride + i / k : i / k * b_stride + i % k, tf32);
  for (int64_t j = 0; j < n; ++j)
    for (int64_t i = 0; i < m; ++i) {
      double sum = 0;
      for (int64_t l = 0; l < k; ++l) sum += left[i * k + l] * right[j * k + l];
      if (wide)
        static_cast<double*>(c)[j * c_stride + i] = sum;
      else
        static_cast<float*>(c)[j * c_stride + i] = static_cast<float>(sum);
    }
  return 0;
}
inline bool has_library() {
  return true;
}
inline const char* library_error(int status) {
  return status == 0 ? nullptr : "a parameter is not valid";
}

inline const char* fill_async(void* to, int byte, int64_t bytes, void*) {
  if (bytes) std::memset(to, byte, bytes);
  return nullptr;
}
inline const char* copy_rows_async(void* to, int64_t pitch, const void* from, int64_t from_pitch,
                                   int64_t bytes, int64_t rows, void*) {
  for (int64_t row = 0; row < rows; ++row)
    std::memcpy(static_cast<char*>(to) + row * pitch,
                static_cast<const char*>(from) + row * from_pitch, bytes);
  return nullptr;
}
inline const char* upload_async(void* to, const void* from, int64_t bytes, void*) {
  std::memcpy(to, from, bytes);
  return nullptr;
}
inline bool is_capturing(void*) {
  return false;
}

// A device with few SMs, so that small problems already share them.
inline const char* read_device(int, Device& device) {
  device = {9, 0, 32, 227 << 10, 4, 8};
  return nullptr;
}

struct Launch {
  dim3 grid;
  int threads;
  int64_t shared_bytes;
  int cluster;
  bool cooperative;
  void* stream;
};

struct Prepared {};

template <class Params>
const char* launch_kernel(void (*kernel)(Params), const Launch& launch, const Params& params,
                          Prepared&) {
  return fibers::run([&] { kernel(params); }, launch.grid, launch.threads, launch.shared_bytes,
                     launch.cluster, launch.cooperative);
}

}  // namespace lstm_fused::cuda
