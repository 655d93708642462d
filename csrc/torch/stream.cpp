// The Python class of a stream: a call reads two tensors, compares the weights with those it has
// been prepared for, and runs the step (cpu/stream.h). It allocates nothing where it is given a
// tensor for the result.
#include "stream.h"

#include <algorithm>
#include <array>
#include <memory>

#include "../cpu/stream.h"
#include "../python_objects.h"
#include "python_tensors.h"

namespace lstm_fused {
namespace {

using python::checked, python::Failed;

constexpr const char* kBusy = "another thread runs a step of this stream";

[[noreturn]] void raise(PyObject* type, const std::string& message) {
  PyErr_SetString(type, message.c_str());
  throw Failed();
}

// A weight's memory and how it is laid out.
struct Layout {
  static constexpr int64_t kMaxDims = 5;
  void* data;
  int dtype;
  int64_t dim;
  std::array<int64_t, kMaxDims> sizes, strides;

  explicit Layout(const TensorView& t) : data(t.data), dtype(t.dtype), dim(t.dim) {
    std::copy_n(t.sizes, dim, sizes.begin());
    std::copy_n(t.strides, dim, strides.begin());
  }
  bool is_of(const TensorView& t) const {
    return data == t.data && dtype == t.dtype && dim == t.dim &&
           std::equal(t.sizes, t.sizes + dim, sizes.begin()) &&
           std::equal(t.strides, t.strides + dim, strides.begin());
  }
  TensorView view() const { return {data, dim, sizes.data(), strides.data(), dtype}; }
};

// The weights of a module, as they were when they were read.
class StreamWeights {
 public:
  // names: a list, layer by layer; params: the dict that they are looked up in.
  StreamWeights(const Torch& torch, PyObject* names, PyObject* params)
      : torch_(&torch),
        names_(Py_NewRef(names)),
        params_(Py_NewRef(params)),
        aliases_(checked(PyList_New(0))) {
    for (Py_ssize_t i = 0; i < PyList_Size(names_.p); ++i) {
      PyObject* w = find(i);
      TensorView t;
      if (!w || !read_plain(torch, w, t) || !t.is_contiguous() || t.dim > Layout::kMaxDims)
        raise(PyExc_RuntimeError,
              "a stream needs weights that are contiguous tensors on the CPU: parameters of the "
              "module itself, neither parametrized nor of a subclass");
      layouts_.emplace_back(t);
      const Owned alias(checked(PyObject_CallMethodObjArgs(w, torch.detach, nullptr)));
      if (PyList_Append(aliases_.p, alias.p) != 0) throw Failed();
    }
  }

  // Whether the module has these still.
  bool are_current() const {
    TensorView t;
    for (size_t i = 0; i < layouts_.size(); ++i) {
      PyObject* w = find(i);
      if (!w || !torch_->is_tensor(w) || !read_tensor(*torch_, w, t) || !layouts_[i].is_of(t))
        return false;
    }
    return true;
  }

  // Those that the module has now.
  StreamWeights read_anew() const { return {*torch_, names_.p, params_.p}; }

  // Of layer k of L.
  std::vector<TensorView> views(long k, long L) const {
    std::vector<TensorView> found;
    const size_t each = layouts_.size() / L;
    for (size_t i = k * each; i < (k + 1) * each; ++i) found.push_back(layouts_[i].view());
    return found;
  }

 private:
  PyObject* find(Py_ssize_t i) const {
    return PyDict_GetItemWithError(params_.p, PyList_GetItem(names_.p, i));
  }

  const Torch* torch_;
  Owned names_, params_;
  std::vector<Layout> layouts_;
  Owned aliases_;  // tensors that own the memory, also where the module's are given another
};

struct StreamSizes {
  long cell, L, N, I, H, R, threads;
  DType dtype;
  long hidden_size, proj_size;  // of quantized weights, else 0
};

class PythonStream {
 public:
  // h (2, L, N, R), c (2, L, N, H) or None: tensors of the states.
  PythonStream(const Torch& torch, StreamWeights weights, const StreamSizes& sizes, PyObject* h,
               PyObject* c)
      : torch_(torch),
        sizes_(sizes),
        weights_(std::move(weights)),
        h_(Py_NewRef(h)),
        c_(Py_NewRef(c)),
        stream_(described(weights_), {memory(h), memory(c)},
                static_cast<int>(std::min(sizes.threads, 4096L))) {}

