// `import lstm_fused._C` loads the operators. The module itself holds the fast path for
// inference.
#include "inference.h"

extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static PyMethodDef methods[] = {
      {"infer", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&lstm_fused::infer)),
       METH_FASTCALL,
       "infer(names, params, x, hx, cell[, directions, layers]): inference past the dispatcher"},
      {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
