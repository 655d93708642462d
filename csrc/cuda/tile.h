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
//   kRounds    whether operands must be rounded, since the instruction would truncate them
//   round, round_bits  one of them, as a value and as it is in a register
//   multiply   c += a b
template <class Instruction>
struct TensorCores {
  using Storage = typename Instruction::Storage;
  using Acc = float;
  static constexpr bool kTensorCores = true;
  static constexpr bool kPersistent = true;
  static constexpr bool kRounds = Instruction::kRounds;

  // What B holds of a value: rounded by who computes it, once.
  static LSTM_FUSED_DEVICE Storage operand(Storage x) {
    if constexpr (Instruction::kRounds) return Instruction::round(x);
    return x;
  }

  // kSlices slices, `stride` bytes apart, which add to the chains of acc in turn. kRounded: whether
  // A is rounded already.
  template <int kSlices, bool kRounded, int kChains, int kM, int kN>
  static LSTM_FUSED_DEVICE void multiply(Acc (&acc)[kChains][kM][kN][4], const char* a, int a_tile,
                                         int a_row, const char* b, int b_row, int stride) {
    const int lane = thread_index() % 32;
    const int matrix = lane / 8, row = lane % 8;
    a += ((matrix & 1) * 8 + row) * a_row + (matrix >> 1) * 16;
    uint32_t left[kSlices][kM][4], right[kSlices][kN][2];
    LSTM_FUSED_UNROLL
    for (int i = 0; i < kSlices; ++i) LSTM_FUSED_UNROLL
    for (int m = 0; m < kM; ++m) {
      load_matrices(left[i][m], a + m * a_tile + i * stride);
      if constexpr (!kRounded) round_words(left[i][m]);
    }
    load_right(right, b, b_row, stride);
    multiply_loaded(acc, left, right);
  }

  // The same product with A register-resident, as load_resident has loaded it.
  template <int kSlices, int kChains, int kM, int kN>
  static LSTM_FUSED_DEVICE void multiply_resident(Acc (&acc)[kChains][kM][kN][4],
                                                  const uint32_t (*left)[kM][4], const char* b,
                                                  int b_row, int stride) {
    uint32_t right[kSlices][kN][2];
    load_right(right, b, b_row, stride);
    multiply_loaded(acc, left, right);
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
    round_words(left);
  }

  // Rounds 16 bytes of A in shared memory.
  static LSTM_FUSED_DEVICE void round_vector(char* vector) {
    round_words(*reinterpret_cast<uint32_t (*)[4]>(vector));
  }

 private:
  static LSTM_FUSED_DEVICE void round_words(uint32_t (&words)[4]) {
    if constexpr (Instruction::kRounds) {
      LSTM_FUSED_UNROLL
      for (uint32_t& word : words) word = Instruction::round_bits(word);
    }
  }

  template <int kSlices, int kChains, int kM, int kN>
  static LSTM_FUSED_DEVICE void multiply_loaded(Acc (&acc)[kChains][kM][kN][4],
                                                const uint32_t (*left)[kM][4],
                                                const uint32_t (&right)[kSlices][kN][2]) {
    LSTM_FUSED_UNROLL
    for (int i = 0; i < kSlices; ++i) LSTM_FUSED_UNROLL
    for (int m = 0; m < kM; ++m) LSTM_FUSED_UNROLL
    for (int j = 0; j < kN; ++j)
      Instruction::multiply(acc[i % kChains][m][j], left[i][m], right[i][j]);
  }

  // Four matrices at a time: two column tiles of a slice, or one of two slices.
  template <int kSlices, int kN>
  static LSTM_FUSED_DEVICE void load_right(uint32_t (&right)[kSlices][kN][2], const char* b,
                                           int b_row, int stride) {
    const int lane = thread_index() % 32;
    const int matrix = lane / 8;
    b += lane % 8 * b_row + (matrix & 1) * 16;
    uint32_t four[4];
    if constexpr (kN == 1) {
      b += matrix / 2 * stride;
      LSTM_FUSED_UNROLL
      for (int i = 0; i + 1 < kSlices; i += 2) {
        load_matrices(four, b + i * stride);
        put(right[i][0], four);
        put(right[i + 1][0], four + 2);
      }
      // The addresses of lanes from 16 on are not used.
      if constexpr (kSlices % 2 == 1)
        load_matrices(right[kSlices - 1][0], b + (kSlices - 1) * stride);
    } else {
      b += matrix / 2 * 8 * b_row;
      LSTM_FUSED_UNROLL
      for (int i = 0; i < kSlices; ++i) LSTM_FUSED_UNROLL
      for (int j = 0; j < kN; j += 2) {
        load_matrices(four, b + j * 8 * b_row + i * stride);
        put(right[i][j], four);
        put(right[i][j + 1], four + 2);
      }
    }
  }
  static LSTM_FUSED_DEVICE void put(uint32_t (&to)[2], const uint32_t* from) {
    to[0] = from[0];
    to[1] = from[1];
  }
};

// Products by fused multiply-adds, in the full precision of T.
template <class T>
struct FusedMultiplyAdd {
  using Storage = T;
  using Acc = T;
  static constexpr bool kTensorCores = false;
  static constexpr bool kPersistent = sizeof(T) == 4;
  static constexpr bool kRounds = false;
  static constexpr int kVector = 16 / sizeof(T);
  struct alignas(16) Vector {
    T v[kVector];
  };

  static LSTM_FUSED_DEVICE T operand(T x) { return x; }

  template <int kSlices, bool kRounded, int kM, int kN>
  static LSTM_FUSED_DEVICE void multiply(Acc (&acc)[1][kM][kN][4], const char* a, int a_tile,
                                         int a_row, const char* b, int b_row, int) {
    static_assert(kSlices == 1);
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
          acc[0][m][j][2 * half + col] += left.v[i] * right[j][col].v[i];
      }
    }
  }
};

}  // namespace lstm_fused::cuda
