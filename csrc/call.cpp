// The short way from a module to the kernels for inference: `infer` looks at the tensors through
// DLPack and skips torch's dispatcher, which costs a call at T = 1 several times the kernel's time.
// Whatever is not plain (a mode of torch's that wants to see operators, a gradient, a mismatch of
// any kind) it leaves to the operator by returning None: it refuses nothing and copies nothing.
#include "call.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <exception>
#include <new>
#include <string>
#include <vector>

#include "dlpack.h"
#include "launch.h"

namespace lstm_fused {
namespace {

// Borrowed for the life of the process.
struct Torch {
  PyObject *tensor, *parameter;  // classes
  const dlpack::ExchangeApi* dlpack;
  PyObject *empty_like, *grad_enabled, *autocast_enabled, *tracing, *dispatch_modes,
      *function_modes, *functorch, *profiling;
  PyObject* forward_ad;
  PyObject *cpu, *new_empty, *requires_grad, *current_level;  // strings
};

PyObject* attribute(const char* module, const char* path) {
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

bool find(Torch& t) {
  const auto get = [](PyObject*& to, const char* module, const char* path) {
    return (to = attribute(module, path)) != nullptr;
  };
  PyObject* capsule;
  if (!get(t.tensor, "torch", "Tensor") || !get(t.parameter, "torch.nn", "Parameter") ||
      !get(capsule, "torch", "Tensor.__dlpack_c_exchange_api__") ||
      !get(t.empty_like, "torch", "empty_like") ||
      !get(t.grad_enabled, "torch", "is_grad_enabled") ||
      !get(t.autocast_enabled, "torch", "is_autocast_enabled") ||
      !get(t.tracing, "torch", "_C._is_tracing") ||
      !get(t.dispatch_modes, "torch", "_C._len_torch_dispatch_stack") ||
      !get(t.function_modes, "torch", "_C._len_torch_function_stack") ||
      !get(t.functorch, "torch", "_C._functorch.peek_interpreter_stack") ||
      !get(t.profiling, "torch", "_C._autograd._profiler_enabled") ||
      !get(t.forward_ad, "torch.autograd.forward_ad", ""))
    return false;
  t.dlpack =
      static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule, dlpack::kCapsule));
  t.cpu = PyUnicode_InternFromString("cpu");
  t.new_empty = PyUnicode_InternFromString("new_empty");
  t.requires_grad = PyUnicode_InternFromString("requires_grad");
  t.current_level = PyUnicode_InternFromString("_current_level");
  return t.dlpack && t.dlpack->major == 1;
}

// torch's pieces, or null where this torch has not got them all: then there is no short way.
const Torch* torch() {
  static Torch pieces{};
  static const bool found = find(pieces);
  if (!found) PyErr_Clear();
  return found ? &pieces : nullptr;
}

// An owned reference.
struct Owned {
  PyObject* p;
  explicit Owned(PyObject* object) : p(object) {}
  Owned(Owned&& other) : p(other.release()) {}
  Owned(const Owned&) = delete;
  ~Owned() { Py_XDECREF(p); }
  PyObject* release() {
    PyObject* object = p;
    p = nullptr;
    return object;
  }
};

// Whether function(argument) is `usual`, the answer when nothing special is going on.
bool answers(PyObject* function, PyObject* usual, PyObject* argument = nullptr) {
  const Owned answer(argument ? PyObject_CallOneArg(function, argument)
                              : PyObject_CallNoArgs(function));
  return answer.p == usual;
}

bool nobody_watches(const Torch& t) {
  static PyObject* const zero = PyLong_FromLong(0);  // small integers are the same object
  static PyObject* const none = PyLong_FromLong(-1);
  if (!answers(t.autocast_enabled, Py_False, t.cpu) || !answers(t.tracing, Py_False) ||
      !answers(t.dispatch_modes, zero) || !answers(t.function_modes, zero) ||
      !answers(t.functorch, Py_None) || !answers(t.profiling, Py_False))
    return false;
  const Owned level(PyObject_GetAttr(t.forward_ad, t.current_level));
  return level.p == none;
}

struct Call {
  const Torch& torch;
  const bool grad;  // gradients are recorded if asked for
  DType dtype{};

