#include "kernels.h"

#include <array>

#include "../compiler.h"
#include "registry.h"
#include "system.h"

namespace lstm_fused {
namespace {

bool machine_has(Isa isa) {
#if defined(__x86_64__)
#define HAS LSTM_FUSED_CPU_HAS
  const bool kHasAvx2 = HAS("avx2") && HAS("fma") && cpu_has_f16c();
  const bool kHasAvx512 =
      kHasAvx2 && HAS("avx512f") && HAS("avx512bw") && HAS("avx512dq") && HAS("avx512vl");
  const bool kHasAvx512Vnni = kHasAvx512 && HAS("avx512vnni");
  const bool kHasAvx512Bf16 = kHasAvx512Vnni && HAS("avx512bf16");
#undef HAS
#elif defined(__aarch64__)
  const Arm64Features arm64 = arm64_features();
  const bool kHasNeonBf16 = arm64.bf16;
  [[maybe_unused]] const bool kHasSve256 = arm64.sve_bytes == 32;
  [[maybe_unused]] const bool kHasSve256Bf16 = kHasSve256 && arm64.bf16;
#endif
  const bool available[] = {
#define LSTM_FUSED_ROW(Name, name, bytes, cols, products, available) available,
      LSTM_FUSED_ISAS(LSTM_FUSED_ROW)
#undef LSTM_FUSED_ROW
  };
  return available[static_cast<int>(isa)];
}

}  // namespace

bool runs(Isa isa) {
  static const std::array<bool, kIsaCount> has = [] {
    std::array<bool, kIsaCount> each;
    for (int i = 0; i < kIsaCount; ++i) each[i] = machine_has(static_cast<Isa>(i));
    return each;
  }();
  return has[static_cast<int>(isa)];
}

Isa best_isa() {
  int isa = kIsaCount - 1;
  while (!runs(static_cast<Isa>(isa))) --isa;
  return static_cast<Isa>(isa);
}

const Kernel& kernel_for(Isa isa, CellKind cell, DType dtype) {
  constexpr const Kernel* (*tables[])(CellKind, DType) = {
#define LSTM_FUSED_ROW(Name, name, bytes, cols, products, available) kernels_##name,
      LSTM_FUSED_ISAS(LSTM_FUSED_ROW)
#undef LSTM_FUSED_ROW
  };
  if (static_cast<int>(cell) >= kCellCount) return registered_kernel(isa, cell, dtype);
  return *tables[static_cast<int>(isa)](cell, dtype);
}

}  // namespace lstm_fused
