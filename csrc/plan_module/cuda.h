// The plans of CUDA layers as Python objects.
#pragma once

#include "../python_objects.h"

namespace lstm_fused::cuda {

// Adds the class CudaPlan and the functions cuda_... to the module.
void add_plans(PyObject* module);

}  // namespace lstm_fused::cuda
