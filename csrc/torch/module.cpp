// `import lstm_fused._C` loads the operators. The module itself holds what is called past torch's
// dispatcher.
#include "../python_objects.h"
#include "eager.h"
#include "inference.h"
#include "stream.h"

namespace {

template <class F>
PyMethodDef method(const char* name, F function, const char* doc) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)),
          METH_FASTCALL, doc};
}

}  // namespace

PyMODINIT_FUNC PyInit__C(void) {
  static PyMethodDef methods[] = {
      method("infer", lstm_fused::infer,
             "infer(names, params, x, hx, cell, directions, layers, hidden_size, proj_size, "
             "batch_first): inference"),
      method("forward", lstm_fused::forward,
             "forward(x, batch_sizes, state0, weights, cell, directions): recurrent_forward"),
      method("backward", lstm_fused::backward,
             "backward(x, batch_sizes, state0, weights, y, gates, saved_states, dy, dh_n, dc_n, "
             "cell, directions, mask): recurrent_backward"),
      {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return lstm_fused::python::guarded([] {
    PyObject* module = lstm_fused::python::checked(PyModule_Create(&definition));
    lstm_fused::add_stream(module);
    return module;
  });
}
