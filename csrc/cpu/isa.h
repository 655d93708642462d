// Instruction sets: the code of one is in the file isa_<name>.cpp.
#pragma once

#include "../cells/cells.h"

namespace lstm_fused {

// Every ISA there is, by architecture, slowest first, a row each: its name, bytes of a vector,
// vectors of a register tile of six rows, whether bfloat16 products are taken in pairs, and whether
// this machine has it.
#define LSTM_FUSED_X86_64_ISAS(ISA)             \
  ISA(Baseline, baseline, 16, 2, false, true)   \
  ISA(Avx2, avx2, 32, 2, false, kHasAvx2)       \
  ISA(Avx512, avx512, 64, 4, false, kHasAvx512) \
  ISA(Avx512Bf16, avx512_bf16, 64, 4, true, kHasAvx512Bf16)
#define LSTM_FUSED_NEON_ISAS(ISA)     \
  ISA(Neon, neon, 16, 4, false, true) \
  ISA(NeonBf16, neon_bf16, 16, 4, true, kHasNeonBf16)
#define LSTM_FUSED_SVE_ISAS(ISA)                \
  ISA(Sve256, sve256, 32, 4, false, kHasSve256) \
  ISA(Sve256Bf16, sve256_bf16, 32, 4, true, kHasSve256Bf16)

// The rows compiled here, and those that can be planned for and no more.
#if defined(__aarch64__) && defined(LSTM_FUSED_SVE_VECTORS)
#define LSTM_FUSED_ISAS(ISA) LSTM_FUSED_NEON_ISAS(ISA) LSTM_FUSED_SVE_ISAS(ISA)
#define LSTM_FUSED_FOREIGN_ISAS(ISA) LSTM_FUSED_X86_64_ISAS(ISA)
#elif defined(__aarch64__)
#define LSTM_FUSED_ISAS(ISA) LSTM_FUSED_NEON_ISAS(ISA)
#define LSTM_FUSED_FOREIGN_ISAS(ISA) LSTM_FUSED_SVE_ISAS(ISA) LSTM_FUSED_X86_64_ISAS(ISA)
#elif defined(__x86_64__)
#define LSTM_FUSED_ISAS(ISA) LSTM_FUSED_X86_64_ISAS(ISA)
#define LSTM_FUSED_FOREIGN_ISAS(ISA) LSTM_FUSED_NEON_ISAS(ISA) LSTM_FUSED_SVE_ISAS(ISA)
#else
#define LSTM_FUSED_ISAS(ISA) ISA(Baseline, baseline, 16, 2, false, true)
#define LSTM_FUSED_FOREIGN_ISAS(ISA) LSTM_FUSED_NEON_ISAS(ISA) LSTM_FUSED_SVE_ISAS(ISA)
#endif

inline constexpr int kTileRows = 6;

enum class Isa : int {
#define LSTM_FUSED_ROW(Name, name, bytes, cols, pairs, available) k##Name,
  LSTM_FUSED_ISAS(LSTM_FUSED_ROW) kCount,
  kLastCompiled = kCount - 1,  // so that the next row has the number kCount
  LSTM_FUSED_FOREIGN_ISAS(LSTM_FUSED_ROW)
#undef LSTM_FUSED_ROW
      kKnownCount
};
inline constexpr int kIsaCount = static_cast<int>(Isa::kCount);            // compiled here
inline constexpr int kKnownIsaCount = static_cast<int>(Isa::kKnownCount);  // with those of others

struct IsaFacts {
  const char* name;
  int vector_bytes;
  int tile_cols;    // registers decide: kTileRows x 4 accumulators of 32 registers, x 2 of 16
  bool bf16_pairs;  // bfloat16 is multiplied two to a lane
};

constexpr IsaFacts facts(Isa isa) {
  constexpr IsaFacts all[] = {
#define LSTM_FUSED_ROW(Name, name, bytes, cols, pairs, available) {#name, bytes, cols, pairs},
      LSTM_FUSED_ISAS(LSTM_FUSED_ROW) LSTM_FUSED_FOREIGN_ISAS(LSTM_FUSED_ROW)
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
