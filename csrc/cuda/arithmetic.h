// Values in memory and in registers, and the product of tiles for each kind of arithmetic.
#pragma once

#include <cmath>

#include "params.h"
#include "plan.h"
#include "ptx/conversions.h"
#include "ptx/mma.h"
#include "ptx/threads.h"

namespace lstm_fused {
namespace {

// For the cells, before their headers: exact at 0 and infinities, NaN stays NaN.
LSTM_FUSED_INLINE float sigmoid(float x) {
  return 1.0f / (1.0f + ::expf(-x));
}
LSTM_FUSED_INLINE double sigmoid(double x) {
  return 1.0 / (1.0 + ::exp(-x));
}
LSTM_FUSED_INLINE float tanh(float x) {
  return ::tanhf(x);
}
LSTM_FUSED_INLINE double tanh(double x) {
  return ::tanh(x);
}

}  // namespace

namespace cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

LSTM_FUSED_DEVICE float load(const float& x) {
  return x;
}
LSTM_FUSED_DEVICE double load(const double& x) {
  return x;
}
LSTM_FUSED_DEVICE float load(const BFloat16& x) {
  return float_of_bfloat16(x.bits);
}
LSTM_FUSED_DEVICE float load(const Half& x) {
  return float_of_float16(x.bits);
}

template <class S>
LSTM_FUSED_DEVICE S round_to(Compute<S> x) {
  return x;
}
template <>
LSTM_FUSED_DEVICE BFloat16 round_to<BFloat16>(float x) {
  return {bfloat16_of_float(x)};
}
template <>
LSTM_FUSED_DEVICE Half round_to<Half>(float x) {
  return {float16_of_float(x)};
}

// acc (kM tiles of 16 rows, kN tiles of 8 columns) += A B over one step of k, 32 bytes. Rows of A
// and of B lie in shared memory, 16-byte aligned, a_row and b_row bytes apart; the tiles of A
// a_tile bytes. Lane l holds rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next, as PTX has
// it: [0] [1] the first row's two columns, [2] [3] the second's.
template <class Instruction>
struct TensorCores {
  using Storage = typename Instruction::Storage;
  using Acc = float;

  static constexpr bool kTensorCores = true;

  template <int kM, int kN>
  static LSTM_FUSED_DEVICE void multiply(Acc (&acc)[kM][kN][4], const char* a, int a_tile,
                                         int a_row, const char* b, int b_row) {
    const int lane = thread_index() % 32;
    const int matrix = lane / 8, row = lane % 8;
    uint32_t right[kN][2];
    load_right(right, b, b_row);
    LSTM_FUSED_UNROLL
    for (int m = 0; m < kM; ++m) {
      uint32_t left[4];
      load_matrices(left, a + m * a_tile + ((matrix & 1) * 8 + row) * a_row + (matrix >> 1) * 16);
      Instruction::prepare(left);
      LSTM_FUSED_UNROLL
      for (int j = 0; j < kN; ++j) Instruction::multiply(acc[m][j], left, right[j]);
    }
  }

  // The same with A in registers, as load_held left it.
  template <int kM, int kN>
  static LSTM_FUSED_DEVICE void multiply_held(Acc (&acc)[kM][kN][4], const uint32_t (&left)[kM][4],
                                              const char* b, int b_row) {
    uint32_t right[kN][2];
    load_right(right, b, b_row);
    LSTM_FUSED_UNROLL
    for (int m = 0; m < kM; ++m) LSTM_FUSED_UNROLL
    for (int j = 0; j < kN; ++j) Instruction::multiply(acc[m][j], left[m], right[j]);
  }

