#include "kernels.h"

#include <array>

namespace lstm_fused {
namespace {

bool machine_has(Isa isa) {
#if defined(__x86_64__)
#define HAS(feature) static_cast<bool>(__builtin_cpu_supports(feature))
  __builtin_cpu_init();
  const bool kHasAvx2 = HAS("avx2") && HAS("fma") && HAS("f16c");
  const bool kHasAvx512 =
      kHasAvx2 && HAS("avx512f") && HAS("avx512bw") && HAS("avx512dq") && HAS("avx512vl");
#else
#define HAS(feature) false
  constexpr bool kHasAvx2 = false, kHasAvx512 = false;
#endif
  const bool available[] = {
#define LSTM_FUSED_ROW(Name, name, bytes, cols, pairs, available) available,
      LSTM_FUSED_ISAS(LSTM_FUSED_ROW)
#undef LSTM_FUSED_ROW
#undef HAS
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
  constexpr decltype(&kernels_baseline) tables[] = {
#define LSTM_FUSED_ROW(Name, name, bytes, cols, pairs, available) kernels_##name,
      LSTM_FUSED_ISAS(LSTM_FUSED_ROW)
#undef LSTM_FUSED_ROW
  };
  return *tables[static_cast<int>(isa)](cell, dtype);
}

}  // namespace lstm_fused
