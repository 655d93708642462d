// The fast path for inference: `infer` reads tensors through DLPack and skips torch's dispatcher,
// which costs a call at T = 1 several times the kernel's time. It refuses nothing and copies
// nothing: a call that something observes (a mode, a transform) or that does not fit is left to the
// operator by returning None. Where a gradient is to be recorded it returns the tensors it has
// found fit, for the autograd.Function.
#include "inference.h"

#include <array>
#include <cstring>
#include <exception>
#include <new>
#include <vector>

#include "../cpu/launch.h"
#include "../layer.h"
#include "python_torch.h"

namespace lstm_fused {
namespace {

int dtype_of(const dlpack::Tensor& t) {
  for (int i = 0; i < kDTypeCount; ++i) {
    const DType dtype = static_cast<DType>(i);
    const uint8_t code = dtype == DType::kBFloat16 ? dlpack::kBfloat : dlpack::kFloat;
    if (t.type_code == code && t.type_bits == 8 * storage_bytes(dtype)) return i;
  }
  if (t.type_code == dlpack::kInt && t.type_bits == 8) return kInt8;
  return kOtherDType;
}

// Reads and makes tensors of one call.
struct TensorObjects {
  const Torch& torch;
  const bool grad;        // grad mode is on
  bool recorded = false;  // a tensor that has been read requires a gradient

  // A view of a plain tensor on the CPU; false for any other object.
  bool view(PyObject* object, TensorView& to) {
    if (!torch.is_plain(object)) return false;
    if (grad && !recorded) {
      const Owned wanted(PyObject_GetAttr(object, torch.requires_grad));
      recorded = wanted.p != Py_False;
    }
    dlpack::Tensor t;
    if (torch.dlpack->dltensor_from_py_object_no_sync(object, &t) != 0) return false;
    to = {static_cast<char*>(t.data) + t.byte_offset, t.ndim, t.shape, t.strides, dtype_of(t)};
    return t.device_type == dlpack::kCpu && (t.data || to.is_empty());  // zeros may have no memory
  }

  // A new tensor of x's dtype; like: one of the same shape and contiguous, or null. empty_like is
  // quicker than new_empty.
  Owned allocate(PyObject* x, PyObject* like, const int64_t* shape, int64_t dims, void*& to) const {
    Owned made(nullptr);
    if (like) {
      made.p = PyObject_CallFunctionObjArgs(torch.empty_like, like, nullptr);
    } else {
      const Owned sizes(PyTuple_New(dims));
      for (int64_t i = 0; sizes.p && i < dims; ++i)
        PyTuple_SetItem(sizes.p, i, PyLong_FromLongLong(shape[i]));
      if (sizes.p) made.p = PyObject_CallMethodObjArgs(x, torch.new_empty, sizes.p, nullptr);
    }
    dlpack::Tensor t;
    if (!made.p || torch.dlpack->dltensor_from_py_object_no_sync(made.p, &t) != 0) return made;
    to = static_cast<char*>(t.data) + t.byte_offset;
    if (poisoning()) {
      int64_t bytes = t.type_bits / 8;
      for (int64_t i = 0; i < dims; ++i) bytes *= shape[i];
      std::memset(to, 0xff, bytes);
    }
    return made;
  }
};

// A tensor's view with three dimensions: (T, N, I) of a step's (N, I) or (I,), or a part of a
// state. Sizes and strides are members.
struct View3 {
  int64_t sizes[3], strides[3];
  void* data = nullptr;
  int dtype = kOtherDType;

