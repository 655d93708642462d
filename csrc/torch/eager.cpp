// The operators' bodies on tensors that Python holds. Torch hands over the stable ABI's handles of
// a list of tensors in one call, which costs a tenth of what its dispatcher does with the same
// list.
#include "eager.h"

#include <exception>
#include <new>
#include <vector>

#include "cpu_device.h"
#include "python_tensors.h"

namespace lstm_fused {
namespace {

// Not one for this path: the operator takes the call.
struct Left : std::exception {};

PyObject* checked(PyObject* object) {
  if (!object) throw Left();
  return object;
}

// The tensors among a function's arguments.
class Arguments {
 public:
  explicit Arguments(const Torch& torch) : torch_(torch), plain_(checked(PyList_New(0))) {}

  // None, or a tensor.
  void add(PyObject* object) {
    const bool given = object != Py_None;
    if (given && (!torch_.is_plain(object) || PyList_Append(plain_.p, object) != 0)) throw Left();
    given_.push_back(given);
  }

  // The tensors of a tuple or list; returns how many.
  int64_t add_all(PyObject* sequence) {
    const bool tuple = PyTuple_CheckExact(sequence);
    if (!tuple && !PyList_CheckExact(sequence)) throw Left();
    const int64_t count = tuple ? PyTuple_Size(sequence) : PyList_Size(sequence);
    for (int64_t i = 0; i < count; ++i)
      add(tuple ? PyTuple_GetItem(sequence, i) : PyList_GetItem(sequence, i));
    return count;
  }

  // All of them, once they have been added.
  std::vector<MaybeTensor> tensors() const {
    const Owned handles(
        checked(PyObject_CallFunctionObjArgs(torch_.to_handles, plain_.p, nullptr)));
    std::vector<MaybeTensor> found;
    Py_ssize_t next = 0;
    for (const bool given : given_) {
      MaybeTensor& t = found.emplace_back();
      if (!given) continue;
      void* handle = PyCapsule_GetPointer(PyList_GetItem(handles.p, next++), nullptr);
      t = Tensor(static_cast<AtenTensorHandle>(handle));
    }
    for (const MaybeTensor& t : found)
      if (t && (!t->is_cpu() || (!t->const_data_ptr() && t->numel() > 0))) throw Left();
    return found;
  }

 private:
  const Torch& torch_;
  const Owned plain_;
  std::vector<bool> given_;
};

// A tuple of the tensors, None for one that is not there.
PyObject* results(const Torch& torch, const std::vector<MaybeTensor>& tensors) {
  std::vector<AtenTensorHandle> handles;
  for (const MaybeTensor& t : tensors) {
    AtenTensorHandle handle;
    if (!t) continue;
    if (aoti_torch_new_tensor_handle(t->get(), &handle) != TORCH_SUCCESS) throw Left();
    handles.push_back(handle);
  }
  const Owned made(checked(to_python(torch, handles)));
  PyObject* all = checked(PyTuple_New(tensors.size()));
  Py_ssize_t next = 0;
  for (size_t i = 0; i < tensors.size(); ++i)
    PyTuple_SetItem(all, i, Py_NewRef(tensors[i] ? PyList_GetItem(made.p, next++) : Py_None));
  return all;
}

// What both passes are given: x, batch_sizes, resets, state0, weights and, later, cell and
// directions.
struct LayerArguments {
  Tensor x;
  MaybeTensor batch_sizes, resets;
  Tensors state0, weights;
  int64_t products = 0;
  static constexpr int64_t kFirst = 3;  // of state0 and weights among all tensors

  // Takes the first tensors in the order in which they were added.
  LayerArguments(const std::vector<MaybeTensor>& all, int64_t states, int64_t count)
      : x(all.at(0).value()), batch_sizes(all.at(1)), resets(all.at(2)) {
    if (x.numel() == 0) throw Left();
    for (int64_t i = 0; i < states; ++i) state0.push_back(all.at(kFirst + i).value());
    for (int64_t i = 0; i < count; ++i) {
      weights.push_back(all.at(kFirst + states + i).value());
      products += weights.back().numel();
    }
    products *= x.numel() / x.size(x.dim() - 1);
  }