  // A view of a tensor that nothing forbids to read directly; contiguous unless `strided`.
  bool view(PyObject* object, dlpack::Tensor& to, bool strided = false) const {
    const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    if (type != torch.tensor && type != torch.parameter) return false;
    if (grad) {
      const Owned wanted(PyObject_GetAttr(object, torch.requires_grad));
      if (wanted.p != Py_False) return false;
    }
    if (torch.dlpack->dltensor_from_py_object_no_sync(object, &to) != 0) return false;
    if (to.device_type != dlpack::kCpu) return false;
    int64_t pitch = 1;
    for (int i = to.ndim; !strided && i-- > 0;) {
      if (to.shape[i] != 1 && to.strides[i] != pitch) return false;
      pitch *= to.shape[i];
    }
    to.data = static_cast<char*>(to.data) + to.byte_offset;
    return true;
  }

  static bool dtype_of(const dlpack::Tensor& t, DType& to) {
    if (t.type_code == dlpack::kFloat && t.type_bits == 32) return to = DType::kFloat32, true;
    if (t.type_code == dlpack::kFloat && t.type_bits == 64) return to = DType::kFloat64, true;
    if (t.type_code == dlpack::kFloat && t.type_bits == 16) return to = DType::kFloat16, true;
    if (t.type_code == dlpack::kBfloat && t.type_bits == 16) return to = DType::kBFloat16, true;
    return false;
  }

  bool has_dtype(const dlpack::Tensor& t) const {
    DType found;
    return dtype_of(t, found) && found == dtype;
  }

  // The data of a tensor of exactly this shape, or null.
  void* data(PyObject* object, const int64_t* shape, int dims, PyObject** like = nullptr) const {
    dlpack::Tensor t;
    if (!view(object, t) || t.ndim != dims || !has_dtype(t)) return nullptr;
    int64_t pitch = 1;
    bool plain = true;
    for (int i = dims; i-- > 0;) {
      if (t.shape[i] != shape[i]) return nullptr;
      plain = plain && t.strides[i] == pitch;
      pitch *= shape[i];
    }
    if (like) *like = plain ? object : nullptr;
    return t.data;
  }

  // A new tensor of x's dtype; like: one of the same shape and strides, if there is, which is
  // quicker to allocate after.
  Owned allocate(PyObject* x, PyObject* like, const int64_t* shape, int dims, void*& to) const {
    Owned made(nullptr);
    if (like) {
      made.p = PyObject_CallOneArg(torch.empty_like, like);
    } else {
      const Owned sizes(PyTuple_New(dims));
      for (int i = 0; sizes.p && i < dims; ++i)
        PyTuple_SET_ITEM(sizes.p, i, PyLong_FromLongLong(shape[i]));
      if (sizes.p) made.p = PyObject_CallMethodOneArg(x, torch.new_empty, sizes.p);
    }
    dlpack::Tensor t;
    if (!made.p || torch.dlpack->dltensor_from_py_object_no_sync(made.p, &t) != 0) return made;
    to = static_cast<char*>(t.data) + t.byte_offset;
    if (poisoning()) {
      int64_t size = t.type_bits / 8;
      for (int i = 0; i < dims; ++i) size *= shape[i];
      std::memset(to, 0xff, size);
    }
    return made;
  }
};

// What a layer reads: (T, N, I) by its strides.
struct Input {
  void* data;
  int64_t T, N, I, step, row;

  // x has three dimensions, or those of a single step.
  explicit Input(const dlpack::Tensor& x)
      : data(x.data),
        T(x.ndim > 2 ? x.shape[0] : 1),
        N(x.ndim > 1 ? x.shape[x.ndim - 2] : 1),
        I(x.shape[x.ndim - 1]),
        step(x.ndim > 2 ? x.strides[0] : 0),
        row(x.ndim > 1 ? x.strides[x.ndim - 2] : 0) {}
};

// A module's layers, one after the other, as far as they are plain.
struct Layers {
  Call call;
  CellKind cell;
  int D, L;
  PyObject *names, *params;  // list of names, and the dict they are in
  size_t each;               // weights to a direction
  LayerSizes size{};
  bool bias = false, projection = false;

  bool own_state() const { return info(cell).memory == Memory::kCell; }

