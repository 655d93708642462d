// Instruction sets: the code of one is in the file isa_<name>.cpp.
#pragma once

#include "../cells/cells.h"

namespace lstm_fused {

// Every ISA there is, slowest first, a row each: its name, bytes of a vector, vectors of a register
// tile of six rows, whether bfloat16 products are taken in pairs, and whether this machine has it.
#if defined(__x86_64__)
#define LSTM_FUSED_ISAS(ISA)                    \
  ISA(Baseline, baseline, 16, 2, false, true)   \
  ISA(Avx2, avx2, 32, 2, false, kHasAvx2)       \
  ISA(Avx512, avx512, 64, 4, false, kHasAvx512) \
  ISA(Avx512Bf16, avx512_bf16, 64, 4, true, kHasAvx512&& HAS("avx512bf16"))
#else
#define LSTM_FUSED_ISAS(ISA) ISA(Baseline, baseline, 16, 4, false, true)
#endif

inline constexpr int kTileRows = 6;

enum class Isa : int {
#define LSTM_FUSED_ROW(Name, name, bytes, cols, pairs, available) k##Name,
  LSTM_FUSED_ISAS(LSTM_FUSED_ROW)
#undef LSTM_FUSED_ROW
      kCount
};
inline constexpr int kIsaCount = static_cast<int>(Isa::kCount);

struct IsaFacts {
  const char* name;
  int vector_bytes;
  int tile_cols;    // registers decide: kTileRows x 4 accumulators of 32 registers, x 2 of 16
  bool bf16_pairs;  // bfloat16 is multiplied two to a lane
};

constexpr IsaFacts facts(Isa isa) {
  constexpr IsaFacts all[] = {
#define LSTM_FUSED_ROW(Name, name, bytes, cols, pairs, available) {#name, bytes, cols, pairs},
      LSTM_FUSED_ISAS(LSTM_FUSED_ROW)
#undef LSTM_FUSED_ROW
  };
  return all[static_cast<int>(isa)];
}

// The ISA whose code runs what is not multiplied in pairs: the row before.
constexpr Isa without_pairs(Isa isa) {
  return facts(isa).bf16_pairs ? static_cast<Isa>(static_cast<int>(isa) - 1) : isa;
}

inline constexpr const char* name(Isa isa) {
  return facts(isa).name;
}

}  // namespace lstm_fused