  // x (N, I); out (N, R), or null for a new tensor. Returns that.
  PyObject* step(PyObject* x, PyObject* out) {
    follow_weights();
    const bool grad = aoti_torch_grad_mode_is_enabled();
    const LayerSizes& first = stream_.layer(0).size;
    const TensorView from = read(x, "x", grad, first.I);
    if (from.strides[1] != 1 && first.I > 1)
      throw std::invalid_argument("x's rows must be contiguous");
    if (out) {
      const TensorView to = read(out, "out", grad, first.R);
      if (!to.is_contiguous()) throw std::invalid_argument("out must be contiguous");
      check_apart(from, to);
      run(from, to.data);
      return Py_NewRef(out);
    }
    const int64_t shape[] = {first.steps.N, first.R};
    NewTensor made(shape, 2, sizes_.dtype);
    run(from, made.data());
    const AtenTensorHandle handle = made.release();
    const Owned all(checked(to_python(torch_, {&handle, 1})));
    return Py_NewRef(PyList_GetItem(all.p, 0));
  }

  // For callers from C, with the weights that the module has now.
  Stream* handle() {
    follow_weights();
    return &stream_;
  }
  int current() const { return stream_.current(); }

 private:
  std::vector<Layer> described(const StreamWeights& all) const {
    std::vector<Layer> layers;
    int64_t width = sizes_.I;
    for (long k = 0; k < sizes_.L; ++k) {
      const int64_t shape[] = {1, sizes_.N, width}, strides[] = {0, width, 1};
      const TensorView x{nullptr, 3, shape, strides, static_cast<int>(sizes_.dtype)};
      const std::vector<TensorView> weights = all.views(k, sizes_.L);
      LayerTensors layer{x, std::nullopt, {}, weights, sizes_.cell, 1};
      layer.hidden_size = sizes_.hidden_size;
      layer.proj_size = sizes_.proj_size;
      layers.push_back(describe_layer(layer));
      const LayerSizes& size = layers.back().size;
      LSTM_FUSED_CHECK(size.H == sizes_.H && size.R == sizes_.R,
                       "the weights are of other sizes than the stream's state");
      width = size.R;
    }
    return layers;
  }

  void follow_weights() {
    if (weights_.are_current()) return;
    PyErr_Clear();
    StreamWeights now = weights_.read_anew();
    LSTM_FUSED_CHECK(stream_.set_layers(described(now)), kBusy);
    weights_ = std::move(now);
  }

  void* memory(PyObject* state) const {
    TensorView t;
    if (state == Py_None) return nullptr;
    if (!read_tensor(torch_, state, t)) throw Failed();
    return t.data;
  }

  TensorView read(PyObject* object, const char* name, bool grad, int64_t width) const {
    TensorView t;
    if (!read_plain(torch_, object, t))
      raise(PyExc_TypeError, std::string(name) +
                                 " must be a torch.Tensor on the CPU: of no subclass, no view of "
                                 "negatives, and in no transform of torch.func");
    if (t.dtype != static_cast<int>(sizes_.dtype))
      throw std::invalid_argument(std::string(name) + " must be " + lstm_fused::name(sizes_.dtype) +
                                  " as the module is");
    const int64_t wanted[] = {sizes_.N, width};
    if (t.dim != 2 || t.size(0) != sizes_.N || t.size(1) != width)
      throw std::invalid_argument(std::string(name) + " has shape " + describe(t) +
                                  " but must be " + describe(wanted, 2));
    if (!grad) return t;
    const Owned recorded(PyObject_GetAttr(object, torch_.requires_grad));
    LSTM_FUSED_CHECK(recorded.p == Py_False && !torch_.is_dual_level(), name,
                     " may require a gradient, and a stream computes none: call it in "
                     "torch.no_grad(), or the module");
    return t;
  }

  static void check_apart(const TensorView& x, const TensorView& out) {
    const int64_t bytes = storage_bytes(static_cast<DType>(x.dtype));
    const char *from = static_cast<char*>(x.data), *to = static_cast<char*>(out.data);
    const char* const from_end = from + ((x.size(0) - 1) * x.strides[0] + x.size(1)) * bytes;
    const char* const to_end = to + out.size(0) * out.size(1) * bytes;
    if (from < to_end && to < from_end)
      throw std::invalid_argument("out must not share memory with x");
  }

