// C++ values as Python objects, in CPython's limited API: one build serves every Python from 3.10
// on.
#pragma once

#include <Python.h>
#include <structmember.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace lstm_fused::python {

// A Python error has been set.
struct Failed : std::exception {};

inline PyObject* checked(PyObject* object) {
  if (!object) throw Failed();
  return object;
}

// f's result; an exception becomes a Python error.
template <class F>
PyObject* guarded(F f) {
  try {
    return f();
  } catch (const Failed&) {
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// The names of parameters, and the format of their types as CPython documents it.
template <class... To>
void parse(PyObject* args, PyObject* kwargs, const char* format, std::vector<const char*> names,
           To... to) {
  names.push_back(nullptr);
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, format, const_cast<char**>(names.data()), to...))
    throw Failed();
}

using Function = PyObject* (*)(PyObject* self, PyObject* args, PyObject* kwargs);

template <Function f>
PyObject* guarded_function(PyObject* self, PyObject* args, PyObject* kwargs) {
  return guarded([&] { return f(self, args, kwargs); });
}

template <Function f>
PyMethodDef method(const char* name) {
  const auto function = reinterpret_cast<void (*)()>(&guarded_function<f>);
  return {name, reinterpret_cast<PyCFunction>(function), METH_VARARGS | METH_KEYWORDS, nullptr};
}

// The integers of a Python sequence.
inline std::vector<int64_t> integers(PyObject* sequence) {
  std::vector<int64_t> values(std::max<Py_ssize_t>(0, PySequence_Size(sequence)));
  for (size_t i = 0; i < values.size(); ++i) {
    PyObject* item = checked(PySequence_GetItem(sequence, i));
    values[i] = PyLong_AsLongLong(item);
    Py_DECREF(item);
  }
  if (PyErr_Occurred()) throw Failed();
  return values;
}

// A tuple of `count` objects, each a new reference; null: an error.
template <class F>
PyObject* tuple_of(Py_ssize_t count, F item) {
  PyObject* all = checked(PyTuple_New(count));
  for (Py_ssize_t i = 0; i < count; ++i) PyTuple_SetItem(all, i, checked(item(i)));
  return all;
}

inline PyObject* string(const char* text) {
  return PyUnicode_FromString(text);
}

// Python's object of a C++ value, and its class.
template <class T>
struct Boxed {
  PyObject_HEAD T value;
};
template <class T>
inline PyTypeObject* class_of = nullptr;

template <class T>
T& value_of(PyObject* object) {
  return reinterpret_cast<Boxed<T>*>(object)->value;
}

template <class T, class... Args>
PyObject* box(Args&&... args) {
  const auto allocate = reinterpret_cast<allocfunc>(PyType_GetSlot(class_of<T>, Py_tp_alloc));
  PyObject* object = checked(allocate(class_of<T>, 0));
  new (&value_of<T>(object)) T{std::forward<Args>(args)...};
  return object;
}

template <class T>
void destroy(PyObject* object) {
  PyTypeObject* type = Py_TYPE(object);
  value_of<T>(object).~T();
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(object);
  Py_DECREF(type);
}

// Adds T's class to the module, by its name with the module's before a dot; without `create` Python
// makes no objects of it. The tables are static, each closed by a row of zeros.
template <class T>
void add_class(PyObject* module, const char* name, std::vector<PyType_Slot> slots,
               newfunc create = nullptr, unsigned flags = 0) {
  slots.push_back({Py_tp_dealloc, reinterpret_cast<void*>(&destroy<T>)});
  if (create) slots.push_back({Py_tp_new, reinterpret_cast<void*>(create)});
  slots.push_back({0, nullptr});
  flags |= Py_TPFLAGS_DEFAULT | (create ? 0 : Py_TPFLAGS_DISALLOW_INSTANTIATION);
  PyType_Spec spec{name, sizeof(Boxed<T>), 0, flags, slots.data()};
  PyObject* made = checked(PyType_FromSpec(&spec));
  class_of<T> = reinterpret_cast<PyTypeObject*>(made);
  if (PyModule_AddObjectRef(module, std::strrchr(name, '.') + 1, made) != 0) throw Failed();
}

// A read-only attribute at `offset` of the value.
template <class Member>
constexpr int member_type() {
  if constexpr (sizeof(Member) == 1) return T_BOOL;
  return sizeof(Member) == 8 ? T_LONGLONG : T_INT;
}
#define LSTM_FUSED_MEMBER(T, name)                              \
  {#name, lstm_fused::python::member_type<decltype(T::name)>(), \
   offsetof(lstm_fused::python::Boxed<T>, value) + offsetof(T, name), READONLY, nullptr}

// A read-only attribute that is a string: get(value).
template <class T, const char* (*get)(const T&)>
PyGetSetDef text(const char* attribute) {
  const getter function = [](PyObject* self, void*) { return string(get(value_of<T>(self))); };
  return {attribute, function, nullptr, nullptr, nullptr};
}

// A slot that returns describe(value) as a string.
template <class T, std::string (*describe)(const T&)>
PyType_Slot described(int slot) {
  const reprfunc function = [](PyObject* self) {
    return guarded([&] { return string(describe(value_of<T>(self)).c_str()); });
  };
  return {slot, reinterpret_cast<void*>(function)};
}

template <class Enum>
Enum from_name(const char* wanted, int count, const char* what) {
  std::string known;
  for (int i = 0; i < count; ++i) {
    const Enum value = static_cast<Enum>(i);
    if (std::string(wanted) == name(value)) return value;
    known += (i ? ", " : "") + std::string(name(value));
  }
  throw std::invalid_argument(std::string(what) + " is '" + wanted + "' but must be one of " +
                              known);
}

}  // namespace lstm_fused::python
