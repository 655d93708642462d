// Python's interface as weak symbols: a C++ program without Python loads the module, too, for the
// operators it registers. Only what runs under Python uses these: `infer`, `forward` and
// `backward`, and the CUDA operators' question for TF32.
#pragma once

#include <Python.h>

#pragma weak PyCapsule_GetPointer
#pragma weak PyCapsule_New
#pragma weak PyDict_GetItemWithError
#pragma weak PyDict_Type
#pragma weak PyErr_Clear
#pragma weak PyErr_NoMemory
#pragma weak PyErr_SetString
#pragma weak PyEval_RestoreThread
#pragma weak PyEval_SaveThread
#pragma weak PyExc_RuntimeError
#pragma weak PyExc_TypeError
#pragma weak PyGILState_Ensure
#pragma weak PyGILState_Release
#pragma weak PyImport_ImportModule
#pragma weak PyList_Append
#pragma weak PyList_GetItem
#pragma weak PyList_New
#pragma weak PyList_SetItem
#pragma weak PyList_Size
#pragma weak PyList_Type
#pragma weak PyLong_AsLong
#pragma weak PyLong_FromLong
#pragma weak PyLong_FromLongLong
#pragma weak PyModule_Create2
#pragma weak PyObject_CallFunctionObjArgs
#pragma weak PyObject_CallMethodObjArgs
#pragma weak PyObject_GetAttr
#pragma weak PyObject_GetAttrString
#pragma weak PyTuple_GetItem
#pragma weak PyTuple_New
#pragma weak PyTuple_Pack
#pragma weak PyTuple_SetItem
#pragma weak PyTuple_Size
#pragma weak PyTuple_Type
#pragma weak PyUnicode_CompareWithASCIIString
#pragma weak PyUnicode_InternFromString
#pragma weak Py_IsInitialized
#pragma weak _Py_Dealloc
#pragma weak _Py_FalseStruct
#pragma weak _Py_NoneStruct
#pragma weak _Py_TrueStruct
