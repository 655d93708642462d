// csrc/cuda/ptx/mma.h for the host: matrix instructions by their documented layouts.
#pragma once

#include <cstring>

#include "conversions.h"
#include "threads.h"

namespace lstm_fused::cuda {

inline void load_matrices(const char* instruction, uint32_t* r, int count, const void* row) {
  fibers::check_shared(row, 16);
  uint32_t own[8] = {};
  std::memcpy(own, &row, sizeof row);
  const fibers::LaneWords& all = fibers::exchange_words(instruction, own);
  const int lane = thread_index() % 32;
  for (int i = 0; i < count; ++i) {
    const char* from;
    std::memcpy(&from, all[i * 8 + lane / 4], sizeof from);
    std::memcpy(&r[i], from + lane % 4 * 4, 4);
  }
}
inline void load_matrices(uint32_t (&r)[4], const void* row) {
  load_matrices("ldmatrix.x4", r, 4, row);
}
inline void load_matrices(uint32_t (&r)[2], const void* row) {
  load_matrices("ldmatrix.x2", r, 2, row);
}

// kValues: values in a 32-bit register of an operand; value(word, i): the i-th of them.
// Its accesses are of registers: accesses.cpp does not look at them.
template <int kValues, class Value>
__attribute__((no_sanitize("thread"))) void mma(float (&c)[4], const uint32_t (&a)[4],
                                                const uint32_t (&b)[2], Value value) {
  const uint32_t own[8] = {a[0], a[1], a[2], a[3], b[0], b[1], 0, 0};
  const fibers::LaneWords& all = fibers::exchange_words("mma", own);
  const int lane = thread_index() % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = 2 * (lane % 4) + i % 2;
    for (int k = 0; k < 8 * kValues; ++k) {
      const int half = k / (4 * kValues), at = k % (4 * kValues);
      const uint32_t left = all[row % 8 * 4 + at / kValues][row / 8 + 2 * half];
      const uint32_t right = all[column * 4 + at / kValues][4 + half];
      c[i] += value(left, at % kValues) * value(right, at % kValues);
    }
  }
}
inline void mma_bfloat16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma<2>(c, a, b, [](uint32_t word, int i) {
    return float_of_bfloat16(static_cast<uint16_t>(word >> 16 * i));
  });
}
inline void mma_float16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma<2>(c, a, b, [](uint32_t word, int i) {
    return float_of_float16(static_cast<uint16_t>(word >> 16 * i));
  });
}
inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma<1>(c, a, b, [](uint32_t word, int) { return float_of_bits(word & 0xffffe000u); });
}

}  // namespace lstm_fused::cuda
