#include "registry.h"

#include <array>
#include <deque>
#include <mutex>

#include "../check.h"

namespace lstm_fused {
namespace {

struct Registered {
  std::string name;
  std::array<std::array<UnitInfo, 2>, kIsaCount> units;  // of float and of double
  std::array<std::array<Kernel, kDTypeCount>, kIsaCount> kernels;
};

std::deque<Registered>& registered() {
  static std::deque<Registered> cells;
  return cells;
}

Registered& at(CellKind cell) {
  return registered().at(static_cast<int>(cell) - kCellCount);
}

const Kernel* described_kernel(Isa isa, DType dtype) {
  constexpr const Kernel* (*tables[])(DType) = {
#define LSTM_FUSED_ROW(Name, name, bytes, cols, products, available) described_kernels_##name,
      LSTM_FUSED_ISAS(LSTM_FUSED_ROW)
#undef LSTM_FUSED_ROW
  };
  return tables[static_cast<int>(isa)](dtype);
}

}  // namespace

CellKind register_cell(const std::string& name, const CellInfo& cell) {
  static std::mutex lock;
  const std::lock_guard<std::mutex> guard(lock);
  for (int k = 0; k < cell_count(); ++k)
    LSTM_FUSED_CHECK(name != info(static_cast<CellKind>(k)).name, "cell ", name, " is known");
  LSTM_FUSED_CHECK(1 <= cell.gates && cell.gates <= AnyCell::kGates && cell.gates <= cell.preacts &&
                       cell.preacts <= 2 * cell.gates,
                   "there are no kernels for ", cell.gates, " gates of ", cell.preacts,
                   " pre-activations");
  LSTM_FUSED_CHECK(cell.vectors <= kMaxUnitValues && cell.masks <= kMaxUnitValues,
                   "a cell has at most ", kMaxUnitValues, " vectors, and masks");
  registered().push_back({name, {}, {}});
  CellInfo known = cell;
  known.name = registered().back().name.c_str();
  known.described = true;
  registered_cells().push_back(known);
  return static_cast<CellKind>(cell_count() - 1);
}

void register_functions(CellKind cell, Isa isa, const void* of_float, const void* of_double) {
  Registered& own = at(cell);
  const int row = static_cast<int>(isa);
  own.units[row] = {unit_info(cell, of_float), unit_info(cell, of_double)};
  for (int i = 0; i < kDTypeCount; ++i) {
    const DType dtype = static_cast<DType>(i);
    const Kernel* kernel = described_kernel(isa, dtype);
    if (!kernel) continue;
    own.kernels[row][i] = *kernel;
    own.kernels[row][i].unit = &own.units[row][dtype == DType::kFloat64];
  }
}

const Kernel& registered_kernel(Isa isa, CellKind cell, DType dtype) {
  const Kernel& kernel = at(cell).kernels[static_cast<int>(isa)][static_cast<int>(dtype)];
  LSTM_FUSED_CHECK(kernel.forward, "cell ", name(cell), " was not compiled for ", name(isa));
  return kernel;
}

}  // namespace lstm_fused
