// Cells of the user: described cells whose functions were compiled elsewhere (lstm_fused.
// compile_cell), for the ISAs of a machine.
#pragma once

#include "kernels.h"

namespace lstm_fused {

// A number for a cell, for as long as the process runs. Throws std::runtime_error for a name that
// is known, or for numbers of gates and pre-activations for which there are no kernels.
CellKind register_cell(const std::string& name, const CellInfo& cell);

// The functions of a registered cell in an ISA: UnitFunctions<float> and <double>, which outlive
// the process's last call.
void register_functions(CellKind cell, Isa isa, const void* of_float, const void* of_double);

// Throws std::runtime_error where the cell has no functions for the ISA.
const Kernel& registered_kernel(Isa isa, CellKind cell, DType dtype);

}  // namespace lstm_fused