  TensorView view() const { return {data, 3, sizes, strides, dtype}; }
  bool rows_are_contiguous() const { return strides[2] == 1 || sizes[2] == 1; }
};

View3 contiguous3(void* data, int dtype, int64_t a, int64_t b, int64_t c) {
  return {{a, b, c}, {b * c, c, 1}, data, dtype};
}

// Whether the strides are those of a new tensor, so that empty_like gives contiguous memory. (A
// contiguous tensor may have any stride in a dimension of size 1.)
bool has_default_strides(const TensorView& t) {
  int64_t pitch = 1;
  for (int64_t i = t.dim; i-- > 0; pitch *= t.sizes[i])
    if (t.strides[i] != pitch) return false;
  return true;
}

View3 with_three_dims(const TensorView& x) {
  View3 v{{1, 1, 1}, {0, 0, 1}, x.data, x.dtype};
  for (int64_t i = 0; i < x.dim; ++i) {
    v.sizes[3 - x.dim + i] = x.sizes[i];
    v.strides[3 - x.dim + i] = x.strides[i];
  }
  return v;
}

// A state over all layers.
struct State {
  PyObject* like = nullptr;  // the initial one, if empty_like of it is contiguous
  char* initial = nullptr;   // or null for zeros
  void* final = nullptr;
  int64_t width = 0;
};

void run_layer(const Layer& layer, ForwardParams& p) {
  const LayerSizes& s = layer.size;
  const Problem problem = problem_of(layer, false);
  const int64_t products = s.steps.T * s.steps.N * s.D * info(layer.cell).gates * s.H * (s.I + s.R);
  const MaybeUnlocked lock(products);
  launch(problem, p);
}

// A call of a module's layers, or of a cell's single step.
class Inference {
 public:
  Inference(const Torch& torch, PyObject* names, PyObject* params, PyObject* x, PyObject* hx,
            long cell, long directions, long layers, bool step)
      : tensors_{torch, !Torch::answers(torch.grad_enabled, Py_False)},
        names_(names),
        params_(params),
        x_object_(x),
        hx_(hx),
        cell_(cell),
        D_(directions),
        L_(layers),
        step_(step) {}

  // Describes every layer; false if the call is not one for the fast path.
  bool describe() {
    TensorView x;
    if (!tensors_.view(x_object_, x) || (step_ ? x.dim != 1 && x.dim != 2 : x.dim != 3))
      return false;
    dims_ = x.dim;
    x_ = with_three_dims(x);
    const int64_t T = x_.sizes[0], N = x_.sizes[1];
    if (!x_.rows_are_contiguous() || T == 0 || N == 0) return false;
    x_has_default_strides_ = has_default_strides(x);
    states_ = info(static_cast<CellKind>(cell_)).carry == Carry::kCell ? 2 : 1;
    if (!read_states()) return false;
    layers_.reserve(L_);
    for (long k = 0; k < L_; ++k)
      if (!describe_one(k)) return false;
    const LayerSizes& s = layers_[0].size;
    state_[0].width = s.R;
    state_[1].width = s.H;
    return true;
  }

  // A gradient is to be recorded: an autograd.Function is to make the call, not run().
  bool recorded() const { return tensors_.recorded; }

  // The tensors of the call: x, the states, the weights.
  PyObject* tensors() const {
    const Py_ssize_t states = hx_ == Py_None ? 0 : states_, count = PyList_Size(names_);
    PyObject* all = PyList_New(1 + states + count);
    if (!all) return nullptr;
    const auto put = [&](Py_ssize_t i, PyObject* t) { PyList_SetItem(all, i, Py_NewRef(t)); };
    put(0, x_object_);
    for (Py_ssize_t i = 0; i < states; ++i) put(1 + i, state_object(i));
    for (Py_ssize_t i = 0; i < count; ++i)
      put(1 + states + i, PyDict_GetItemWithError(params_, PyList_GetItem(names_, i)));
    return all;
  }

  // The result as the module returns it, or null with a Python error. A single step returns its
  // states alone, with as many dimensions as x.
  PyObject* run() {
    const LayerSizes& s = layers_[0].size;
    const int64_t N = s.steps.N;
    Owned ends[2] = {Owned(nullptr), Owned(nullptr)};
    for (int i = 0; i < states_; ++i) {
      const int64_t shape[3] = {L_ * D_, N, state_[i].width};
      ends[i].p =
          tensors_.allocate(x_object_, state_[i].like, shape + 3 - dims_, dims_, state_[i].final)
              .release();
      if (!state_[i].final) return nullptr;
    }
    const int64_t y_shape[3] = {s.steps.T, N, D_ * s.R};
    Owned y(nullptr);
    for (long k = 0; k < L_; ++k) {
      ForwardParams p = params_of<ForwardParams>(layers_[k]);
      p.h_n = part(k, state_[0], state_[0].final);
      if (states_ == 2) p.c_n = part(k, state_[1], state_[1].final);
      PyObject* below = k > 0 ? y.p : x_has_default_strides_ ? x_object_ : nullptr;
      PyObject* like = k > 0 || s.I == y_shape[2] ? below : nullptr;
      Owned above(nullptr);
      if (step_)
        p.y = p.h_n;  // the same values
      else
        above.p = tensors_.allocate(x_object_, like, y_shape, 3, p.y).release();
      if (!p.y) return nullptr;
      run_layer(layers_[k], p);
      if (k + 1 < L_) layers_[k + 1].x.data = p.y;
      const Owned read(y.p);  // the layer below's output, no longer needed
      y.p = above.release();
    }
    PyObject* end = states_ == 2 ? PyTuple_Pack(2, ends[0].p, ends[1].p) : ends[0].release();
    if (step_) return end;
    const Owned owned(end);
    return end ? PyTuple_Pack(2, y.p, end) : nullptr;
  }

