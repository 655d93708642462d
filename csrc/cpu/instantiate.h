// The body of every ISA file: all kernels for all cells and dtypes, compiled for the instructions
// the file switched on before including this.
#pragma once

#include "direct.h"
#include "gradients.h"
#include "kernels.h"

namespace lstm_fused {
namespace {

template <class S>
struct ForwardMultiply {
  using type = Multiply<typename ComputeOf<S>::type>;
};
#if defined(__AVX512BF16__)
template <>
struct ForwardMultiply<BFloat16> {
  using type = MultiplyPairs;
};
#endif

template <class Cell, class S>
using Persistent = PersistentForward<Cell, S, typename ForwardMultiply<S>::type>;
template <class Cell, class S>
using Direct = DirectForward<Cell, S, typename ComputeOf<S>::type>;

template <class Cell, class S>
bool forward(const ForwardParams& p, const Plan& plan) {
  return plan.kernel == KernelKind::kDirect ? run_forward<Direct<Cell, S>>(p, plan)
                                            : run_forward<Persistent<Cell, S>>(p, plan);
}

template <class Cell, class S>
int64_t forward_scratch(const ForwardParams& p, const Plan& plan) {
  return plan.kernel == KernelKind::kDirect ? scratch_of_forward<Direct<Cell, S>>(p, plan)
                                            : scratch_of_forward<Persistent<Cell, S>>(p, plan);
}

template <class Cell, class S>
inline constexpr Kernel kKernel = {forward_scratch<Cell, S>, forward<Cell, S>,
                                   scratch_of_backward<Cell, S>, run_backward<Cell, S>};

template <class Cell>
const Kernel* kernel_of_dtype(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return &kKernel<Cell, float>;
    case DType::kFloat64: return &kKernel<Cell, double>;
    case DType::kBFloat16: return &kKernel<Cell, BFloat16>;
    case DType::kFloat16: return &kKernel<Cell, Half>;
  }
  return nullptr;
}

const Kernel* kernel_of(CellKind cell, DType dtype) {
  switch (cell) {
#define LSTM_FUSED_CASE(name, Cell) \
  case CellKind::k##Cell: return kernel_of_dtype<Cell>(dtype);
    LSTM_FUSED_CELLS(LSTM_FUSED_CASE)
#undef LSTM_FUSED_CASE
    default: return nullptr;
  }
}

}  // namespace
}  // namespace lstm_fused