  // This lane's part of a tile of A in global memory, of which the first `rows` rows are there.
  static LSTM_FUSED_DEVICE void load_held(uint32_t (&left)[4], const char* a, int64_t a_row,
                                          int64_t rows) {
    const int lane = thread_index() % 32;
    LSTM_FUSED_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i & 1) * 8;
      const char* from = a + row * a_row + (i >> 1) * 16 + lane % 4 * 4;
      left[i] = row < rows ? *reinterpret_cast<const uint32_t*>(from) : 0;
    }
    Instruction::prepare(left);
  }

 private:
  template <int kN>
  static LSTM_FUSED_DEVICE void load_right(uint32_t (&right)[kN][2], const char* b, int b_row) {
    const int lane = thread_index() % 32;
    const int matrix = lane / 8, row = lane % 8;
    if constexpr (kN == 1) {
      load_matrices(right[0], b + row * b_row + (matrix & 1) * 16);
    } else {
      LSTM_FUSED_UNROLL
      for (int j = 0; j < kN; j += 2) {
        uint32_t both[4];
        load_matrices(both, b + ((j + matrix / 2) * 8 + row) * b_row + (matrix & 1) * 16);
        right[j][0] = both[0];
        right[j][1] = both[1];
        right[j + 1][0] = both[2];
        right[j + 1][1] = both[3];
      }
    }
    LSTM_FUSED_UNROLL
    for (int j = 0; j < kN; ++j) Instruction::prepare(right[j]);
  }
};

struct BFloat16Cores {
  using Storage = BFloat16;
  template <int kCount>
  static LSTM_FUSED_DEVICE void prepare(uint32_t (&)[kCount]) {}
  static LSTM_FUSED_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
    mma_bfloat16(c, a, b);
  }
};

struct HalfCores {
  using Storage = Half;
  template <int kCount>
  static LSTM_FUSED_DEVICE void prepare(uint32_t (&)[kCount]) {}
  static LSTM_FUSED_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
    mma_float16(c, a, b);
  }
};

// The instruction would cut the low bits off: round them instead.
struct Tf32Cores {
  using Storage = float;
  template <int kCount>
  static LSTM_FUSED_DEVICE void prepare(uint32_t (&r)[kCount]) {
    LSTM_FUSED_UNROLL
    for (int i = 0; i < kCount; ++i) r[i] = round_to_tf32(r[i]);
  }
  static LSTM_FUSED_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
    mma_tf32(c, a, b);
  }
};

// Fused multiply-adds in full precision, in the same layout of acc.
template <class T>
struct Plain {
  using Storage = T;
  using Acc = T;
  static constexpr bool kTensorCores = false;
  static constexpr int kVector = 16 / sizeof(T);
  struct alignas(16) Vector {
    T v[kVector];
  };

  template <int kM, int kN>
  static LSTM_FUSED_DEVICE void multiply(Acc (&acc)[kM][kN][4], const char* a, int a_tile,
                                         int a_row, const char* b, int b_row) {
    const int lane = thread_index() % 32;
    LSTM_FUSED_NO_UNROLL  // twice the loads under way would spill in a cluster's 128 registers
        for (int at = 0; at < kKBytes; at += 16) {
      Vector right[kN][2];
      LSTM_FUSED_UNROLL
      for (int j = 0; j < kN; ++j) LSTM_FUSED_UNROLL
      for (int col = 0; col < 2; ++col)
        right[j][col] =
            *reinterpret_cast<const Vector*>(b + (j * 8 + 2 * (lane % 4) + col) * b_row + at);
      LSTM_FUSED_UNROLL
      for (int m = 0; m < kM; ++m) LSTM_FUSED_UNROLL
      for (int half = 0; half < 2; ++half) {
        const Vector left =
            *reinterpret_cast<const Vector*>(a + m * a_tile + (lane / 4 + half * 8) * a_row + at);
        LSTM_FUSED_UNROLL
        for (int j = 0; j < kN; ++j) LSTM_FUSED_UNROLL
        for (int col = 0; col < 2; ++col) LSTM_FUSED_UNROLL
        for (int i = 0; i < kVector; ++i)
          acc[m][j][2 * half + col] += left.v[i] * right[j][col].v[i];
      }
    }
  }
};

}  // namespace cuda
}  // namespace lstm_fused