 private:
  // Layer k's part of a state over all layers.
  void* part(long k, const State& state, void* base) const {
    const int64_t elements = k * D_ * x_.sizes[1] * state.width;
    return static_cast<char*>(base) + elements * storage_bytes(static_cast<DType>(x_.dtype));
  }

  PyObject* state_object(int i) const { return states_ == 2 ? PyTuple_GetItem(hx_, i) : hx_; }

  bool read_states() {
    if (hx_ == Py_None) return true;
    if (states_ == 2 && (!PyTuple_CheckExact(hx_) || PyTuple_Size(hx_) != 2)) return false;
    for (int i = 0; i < states_; ++i) {
      PyObject* given = state_object(i);
      TensorView t;
      if (!tensors_.view(given, t) || !t.is_contiguous() || t.dim != dims_) return false;
      if (dims_ == 3 && t.size(0) != L_ * D_) return false;
      if (dims_ > 1 && t.size(dims_ - 2) != x_.sizes[1]) return false;
      if (has_default_strides(t)) state_[i].like = given;
      state_[i].initial = static_cast<char*>(t.data);
      state_[i].width = t.size(dims_ - 1);
      if (t.dtype != x_.dtype) return false;
    }
    return true;
  }

  bool describe_one(long k) {
    const size_t each = PyList_Size(names_) / L_;
    std::array<TensorView, 10> weights;
    if (each > weights.size()) return false;
    for (size_t i = 0; i < each; ++i) {
      PyObject* w = PyDict_GetItemWithError(params_, PyList_GetItem(names_, k * each + i));
      if (!w || !tensors_.view(w, weights[i]) || !weights[i].is_contiguous()) return false;
    }
    // The input of a layer above the first gets its memory when the layer below has run.
    const int64_t width = k ? D_ * layers_[k - 1].size.R : 0;
    const View3 input = k ? contiguous3(nullptr, x_.dtype, x_.sizes[0], x_.sizes[1], width) : x_;
    View3 states[2];
    TensorView views[2];
    for (int i = 0; i < states_; ++i) {
      states[i] = contiguous3(state_[i].initial ? part(k, state_[i], state_[i].initial) : nullptr,
                              x_.dtype, D_, x_.sizes[1], state_[i].width);
      views[i] = states[i].view();
    }
    const size_t given = state_[0].initial ? states_ : 0;
    try {
      layers_.push_back(describe_layer(
          {input.view(), std::nullopt, {views, given}, {weights.data(), each}, cell_, D_}));
    } catch (const std::runtime_error&) {
      return false;  // the operator refuses it, and says why
    }
    return true;
  }

  TensorObjects tensors_;
  PyObject *const names_, *const params_;  // list of names, and the dict they are in
  PyObject *const x_object_, *const hx_;
  const long cell_, D_, L_;
  const bool step_;
  int64_t dims_ = 0;
  int states_ = 0;
  View3 x_;
  bool x_has_default_strides_ = false;
  State state_[2];
  std::vector<Layer> layers_;
};

// args: names, params, x, hx, cell; for a layer's steps directions and layers too.
PyObject* infer_checked(PyObject* const* args, bool step) {
  const auto leave = [] {
    PyErr_Clear();
    return Py_NewRef(Py_None);
  };
  const Torch* torch = Torch::get();
  if (!torch || !torch->nothing_observes()) return leave();
  const long cell = PyLong_AsLong(args[4]);
  const long D = step ? 1 : PyLong_AsLong(args[5]), L = step ? 1 : PyLong_AsLong(args[6]);
  const bool fits = PyList_CheckExact(args[0]) && PyDict_CheckExact(args[1]) && cell >= 0 &&
                    cell < kCellCount && (D == 1 || D == 2) && L >= 1 &&
                    PyList_Size(args[0]) >= L * D;
  if (!fits) return leave();
  Inference call(*torch, args[0], args[1], args[2], args[3], cell, D, L, step);
  if (!call.describe()) return leave();
  return call.recorded() ? call.tensors() : call.run();
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
