// The product of a tile, by each kind of arithmetic: on tensor cores and as fused multiply-adds.
#pragma once

#include "plan.h"
#include "ptx/mma.h"
#include "ptx/threads.h"
#include "types.h"

namespace lstm_fused::cuda {

// Both kinds compute acc (kM tiles of 16 rows, kN tiles of 8 columns) += A B over one k slice, 32
// bytes of k. In shared memory, the rows of A start a_row bytes apart, its tiles a_tile bytes, and
// the rows of B b_row bytes, all 16-byte aligned. acc is distributed over a warp as PTX lays out
// the accumulators of m16n8: lane l has rows l / 4 ([0] and [1]) and l / 4 + 8 ([2] and [3]), each
// in columns 2 (l % 4) and 2 (l % 4) + 1.

// Products by ldmatrix and mma. Instruction has
//   Storage    the type of the operands in memory
//   prepare    rounds loaded operands where the instruction would truncate them
//   multiply   c += a b
template <class Instruction>
struct TensorCores {
  using Storage = typename Instruction::Storage;
  using Acc = float;
  static constexpr bool kTensorCores = true;
  static constexpr bool kPersistent = true;

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

  // The same product with A register-resident, as load_resident has loaded it.
  template <int kM, int kN>
  static LSTM_FUSED_DEVICE void multiply_resident(Acc (&acc)[kM][kN][4],
                                                  const uint32_t (&left)[kM][4], const char* b,
                                                  int b_row) {
    uint32_t right[kN][2];
    load_right(right, b, b_row);
    LSTM_FUSED_UNROLL
    for (int m = 0; m < kM; ++m) LSTM_FUSED_UNROLL
    for (int j = 0; j < kN; ++j) Instruction::multiply(acc[m][j], left[m], right[j]);
  }

  // Loads this lane's fragment of a tile of A from global memory. Rows from `rows` on are zero.
  static LSTM_FUSED_DEVICE void load_resident(uint32_t (&left)[4], const char* a, int64_t a_row,
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

// Products by fused multiply-adds, in the full precision of T.
template <class T>
struct FusedMultiplyAdd {
  using Storage = T;
  using Acc = T;
  static constexpr bool kTensorCores = false;
  static constexpr bool kPersistent = sizeof(T) == 4;
  static constexpr int kVector = 16 / sizeof(T);
  struct alignas(16) Vector {
    T v[kVector];
  };

  template <int kM, int kN>
  static LSTM_FUSED_DEVICE void multiply(Acc (&acc)[kM][kN][4], const char* a, int a_tile,
                                         int a_row, const char* b, int b_row) {
    const int lane = thread_index() % 32;
    // Not unrolled: twice as many loads in flight would spill the 128 registers that a thread has
    // in a cluster.
    LSTM_FUSED_NO_UNROLL
    for (int at = 0; at < kSliceBytes; at += 16) {
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

}  // namespace lstm_fused::cuda