  // Weight `i` of a direction of a layer; borrowed.
  PyObject* weight(int layer, int d, size_t i) const {
    PyObject* name = PyList_GET_ITEM(names, (layer * D + d) * each + i);
    return PyDict_GetItemWithError(params, name);
  }

  bool read_sizes(const Input& x) {
    each = PyList_GET_SIZE(names) / (L * D);
    bias = each >= 4;
    projection = each % 2 == 1;
    PyObject* w_hh = weight(0, 0, 1);
    dlpack::Tensor t;
    if (!w_hh || !call.view(w_hh, t) || t.ndim != 2 || each < 2 || each > 5) return false;
    size = {{x.T, x.N, nullptr, nullptr}, x.I, t.shape[0] / info(cell).gates, t.shape[1], D};
    return size.H > 0 && size.R > 0 && size.I > 0 && size.steps.T > 0 && size.steps.N > 0 &&
           (projection ? own_state() : size.R == size.H);
  }

  bool read_weights(int layer, std::array<Weights, 2>& to) const {
    const int64_t rows = info(cell).gates * size.H;
    const int64_t I = layer ? D * size.R : size.I;
    for (int d = 0; d < D; ++d) {
      const auto get = [&]<int Dims>(size_t i, const int64_t (&shape)[Dims]) -> void* {
        PyObject* w = weight(layer, d, i);
        return w ? call.data(w, shape, Dims) : nullptr;
      };
      const int64_t ih[2] = {rows, I}, hh[2] = {rows, size.R}, b[1] = {rows};
      const int64_t hr[2] = {size.R, size.H};
      to[d] = {get(0, ih), get(1, hh), bias ? get(2, b) : nullptr, bias ? get(3, b) : nullptr,
               projection ? get(each - 1, hr) : nullptr};
      if (!to[d].w_ih || !to[d].w_hh || (bias && (!to[d].b_ih || !to[d].b_hh)) ||
          (projection && !to[d].w_hr))
        return false;
    }
    return true;
  }
};

// Products of a layer that take less time than handing over the interpreter's lock.
constexpr int64_t kFewProducts = 100'000;

int64_t products(const LayerSizes& size, int64_t gates) {
  return size.steps.T * size.steps.N * size.D * gates * size.H * (size.I + size.R);
}

// The interpreter's lock is let go of.
class Unlocked {
 public:
  Unlocked() : state_(PyEval_SaveThread()) {}
  ~Unlocked() { PyEval_RestoreThread(state_); }
  Unlocked(const Unlocked&) = delete;

