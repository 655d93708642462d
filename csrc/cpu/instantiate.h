// The body of every ISA file: the kernels for all cells and dtypes, compiled for the instructions
// the file switched on before including this.
#pragma once

#include "activations.h"  // first: the cells name its functions

#include "../cells/derive.h"
#include "direct.h"
#include "gradients.h"
#include "kernels.h"
#include "quantized.h"

namespace lstm_fused {
namespace {

// The ISA file's macros agree with the ISA's row in isa.h.
constexpr IsaFacts kFacts = facts(Isa::LSTM_FUSED_ISA);
static_assert(kVectorBytes == kFacts.vector_bytes && kStripCols == kFacts.tile_cols);
#if defined(LSTM_FUSED_BF16_PAIRS)
static_assert(kFacts.products == Products::kBFloat16Pairs);
#elif defined(LSTM_FUSED_VNNI)
static_assert(kFacts.products == Products::kBytes);
#else
static_assert(kFacts.products == Products::kAll);
#endif
constexpr bool kAllProducts = kFacts.products == Products::kAll;

template <class S>
struct MultiplyOf {
  using type = Multiply<typename ComputeOf<S>::type>;
};
#if defined(LSTM_FUSED_BF16_PAIRS)
template <>
struct MultiplyOf<BFloat16> {
  using type = MultiplyPairs;
};
#endif

template <class Cell, class S>
using Persistent = PersistentForward<Cell, S, typename MultiplyOf<S>::type>;
template <class Cell, class S>
using Direct = DirectForward<Cell, S, typename ComputeOf<S>::type>;
template <class Cell, class S>
using Backward = Gradients<Cell, S, typename MultiplyOf<S>::type>;

// A kernel lays out its scratch memory when it is made; its Worker is one thread's part.
template <class Kernel>
bool run_made(Kernel& kernel, const Plan& plan) {
  kernel.init_barriers();
  return run_team(
      plan.threads,
      [](void* k, int i) { typename Kernel::Worker(*static_cast<Kernel*>(k), i).run(); }, &kernel);
}

template <class Kernel, class Params>
bool run(const Params& params, const Plan& plan) {
  Arena arena(params.scratch);
  Kernel kernel(params, plan, arena);
  return run_made(kernel, plan);
}

template <class Kernel, class Params>
int64_t scratch_bytes(const Params& params, const Plan& plan) {
  Arena arena(nullptr);
  Kernel kernel(params, plan, arena);
  return arena.used();
}

// The direct kernel multiplies no pairs: where there are pairs, its plan has the ISA without.
template <class Cell, class S>
bool forward(const ForwardParams& p, const Plan& plan) {
  if constexpr (kAllProducts && !kIsAny<Cell>) {
    if (plan.kernel == KernelKind::kDirect) return run<Direct<Cell, S>>(p, plan);
  }
  if constexpr (kAllProducts && Same<S, float>::value && !kIsAny<Cell>) {
    if (plan.kernel == KernelKind::kInt8) return run<QuantizedForward<Cell, Int8Weights>>(p, plan);
    if (plan.kernel == KernelKind::kBFloat16)
      return run<QuantizedForward<Cell, BFloat16Weights>>(p, plan);
  }
  return run<Persistent<Cell, S>>(p, plan);
}

template <class Cell, class S>
int64_t forward_scratch(const ForwardParams& p, const Plan& plan) {
  if constexpr (kAllProducts && !kIsAny<Cell>) {
    if (plan.kernel == KernelKind::kDirect) return scratch_bytes<Direct<Cell, S>>(p, plan);
  }
  if constexpr (kAllProducts && Same<S, float>::value && !kIsAny<Cell>) {
    if (plan.kernel == KernelKind::kInt8)
      return scratch_bytes<QuantizedForward<Cell, Int8Weights>>(p, plan);
    if (plan.kernel == KernelKind::kBFloat16)
      return scratch_bytes<QuantizedForward<Cell, BFloat16Weights>>(p, plan);
  }
  return scratch_bytes<Persistent<Cell, S>>(p, plan);
}

template <class Cell, class S>
bool backward(const BackwardParams& p, const Plan& plan) {
  Arena arena(p.scratch), lasting(p.lasting);
  Backward<Cell, S> kernel(p, plan, arena, p.lasting ? lasting : arena);
  return run_made(kernel, plan);
}

template <class Cell, class S>
int64_t backward_scratch(const BackwardParams& p, const Plan& plan) {
  Arena arena(nullptr), lasting(nullptr);
  Backward<Cell, S> kernel(p, plan, arena, p.lasting ? lasting : arena);
  return arena.used();
}

template <class Cell, class S>
int64_t backward_lasting(const BackwardParams& p, const Plan& plan) {
  Arena arena(nullptr), lasting(nullptr);
  Backward<Cell, S> kernel(p, plan, arena, lasting);
  return lasting.used();
}

template <class Cell, class S>
constexpr Kernel kernel() {
  Kernel k = {forward_scratch<Cell, S>,
              forward<Cell, S>,
              backward_scratch<Cell, S>,
              backward<Cell, S>,
              backward_lasting<Cell, S>,
              nullptr,
              nullptr,
              nullptr};
  if constexpr (sizeof(S) >= sizeof(float) && !kIsAny<Cell>) {
    using Tangents = Persistent<TangentOf<Cell>, S>;
    k.tangent_scratch = scratch_bytes<Tangents, TangentParams>;
    k.tangent = run<Tangents, TangentParams>;
  }
  return k;
}

template <class Cell, class S>
inline constexpr Kernel kKernel = kernel<Cell, S>();

// Of an ISA for products of bytes.
template <class Cell>
inline constexpr Kernel kInt8Kernel = {scratch_bytes<QuantizedForward<Cell, Int8Weights>>,
                                       run<QuantizedForward<Cell, Int8Weights>>};

// Null for the dtypes that are planned for another ISA.
template <class Cell, class S>
const Kernel* kernel_if_planned() {
  if constexpr (kFacts.products == Products::kBytes) {
    if constexpr (kIsAny<Cell>)
      return nullptr;
    else
      return Same<S, float>::value ? &kInt8Kernel<Cell> : nullptr;
  } else {
    if constexpr (kAllProducts || Same<S, BFloat16>::value) return &kKernel<Cell, S>;
    return nullptr;
  }
}

template <class Cell>
const Kernel* kernel_of_dtype(DType dtype) {
  switch (dtype) {
#define LSTM_FUSED_CASE(Name, name, Storage, Compute, Torch) \
  case DType::k##Name: return kernel_if_planned<Cell, Storage>();
    LSTM_FUSED_DTYPES(LSTM_FUSED_CASE)
#undef LSTM_FUSED_CASE
    default: return nullptr;
  }
}

// Of a described cell: those of all, with its functions.
template <class Cell, class S>
const Kernel* described_kernel() {
  if constexpr (kFacts.products == Products::kBytes ||
                !(kAllProducts || Same<S, BFloat16>::value)) {
    return nullptr;
  } else {
    using A = typename ComputeOf<S>::type;
    static constexpr UnitFunctions<A> functions = unit_functions<Cell, Vector<A>, A>();
    static constexpr UnitInfo unit = {Cell::kGates,       Cell::kPreacts,   Cell::kCells,
                                      Cell::kKeepsHidden, Cell::kVectors,   Cell::kMasks,
                                      functions.groups,   HasOperand<Cell>, &functions};
    static const Kernel found = [] {
      Kernel k = kKernel<AnyCell, S>;
      k.unit = &unit;
      return k;
    }();
    return &found;
  }
}

template <class Cell>
const Kernel* described_kernel_of(DType dtype) {
  switch (dtype) {
#define LSTM_FUSED_CASE(Name, name, Storage, Compute, Torch) \
  case DType::k##Name: return described_kernel<Cell, Storage>();
    LSTM_FUSED_DTYPES(LSTM_FUSED_CASE)
#undef LSTM_FUSED_CASE
    default: return nullptr;
  }
}

const Kernel* kernel_of(CellKind cell, DType dtype) {
  switch (cell) {
#define LSTM_FUSED_CASE(name, Cell) \
  case CellKind::k##Cell: return kernel_of_dtype<Cell>(dtype);
    LSTM_FUSED_CELLS(LSTM_FUSED_CASE)
#undef LSTM_FUSED_CASE
#define LSTM_FUSED_CASE(name, Cell) \
  case CellKind::k##Cell: return described_kernel_of<Cell>(dtype);
    LSTM_FUSED_DESCRIBED_CELLS(LSTM_FUSED_CASE)
#undef LSTM_FUSED_CASE
    default: return nullptr;
  }
}

}  // namespace
}  // namespace lstm_fused
