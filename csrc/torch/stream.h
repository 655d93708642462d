#pragma once

#include "python.h"

namespace lstm_fused {

// Adds the class `Stream`: a step of a module's layers that has been prepared (stream.cpp). Throws
// python::Failed.
void add_stream(PyObject* module);

}  // namespace lstm_fused