 private:
  PyThreadState* state_;
};

// An initial or final state over all layers; null data for zeros.
struct State {
  int64_t shape[3];
  char* initial = nullptr;
  PyObject* like = nullptr;
  void* last = nullptr;
};

// Runs all layers; x is read as `input` says. Returns the result as the module does, None to leave
// the call to the operator, or null with a Python error. A single step returns its states alone,
// with as many dimensions as x.
PyObject* run(Layers& m, PyObject* x, const dlpack::Tensor& view, PyObject* hx) {
  const Input input(view);
  const int dims = view.ndim;
  const bool single = dims < 3;
  const auto leave = [] {
    PyErr_Clear();
    return Py_NewRef(Py_None);
  };
  const LayerSizes& size = m.size;
  const int64_t T = size.steps.T, N = size.steps.N;
  const int states = m.own_state() ? 2 : 1;
  State state[2] = {{{m.L * m.D, N, size.R}}, {{m.L * m.D, N, size.H}}};
  if (hx != Py_None) {
    if (states == 2 && (!PyTuple_CheckExact(hx) || PyTuple_GET_SIZE(hx) != 2)) return leave();
    for (int i = 0; i < states; ++i) {
      PyObject* given = states == 2 ? PyTuple_GET_ITEM(hx, i) : hx;
      state[i].initial =
          static_cast<char*>(m.call.data(given, state[i].shape + 3 - dims, dims, &state[i].like));
      if (!state[i].initial) return leave();
    }
  }
  std::vector<std::array<Weights, 2>> weights(m.L);
  for (int k = 0; k < m.L; ++k)
    if (!m.read_weights(k, weights[k])) return leave();

  Owned ends[2] = {Owned(nullptr), Owned(nullptr)};
  for (int i = 0; i < states; ++i) {
    ends[i].p =
        m.call.allocate(x, state[i].like, state[i].shape + 3 - dims, dims, state[i].last).release();
    if (!state[i].last) return nullptr;
  }
  Owned y(nullptr);
  const int64_t y_shape[3] = {T, N, m.D * size.R};
  Input from = input;
  for (int k = 0; k < m.L; ++k) {
    ForwardParams p{};
    p.size = size;
    p.size.I = from.I;
    p.x = {from.data, from.step, from.row};
    std::copy(weights[k].begin(), weights[k].end(), p.weights);
    const auto part = [&](int i, void* base) -> void* {
      const int64_t elements = k * m.D * N * state[i].shape[2];
      return base ? static_cast<char*>(base) + elements * storage_bytes(m.call.dtype) : nullptr;
    };
    p.h0 = part(0, state[0].initial);
    p.h_n = part(0, state[0].last);
    if (states == 2) {
      p.c0 = part(1, state[1].initial);
      p.c_n = part(1, state[1].last);
    }
    const bool as_input = k > 0 || (size.I == y_shape[2] && view.strides[dims - 1] == 1 &&
                                    input.row == size.I && input.step == N * size.I);
    PyObject* before = k ? y.p : x;
    Owned made(nullptr);
    if (single) {
      p.y = p.h_n;  // the same values
    } else {
      made.p = m.call.allocate(x, as_input ? before : nullptr, y_shape, 3, p.y).release();
    }
    if (!p.y) return nullptr;
    const Problem problem = problem_of(m.cell, m.call.dtype, p.size, m.projection, false);
    if (products(p.size, info(m.cell).gates) <= kFewProducts) {
      launch(problem, p);
    } else {
      const Unlocked other_threads_run;
      launch(problem, p);
    }
    Owned old(y.p);  // the layer below's output, read until now
    y.p = made.release();
    if (k + 1 < m.L) {
      dlpack::Tensor above;
      if (!m.call.view(y.p, above)) return nullptr;
      from = Input(above);
    }
  }
  PyObject* end = states == 2 ? PyTuple_Pack(2, ends[0].p, ends[1].p) : ends[0].release();
  if (single) return end;
  const Owned owned_end(end);
  return end ? PyTuple_Pack(2, y.p, end) : nullptr;
}

// args: names, params, x, hx, cell; for a layer's steps directions and layers too.
PyObject* infer_checked(PyObject* const* args, bool single) {
  const Torch* t = torch();
  if (!t || !nobody_watches(*t)) {
    PyErr_Clear();
    return Py_NewRef(Py_None);
  }
  const long cell = PyLong_AsLong(args[4]);
  const long D = single ? 1 : PyLong_AsLong(args[5]), L = single ? 1 : PyLong_AsLong(args[6]);
  const bool fits = PyList_CheckExact(args[0]) && PyDict_CheckExact(args[1]) && cell >= 0 &&
                    cell < kCellCount && (D == 1 || D == 2) && L >= 1 &&
                    PyList_GET_SIZE(args[0]) >= L * D;
  Layers m{{*t, !answers(t->grad_enabled, Py_False)},
           static_cast<CellKind>(cell),
           static_cast<int>(D),
           static_cast<int>(L),
           args[0],
           args[1],
           0};
  dlpack::Tensor x;
  if (!fits || !m.call.view(args[2], x, true) ||
      (single ? x.ndim != 1 && x.ndim != 2 : x.ndim != 3) || !Call::dtype_of(x, m.call.dtype) ||
      (x.strides[x.ndim - 1] != 1 && x.shape[x.ndim - 1] != 1) || !m.read_sizes(Input(x))) {
    PyErr_Clear();
    return Py_NewRef(Py_None);
  }
  return run(m, args[2], x, args[3]);
}

}  // namespace

PyObject* infer(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 5 && count != 7) {
    PyErr_SetString(PyExc_TypeError,
                    "infer takes names, params, x, hx, cell, and directions, layers unless it is "
                    "one step");
    return nullptr;
  }
  try {
    return infer_checked(args, count == 5);
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

}  // namespace lstm_fused