  Call call(int64_t cell, int64_t directions, bool cell_states) const {
    const Form form = directions == 0 ? Form::kStep : Form::kLayer;
    return Call(
        {x, batch_sizes, resets, state0, weights, cell, directions ? directions : 1, cell_states},
        Cpu::kNeedsUniformRows, form);
  }
};

int64_t integer(PyObject* object) {
  const int64_t value = PyLong_AsLong(object);
  if (value < 0) throw Left();
  return value;
}

PyObject* forward_checked(const Torch& torch, PyObject* const* args) {
  Arguments arguments(torch);
  for (int i = 0; i < LayerArguments::kFirst; ++i) arguments.add(args[i]);
  const int64_t states = arguments.add_all(args[3]), count = arguments.add_all(args[4]);
  const LayerArguments given(arguments.tensors(), states, count);
  Call call = given.call(integer(args[5]), integer(args[6]), args[7] == Py_True);
  const int64_t save_every = integer(args[8]);
  if (call.layer().size.steps.T == 0) throw Left();
  const Outputs out = [&] {
    const MaybeUnlocked lock(given.products);
    return run_forward<Cpu>(call, given.x, save_every);
  }();
  return results(torch, {out.y, out.h_n, out.c_n, out.gates, out.saved_states});
}

PyObject* backward_checked(const Torch& torch, PyObject* const* args) {
  Arguments arguments(torch);
  for (int i = 0; i < LayerArguments::kFirst; ++i) arguments.add(args[i]);
  const int64_t states = arguments.add_all(args[3]), count = arguments.add_all(args[4]);
  for (int i = 5; i < 11; ++i) arguments.add(args[i]);
  const std::vector<MaybeTensor> all = arguments.tensors();
  const LayerArguments given(all, states, count);
  const int64_t rest = LayerArguments::kFirst + states + count;
  const auto after = [&](int64_t i) -> const MaybeTensor& { return all[rest + i]; };
  const int64_t directions = integer(args[12]);
  const int64_t cell = integer(args[11]);
  const bool cell_states =
      has_cell_states(after(0) ? after(0) : after(3), given.weights, cell, directions);
  Call call = given.call(cell, directions, cell_states);
  const int64_t save_every = integer(args[13]);
  PyObject* const wanted = args[14];
  if (!after(1) || !PyList_CheckExact(wanted)) throw Left();
  std::vector<bool> mask;
  for (Py_ssize_t i = 0; i < PyList_Size(wanted); ++i)
    mask.push_back(PyList_GetItem(wanted, i) == Py_True);
  const GradientTensors out = [&] {
    const MaybeUnlocked lock(2 * given.products);
    return run_backward<Cpu>(call, given.x, given.weights, after(0), *after(1), after(2), after(3),
                             after(4), after(5), save_every, mask);
  }();
  std::vector<MaybeTensor> found = {out.dx, out.dh0, out.dc0};
  found.insert(found.end(), out.dweights.begin(), out.dweights.end());
  return results(torch, found);
}

PyObject* call(PyObject* (*function)(const Torch&, PyObject* const*), PyObject* const* args,
               Py_ssize_t count, Py_ssize_t wanted) {
  if (count != wanted) {
    PyErr_SetString(PyExc_TypeError, "wrong number of arguments");
    return nullptr;
  }
  try {
    const Torch* torch = Torch::get();
    if (torch && torch->to_handles && torch->nothing_observes()) return function(*torch, args);
  } catch (const std::exception&) {  // the operator says what is wrong
  }
  PyErr_Clear();
  return Py_NewRef(Py_None);
}

}  // namespace

PyObject* forward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return call(forward_checked, args, count, 9);
}

PyObject* backward(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return call(backward_checked, args, count, 15);
}

}  // namespace lstm_fused
