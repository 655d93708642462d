// The fast path for inference: `infer` reads tensors through DLPack and skips torch's dispatcher,
// which costs a call at T = 1 several times the kernel's time. It refuses nothing and copies
// nothing: a call that something observes (a mode, a transform) or that does not fit is left to the
// operator by returning None. Where a gradient is to be recorded it returns the tensors it has
// found fit, for the autograd.Function.
#include "inference.h"

#include <array>
#include <exception>
#include <new>
#include <vector>

#include "../cpu/launch.h"
#include "../layer.h"
#include "python_tensors.h"

namespace lstm_fused {
namespace {

// Reads tensors of one call.
struct TensorReader {
  const Torch& torch;
  const bool grad;        // grad mode is on
  bool recorded = false;  // a tensor that has been read requires a gradient

  // A view of a plain tensor on the CPU; false for any other object.
  bool view(PyObject* object, TensorView& to) {
    if (!read_plain(torch, object, to)) return false;
    if (grad && !recorded) {
      const Owned wanted(PyObject_GetAttr(object, torch.requires_grad));
      recorded = wanted.p != Py_False;
    }
    return true;
  }
};

// A tensor's view with three dimensions: (T, N, I) of a step's (N, I) or (I,), or a part of a
// state. Sizes and strides are members.
struct View3 {
  int64_t sizes[3], strides[3];
  void* data = nullptr;
  int dtype = kOtherDType;

  TensorView view() const { return {data, 3, sizes, strides, dtype}; }
  void transpose() {
    std::swap(sizes[0], sizes[1]);
    std::swap(strides[0], strides[1]);
  }
  bool rows_are_contiguous() const { return strides[2] == 1 || sizes[2] == 1; }
};

View3 contiguous3(void* data, int dtype, int64_t a, int64_t b, int64_t c) {
  return {{a, b, c}, {b * c, c, 1}, data, dtype};
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
  char* initial = nullptr;  // or null for zeros
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

// A module: its layers, or the step of a cell.
struct Model {
  long cell, D, L;
  bool step, batch_first;
  long hidden_size, proj_size;  // of quantized weights
};

// A call of it.
class Inference {
 public:
  Inference(const Torch& torch, PyObject* names, PyObject* params, PyObject* x, PyObject* hx,
            const Model& model)
      : tensors_{torch, aoti_torch_grad_mode_is_enabled()},
        names_(names),
        params_(params),
        x_object_(x),
        hx_(hx),
        model_(model),
        D_(model.D),
        L_(model.L),
        step_(model.step) {}

  // Describes every layer; false if the call is not one for the fast path.
  bool describe() {
    TensorView x;
    if (!tensors_.view(x_object_, x) || (step_ ? x.dim != 1 && x.dim != 2 : x.dim != 3))
      return false;
    dims_ = x.dim;
    x_ = with_three_dims(x);
    if (model_.batch_first) x_.transpose();
    const int64_t T = x_.sizes[0], N = x_.sizes[1];
    if (!x_.rows_are_contiguous() || T == 0 || N == 0) return false;
    states_ = info(static_cast<CellKind>(model_.cell)).cells > 0 ? 2 : 1;
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
    std::optional<NewTensor> ends[2], y;
    for (int i = 0; i < states_; ++i) {
      const int64_t shape[3] = {L_ * D_, s.steps.N, state_[i].width};
      ends[i].emplace(shape + 3 - dims_, dims_, layers_[0].dtype);
      state_[i].final = ends[i]->data();
    }
    const int64_t y_shape[3] = {s.steps.T, s.steps.N, D_ * s.R};
    for (long k = 0; k < L_; ++k) {
      ForwardParams p = params_of<ForwardParams>(layers_[k]);
      p.h_n = part(k, state_[0], state_[0].final);
      if (states_ == 2) p.c_n = part(k, state_[1], state_[1].final);
      std::optional<NewTensor> above;
      const bool transposed = model_.batch_first && k + 1 == L_;
      if (!step_) above.emplace(y_shape, 3, layers_[0].dtype, transposed);
      p.y = step_ ? p.h_n : above->data();  // of a step the same values
      run_layer(layers_[k], p);
      if (k + 1 < L_) layers_[k + 1].x.data = p.y;
      y = std::move(above);  // the layer below's output is no longer needed
    }
    return returned(y, ends);
  }

 private:
  using MaybeNew = std::optional<NewTensor>;

  PyObject* returned(MaybeNew& y, MaybeNew (&ends)[2]) const {
    AtenTensorHandle handles[3];
    size_t count = 0;
    for (MaybeNew* t : {&y, &ends[0], &ends[1]})
      if (*t) handles[count++] = (*t)->release();
    const Owned made(to_python(tensors_.torch, {handles, count}));
    if (!made.p) return nullptr;
    const auto tensor = [&](Py_ssize_t i) { return PyList_GetItem(made.p, i); };
    const Py_ssize_t first = step_ ? 0 : 1;
    PyObject* end =
        states_ == 2 ? PyTuple_Pack(2, tensor(first), tensor(first + 1)) : Py_NewRef(tensor(first));
    if (step_) return end;
    const Owned owned(end);
    return end ? PyTuple_Pack(2, tensor(0), end) : nullptr;
  }

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
      state_[i].initial = static_cast<char*>(t.data);
      state_[i].width = t.size(dims_ - 1);
      if (t.dtype != x_.dtype) return false;
    }
    return true;
  }

  bool describe_one(long k) {
    const size_t each = PyList_Size(names_) / L_;
    std::array<TensorView, 16> weights;
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
      LayerTensors all{input.view(),           std::nullopt, {views, given},
                       {weights.data(), each}, model_.cell,  D_};
      all.hidden_size = model_.hidden_size;
      all.proj_size = model_.proj_size;
      layers_.push_back(describe_layer(all));
    } catch (const std::runtime_error&) {
      return false;  // the operator refuses it, and says why
    }
    return true;
  }

  TensorReader tensors_;
  PyObject *const names_, *const params_;  // list of names, and the dict they are in
  PyObject *const x_object_, *const hx_;
  const Model model_;
  const long D_, L_;
  const bool step_;
  int64_t dims_ = 0;
  int states_ = 0;
  View3 x_;
  State state_[2];
  std::vector<Layer> layers_;
};

PyObject* infer_checked(PyObject* const* args) {
  const auto leave = [] {
    PyErr_Clear();
    return Py_NewRef(Py_None);
  };
  const Torch* torch = Torch::get();
  if (!torch || !torch->to_handles || !torch->nothing_observes()) return leave();
  const auto number = [&](int i) { return PyLong_AsLong(args[i]); };
  const bool step = number(5) == 0;
  const Model m{number(4), step ? 1 : number(5),          number(6),
                step,      PyObject_IsTrue(args[9]) != 0, number(7),
                number(8)};
  const bool fits = PyList_CheckExact(args[0]) && PyDict_CheckExact(args[1]) && m.cell >= 0 &&
                    m.cell < kCellCount && !kCells[m.cell].described && (m.D == 1 || m.D == 2) &&
                    m.L >= 1 && PyList_Size(args[0]) >= m.L * m.D;
  if (!fits) return leave();
  Inference call(*torch, args[0], args[1], args[2], args[3], m);
  if (!call.describe()) return leave();
  return call.recorded() ? call.tensors() : call.run();
}

}  // namespace

PyObject* infer(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 10) {
    PyErr_SetString(PyExc_TypeError, "infer takes 10 arguments");
    return nullptr;
  }
  try {
    return infer_checked(args);
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

}  // namespace lstm_fused
