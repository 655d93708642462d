#include "kernels.h"

namespace lstm_fused {
namespace {

const Kernel* find(Isa isa, CellKind cell, DType dtype) {
  switch (isa) {
    case Isa::kBaseline: return kernels_baseline(cell, dtype);
    case Isa::kAvx2: return kernels_avx2(cell, dtype);
    case Isa::kAvx512: return kernels_avx512(cell, dtype);
    case Isa::kAvx512Bf16: return kernels_avx512_bf16(cell, dtype);
  }
  return nullptr;
}

bool machine_has(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  switch (isa) {
    case Isa::kBaseline: return true;
    case Isa::kAvx2: return avx2;
    case Isa::kAvx512: return avx512;
    case Isa::kAvx512Bf16: return avx512 && __builtin_cpu_supports("avx512bf16");
  }
#endif
  return isa == Isa::kBaseline;
}

}  // namespace

bool runs(Isa isa) {
  static const bool has[kIsaCount] = {machine_has(Isa::kBaseline), machine_has(Isa::kAvx2),
                                      machine_has(Isa::kAvx512), machine_has(Isa::kAvx512Bf16)};
  return has[static_cast<int>(isa)];
}

Isa best_isa() {
  int isa = kIsaCount - 1;
  while (!runs(static_cast<Isa>(isa))) --isa;
  return static_cast<Isa>(isa);
}

const Kernel& kernel_for(Isa isa, CellKind cell, DType dtype) {
  return *find(isa, cell, dtype);
}

}  // namespace lstm_fused
