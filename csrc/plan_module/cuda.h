// Plans for a CUDA device as Python objects, a part of lstm_fused._plan.
#pragma once

#include <pybind11/pybind11.h>

namespace lstm_fused::cuda {

void define_plans(pybind11::module_& m);

}  // namespace lstm_fused::cuda
