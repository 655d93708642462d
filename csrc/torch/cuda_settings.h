// What a call on a CUDA device depends on beside its tensors: the device, a forced plan, and
// torch's switch for TF32.
#pragma once

#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "../cuda/device.h"
#include "../cuda/kernels.h"
#include "cuda_guard.h"
#include "cuda_products.h"
#include "python.h"

namespace lstm_fused::cuda {

// Asked once for each device: the driver takes its time. Fails where the kernels cannot run on it.
inline Device device_of(int index) {
  static std::mutex mutex;
  static std::vector<std::optional<Device>> known;
  const std::lock_guard lock(mutex);
  const size_t at = index < 0 ? 0 : index;
  if (known.size() <= at) known.resize(at + 1);
  if (!known[at]) {
    check_cublas();
    Device device{};
    const Guard guard(index);
    check(read_device(static_cast<int>(at), device), "device");
    known[at] = device;
  }
  return *known[at];
}

// A value that any thread may read and set.
template <class T>
class Shared {
 public:
  void set(T value) {
    const std::lock_guard lock(mutex_);
    value_ = std::move(value);
  }
  T get() {
    const std::lock_guard lock(mutex_);
    return value_;
  }

 private:
  std::mutex mutex_;
  T value_{};
};

// What ran last on any thread, since autograd has threads of its own.
struct LastRun {
  DType dtype;
  std::optional<Plan> plan;  // none before any call
};

inline Shared<LastRun>& last_run() {
  static Shared<LastRun> last;
  return last;
}

// The plan that every layer runs whose workspace fits it; the best one if empty.
inline Shared<std::optional<PlanKind>>& forced_kind() {
  static Shared<std::optional<PlanKind>> kind;
  return kind;
}

inline void force_plan(std::string wanted) {
  if (wanted.empty()) return forced_kind().set(std::nullopt);
  for (int kind = 0; kind < kPlanKinds; ++kind)
    if (wanted == name(static_cast<PlanKind>(kind)))
      return forced_kind().set(static_cast<PlanKind>(kind));
  refuse("no such plan: ", wanted);
}

// Whether torch lets recurrent layers have TF32: torch.backends.cudnn.rnn.fp32_precision, the
// switch of nn.LSTM on cuDNN. Only torch's Python side tells; a program without Python has torch's
// default.
inline bool tf32_allowed() {
  if (!PyGILState_Ensure || !Py_IsInitialized || !Py_IsInitialized()) return true;
  const PyGILState_STATE state = PyGILState_Ensure();
  static PyObject* const rnn = [] {
    PyObject* backends = PyImport_ImportModule("torch.backends.cudnn");
    return backends ? PyObject_GetAttrString(backends, "rnn") : nullptr;
  }();
  PyObject* precision = rnn ? PyObject_GetAttrString(rnn, "fp32_precision") : nullptr;
  const bool allowed = precision && PyUnicode_CompareWithASCIIString(precision, "tf32") == 0;
  if (!precision) PyErr_Clear();
  Py_XDECREF(precision);
  PyGILState_Release(state);
  return allowed;
}

}  // namespace lstm_fused::cuda