  void run(const TensorView& x, void* out) {
    const MaybeUnlocked lock(stream_.products());
    LSTM_FUSED_CHECK(stream_.step(x.data, x.strides[0], out), kBusy);
  }

  const Torch& torch_;
  const StreamSizes sizes_;
  StreamWeights weights_;
  const Owned h_, c_;
  Stream stream_;
};

using Prepared = std::unique_ptr<PythonStream>;

PyObject* create(PyTypeObject* type, PyObject*, PyObject*) {
  const auto allocate = reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc));
  PyObject* object = allocate(type, 0);
  if (object) new (&python::value_of<Prepared>(object)) Prepared();
  return object;
}

PythonStream& stream_of(PyObject* self) {
  const Prepared& stream = python::value_of<Prepared>(self);
  LSTM_FUSED_CHECK(stream, "the stream has not been prepared");
  return *stream;
}

// _prepare(names, params, h, c, cell, inputs, threads[, hidden_size, proj_size]): names, params and
// the last two as infer takes them
PyObject* prepare(PyObject* self, PyObject* args, PyObject* kwargs) {
  PyObject *names, *params, *h, *c;
  StreamSizes sizes{};
  python::parse(
      args, kwargs, "O!O!OOlll|ll:_prepare",
      {"names", "params", "h", "c", "cell", "inputs", "threads", "hidden_size", "proj_size"},
      &PyList_Type, &names, &PyDict_Type, &params, &h, &c, &sizes.cell, &sizes.I, &sizes.threads,
      &sizes.hidden_size, &sizes.proj_size);
  const Torch* torch = Torch::get();
  LSTM_FUSED_CHECK(torch && torch->from_handles, "this torch lacks what a stream needs");
  StreamWeights weights(*torch, names, params);
  TensorView hs, cs;
  if (!read_tensor(*torch, h, hs) || (c != Py_None && !read_tensor(*torch, c, cs))) throw Failed();
  sizes.L = hs.size(1);
  sizes.N = hs.size(2);
  sizes.R = hs.size(3);
  sizes.H = c == Py_None ? sizes.R : cs.size(3);
  sizes.dtype = static_cast<DType>(hs.dtype);
  python::value_of<Prepared>(self) =
      std::make_unique<PythonStream>(*torch, std::move(weights), sizes, h, c);
  return Py_NewRef(Py_None);
}

// (x, out=None)
PyObject* step(PyObject* self, PyObject* args, PyObject* kwargs) {
  static PyObject* const name = PyUnicode_InternFromString("out");
  const Py_ssize_t given = PyTuple_Size(args), named = kwargs ? PyDict_Size(kwargs) : 0;
  PyObject* out = given == 2 ? PyTuple_GetItem(args, 1)
                  : named    ? PyDict_GetItemWithError(kwargs, name)
                             : nullptr;
  if (given < 1 || given + named > 2 || (named && !out))
    raise(PyExc_TypeError, "a stream is called as stream(x) or stream(x, out=y)");
  return stream_of(self).step(PyTuple_GetItem(args, 0), out == Py_None ? nullptr : out);
}

PyObject* c_step(PyObject* self, PyObject*, PyObject*) {
  const Owned function(checked(PyLong_FromVoidPtr(reinterpret_cast<void*>(&stream_step))));
  const Owned handle(checked(PyLong_FromVoidPtr(stream_of(self).handle())));
  return PyTuple_Pack(2, function.p, handle.p);
}

PyObject* current(PyObject* self, PyObject*, PyObject*) {
  return PyLong_FromLong(stream_of(self).current());
}

}  // namespace

void add_stream(PyObject* module) {
  static PyMethodDef methods[] = {
      python::method<prepare>("_prepare"),
      python::method<c_step>("c_step"),
      python::method<current>("_copy_read"),
      {},
  };
  const ternaryfunc call = python::guarded_function<step>;
  python::add_class<Prepared>(
      module, "lstm_fused._C.Stream",
      {{Py_tp_methods, methods}, {Py_tp_call, reinterpret_cast<void*>(call)}}, create,
      Py_TPFLAGS_BASETYPE);
}

}  // namespace lstm_fused
