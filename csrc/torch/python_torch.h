// What calls past torch's dispatcher ask of torch's Python side: classes, modes and transforms.
#pragma once

#include <string>
#include <utility>

#include "dlpack.h"
#include "python.h"

namespace lstm_fused {

// An owned reference.
struct Owned {
  PyObject* p;
  explicit Owned(PyObject* object) : p(object) {}
  Owned(Owned&& other) : p(other.release()) {}
  Owned& operator=(Owned&& other) {
    std::swap(p, other.p);
    return *this;
  }
  Owned(const Owned&) = delete;
  ~Owned() { Py_XDECREF(p); }
  PyObject* release() {
    PyObject* object = p;
    p = nullptr;
    return object;
  }
};

// The interpreter's lock is released for a call of so many products, unless they are few: such a
// call takes less time than the lock takes to hand over.
class MaybeUnlocked {
 public:
  explicit MaybeUnlocked(int64_t products)
      : state_(products > kFewProducts ? PyEval_SaveThread() : nullptr) {}
  ~MaybeUnlocked() {
    if (state_) PyEval_RestoreThread(state_);
  }
  MaybeUnlocked(const MaybeUnlocked&) = delete;

 private:
  static constexpr int64_t kFewProducts = 100'000;
  PyThreadState* state_;
};

// Borrowed for the life of the process.
struct Torch {
  PyObject *tensor, *parameter;  // classes
  const dlpack::ExchangeApi* dlpack;
  PyObject *autocast_enabled, *tracing, *dispatch_modes, *function_modes, *functorch, *profiling;
  PyObject* forward_ad;
  PyObject* is_neg;  // of a tensor, without a lookup
  // Between lists of tensors and of the stable ABI's handles; null where this torch lacks them.
  PyObject *to_handles, *from_handles;
  PyObject *cpu, *detach, *requires_grad, *current_level;  // strings

  // Null where this torch lacks one of them: then there is no fast path.
  static const Torch* get() {
    static Torch torch{};
    static const bool found = torch.find();
    if (!found) PyErr_Clear();
    return found ? &torch : nullptr;
  }

  // Whether no mode, hook or transform of torch's observes a call: autocast, tracing, dispatch and
  // function modes, torch.func, the profiler, forward-mode autograd.
  bool nothing_observes() const {
    static PyObject* const zero = PyLong_FromLong(0);  // small integers are the same object
    if (!answers(autocast_enabled, Py_False, cpu) || !answers(tracing, Py_False) ||
        !answers(dispatch_modes, zero) || !answers(function_modes, zero) ||
        !answers(functorch, Py_None) || !answers(profiling, Py_False))
      return false;
    return !is_dual_level();
  }

  // Whether a level of forward-mode autograd has begun.
  bool is_dual_level() const {
    static PyObject* const none = PyLong_FromLong(-1);
    const Owned level(PyObject_GetAttr(forward_ad, current_level));
    return level.p != none;
  }

  // Whether the object is a tensor whose memory holds its values: no subclass, and no view whose
  // values are the negative of what lies there (z.conj().imag).
  bool is_plain(PyObject* object) const {
    return is_tensor(object) && answers(is_neg, Py_False, object);
  }
  bool is_tensor(PyObject* object) const {
    const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    return type == tensor || type == parameter;
  }

  // Whether function(argument) is `expected`.
  static bool answers(PyObject* function, PyObject* expected, PyObject* argument = nullptr) {
    const Owned answer(PyObject_CallFunctionObjArgs(function, argument, nullptr));
    return answer.p == expected;
  }

 private:
  static PyObject* attribute(const char* module, const char* path) {
    PyObject* found = PyImport_ImportModule(module);
    for (std::string rest = path; found && !rest.empty();) {
      const size_t dot = rest.find('.');
      PyObject* next = PyObject_GetAttrString(found, rest.substr(0, dot).c_str());
      Py_DECREF(found);
      found = next;
      rest = dot == std::string::npos ? "" : rest.substr(dot + 1);
    }
    return found;
  }

  bool find() {
    const auto get = [](PyObject*& to, const char* module, const char* path) {
      return (to = attribute(module, path)) != nullptr;
    };
    PyObject* capsule;
    if (!get(tensor, "torch", "Tensor") || !get(parameter, "torch.nn", "Parameter") ||
        !get(capsule, "torch", "Tensor.__dlpack_c_exchange_api__") ||
        !get(autocast_enabled, "torch", "is_autocast_enabled") ||
        !get(tracing, "torch", "_C._is_tracing") ||
        !get(dispatch_modes, "torch", "_C._len_torch_dispatch_stack") ||
        !get(function_modes, "torch", "_C._len_torch_function_stack") ||
        !get(functorch, "torch", "_C._functorch.peek_interpreter_stack") ||
        !get(profiling, "torch", "_C._autograd._profiler_enabled") ||
        !get(forward_ad, "torch.autograd.forward_ad", "") ||
        !get(is_neg, "torch", "_C.TensorBase.is_neg"))
      return false;
    dlpack =
        static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule, dlpack::kCapsule));
    if (!get(to_handles, "torch", "_C._aoti.unsafe_alloc_void_ptrs_from_tensors") ||
        !get(from_handles, "torch", "_C._aoti.alloc_tensors_by_stealing_from_void_ptrs")) {
      to_handles = nullptr;
      PyErr_Clear();
    }
    cpu = PyUnicode_InternFromString("cpu");
    detach = PyUnicode_InternFromString("detach");
    requires_grad = PyUnicode_InternFromString("requires_grad");
    current_level = PyUnicode_InternFromString("_current_level");
    return dlpack && dlpack->major == 1;
  }
};

}  // namespace lstm_fused
