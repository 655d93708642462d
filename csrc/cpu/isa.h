// Instruction sets: the code of one is in the file isa_<name>.cpp.
#pragma once

#include "../cells/cells.h"

namespace lstm_fused {

// What the code of an ISA is for: everything, or the one kind of product that it has instructions
// for; then an earlier row runs the rest.
enum class Products : int { kAll, kBytes, kBFloat16Pairs };

// Every ISA there is, by architecture, slowest first, a row each: its name, bytes of a vector,
// vectors of a register tile of six rows, its Products, and whether this machine has it.
#define LSTM_FUSED_X86_64_ISAS(ISA)                           \
  ISA(Baseline, baseline, 16, 2, kAll, true)                  \
  ISA(Avx2, avx2, 32, 2, kAll, kHasAvx2)                      \
  ISA(Avx512, avx512, 64, 4, kAll, kHasAvx512)                \
  ISA(Avx512Vnni, avx512_vnni, 64, 4, kBytes, kHasAvx512Vnni) \
  ISA(Avx512Bf16, avx512_bf16, 64, 4, kBFloat16Pairs, kHasAvx512Bf16)
#define LSTM_FUSED_NEON_ISAS(ISA)    \
  ISA(Neon, neon, 16, 4, kAll, true) \
  ISA(NeonBf16, neon_bf16, 16, 4, kBFloat16Pairs, kHasNeonBf16)
#define LSTM_FUSED_SVE_ISAS(ISA)               \
  ISA(Sve256, sve256, 32, 4, kAll, kHasSve256) \
  ISA(Sve256Bf16, sve256_bf16, 32, 4, kBFloat16Pairs, kHasSve256Bf16)

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
#define LSTM_FUSED_ISAS(ISA) ISA(Baseline, baseline, 16, 2, kAll, true)
#define LSTM_FUSED_FOREIGN_ISAS(ISA) LSTM_FUSED_NEON_ISAS(ISA) LSTM_FUSED_SVE_ISAS(ISA)
#endif

inline constexpr int kTileRows = 6;

enum class Isa : int {
#define LSTM_FUSED_ROW(Name, name, bytes, cols, products, available) k##Name,
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
  int tile_cols;  // registers decide: kTileRows x 4 accumulators of 32 registers, x 2 of 16
  Products products;
};

constexpr IsaFacts facts(Isa isa) {
  constexpr IsaFacts all[] = {
#define LSTM_FUSED_ROW(Name, name, bytes, cols, products, available) \
  {#name, bytes, cols, Products::products},
      LSTM_FUSED_ISAS(LSTM_FUSED_ROW) LSTM_FUSED_FOREIGN_ISAS(LSTM_FUSED_ROW)
#undef LSTM_FUSED_ROW
  };
  return all[static_cast<int>(isa)];
}

// The ISA whose code runs these products where `isa` is chosen: the nearest row before that has
// them, or has all.
constexpr Isa isa_for(Isa isa, Products products) {
  int row = static_cast<int>(isa);
  const auto has = [&](Products wanted) { return facts(static_cast<Isa>(row)).products == wanted; };
  while (!has(products) && !has(Products::kAll)) --row;
  return static_cast<Isa>(row);
}

inline constexpr const char* name(Isa isa) {
  return facts(isa).name;
}

}  // namespace lstm_fused
