// `lstm_fused._plan`: plans and build information as Python objects. No torch here.
#include "../cpu/load.h"
#include "../cpu/topology.h"
#include "../saved.h"
#include "cuda.h"

namespace lstm_fused {
namespace {

using namespace python;

PyObject* plan(PyObject*, PyObject* args, PyObject* kwargs) {
  const char *dtype, *isa, *cell = "lstm";
  long long T, N, I, H, R;
  int threads, directions = 1, projection = 0, training = 0, backward = 0, undisturbed = 0;
  const char* weights = name(WeightFormat::kPlain);
  PyObject* topology = nullptr;
  parse(args, kwargs, "ssiLLLLL|ipppsiO!s:plan",
        {"dtype", "isa", "threads", "T", "N", "I", "H", "R", "directions", "projection", "training",
         "backward", "cell", "undisturbed", "topology", "weights"},
        &dtype, &isa, &threads, &T, &N, &I, &H, &R, &directions, &projection, &training, &backward,
        &cell, &undisturbed, class_of<Topology>, &topology, &weights);
  const Problem problem{from_name<CellKind>(cell, cell_count(), "cell"),
                        from_name<DType>(dtype, kDTypeCount, "dtype"),
                        T,
                        N,
                        I,
                        H,
                        R,
                        directions,
                        projection != 0,
                        training != 0,
                        false,
                        false,
                        from_name<WeightFormat>(weights, 3, "weights")};
  const Machine machine{from_name<Isa>(isa, kKnownIsaCount, "isa"), threads, undisturbed,
                        topology ? value_of<Topology>(topology) : Topology{}};
  return box<Plan>(backward ? plan_backward(problem, machine) : plan_forward(problem, machine));
}

// What the operator last_run returns, as a dict.
PyObject* run_of(PyObject*, PyObject* args, PyObject* kwargs) {
  PyObject* list;
  parse(args, kwargs, "O:run_of", {"numbers"}, &list);
  std::vector<int64_t> numbers = integers(list);
  if (numbers.empty()) return PyDict_New();
  constexpr const char* passes[] = {"forward", "backward", "tangent"};
  const char* pass = passes[numbers[0]];
  numbers.erase(numbers.begin());
  const Plan p = decode(numbers);
  return Py_BuildValue("{s:s,s:s,s:s,s:s,s:i,s:i,s:i,s:i,s:L,s:i,s:L}", "pass", pass, "kernel",
                       name(p.kernel), "isa", name(p.isa), "dtype", name(p.dtype), "threads",
                       p.threads, "direction_groups", p.direction_groups, "row_groups",
                       p.row_groups, "unit_groups", p.unit_groups, "hoist_steps",
                       static_cast<long long>(p.hoist_steps), "undisturbed", p.undisturbed,
                       "nanoseconds", static_cast<long long>(p.nanoseconds));
}

// What Python needs to know of each cell, by name: the contract of cells/cells.h.
PyObject* cells(PyObject*, PyObject*, PyObject*) {
  constexpr const char* carries[] = {"none", "cell", "hidden"};
  PyObject* all = checked(PyDict_New());
  for (int k = 0; k < cell_count(); ++k) {
    const CellInfo& known = info(static_cast<CellKind>(k));
    const int G = known.gates, P = known.preacts;
    PyObject* const input_gates =
        tuple_of(G, [&](int j) { return PyLong_FromLong(input_gate_of(G, P, j)); });
    PyObject* const hidden_gates = tuple_of(G, [](int j) { return PyLong_FromLong(j); });
    const int carry = known.cells > 0 ? 1 : known.keeps_hidden ? 2 : 0;
    PyObject* cell = checked(Py_BuildValue(
        "{s:i,s:i,s:i,s:s,s:i,s:O,s:i,s:i,s:i,s:O,s:O,s:N,s:N}", "id", k, "gates", known.gates,
        "preacts", known.preacts, "carry", carries[carry], "cells", known.cells, "keeps_hidden",
        known.keeps_hidden ? Py_True : Py_False, "vectors", known.vectors, "masks", known.masks,
        "groups", known.groups, "operand", known.operand ? Py_True : Py_False, "described",
        known.described ? Py_True : Py_False, "input_gates", input_gates, "hidden_gates",
        hidden_gates));
    PyDict_SetItemString(all, known.name, cell);
    Py_DECREF(cell);
  }
  return all;
}

// A cell of the user becomes known here, too. Its number is that of the operators' library, where
// cells are registered in the same order.
PyObject* add_cell(PyObject*, PyObject* args, PyObject* kwargs) {
  static std::deque<std::string> names;
  const char* name;
  CellInfo cell{};
  int keeps_hidden, operand;
  parse(args, kwargs, "siiipiiip:register_cell",
        {"name", "gates", "preacts", "cells", "keeps_hidden", "vectors", "masks", "groups",
         "operand"},
        &name, &cell.gates, &cell.preacts, &cell.cells, &keeps_hidden, &cell.vectors, &cell.masks,
        &cell.groups, &operand);
  names.push_back(name);
  cell.name = names.back().c_str();
  cell.described = true;
  cell.keeps_hidden = keeps_hidden != 0;
  cell.operand = operand != 0;
  registered_cells().push_back(cell);
  return PyLong_FromLong(cell_count() - 1);
}

// The dimensions of what a forward pass saves, by device and tensor: csrc/saved.h.
PyObject* saved_layouts(PyObject*, PyObject*, PyObject*) {
  const auto dims = [](const SavedLayout& layout) {
    return tuple_of(layout.count, [&](int i) { return string(lstm_fused::name(layout.dims[i])); });
  };
  const auto tensors = [&](const SavedLayouts& layouts) {
    return Py_BuildValue("{s:N,s:N}", "gates", dims(layouts.gates), "saved_states",
                         dims(layouts.saved_states));
  };
  return Py_BuildValue("{s:N,s:N}", "cpu", tensors(kCpuSaved), "cuda", tensors(kCudaSaved));
}

PyObject* build_info(PyObject*, PyObject*, PyObject*) {
  return Py_BuildValue(
      "{s:s,s:s,s:s,s:O,s:N}", "version", LSTM_FUSED_VERSION, "compiler", __VERSION__, "torch",
      LSTM_FUSED_BUILT_WITH_TORCH, "cuda", LSTM_FUSED_CUDA ? Py_True : Py_False, "isas",
      tuple_of(kIsaCount, [](int i) { return string(name(static_cast<Isa>(i))); }));
}

// Of the CPUs `cpus`, from the files below `root`.
PyObject* topology_of(PyObject*, PyObject* args, PyObject* kwargs) {
  const char* root;
  PyObject* list;
  parse(args, kwargs, "sO:read_topology", {"root", "cpus"}, &root, &list);
  const std::vector<int64_t> cpus = integers(list);
  return box<Topology>(read_topology(root, {cpus.begin(), cpus.end()}));
}

PyObject* idle(PyObject*, PyObject* args, PyObject* kwargs) {
  const char* root;
  parse(args, kwargs, "s:idle_cpus", {"root"}, &root);
  return PyLong_FromLong(idle_cpus(root));
}

PyObject* new_topology(PyTypeObject*, PyObject* args, PyObject* kwargs) {
  return guarded([&] {
    Topology t;
    long long l2 = t.l2, l3 = t.l3, mhz = t.mhz;
    parse(args, kwargs, "|iiiLLL:Topology",
          {"cores", "cache_cores", "socket_cores", "l2", "l3", "mhz"}, &t.cores, &t.cache_cores,
          &t.socket_cores, &l2, &l3, &mhz);
    return box<Topology>(t.cores, t.cache_cores, t.socket_cores, l2, l3, mhz);
  });
}

PyObject* new_load(PyTypeObject*, PyObject*, PyObject*) {
  return guarded([] { return box<LoadEstimate>(); });
}

PyObject* undisturbed(PyObject* self, PyObject* args, PyObject* kwargs) {
  int threads;
  long long now;
  parse(args, kwargs, "iL:undisturbed", {"threads", "now"}, &threads, &now);
  return PyLong_FromLong(value_of<LoadEstimate>(self).undisturbed(threads, now));
}

PyObject* tries(PyObject* self, PyObject* args, PyObject* kwargs) {
  int threads;
  long long now;
  parse(args, kwargs, "iL:tries", {"threads", "now"}, &threads, &now);
  return PyBool_FromLong(value_of<LoadEstimate>(self).tries(threads, now));
}

PyObject* put_off(PyObject* self, PyObject* args, PyObject* kwargs) {
  long long now;
  parse(args, kwargs, "L:put_off", {"now"}, &now);
  value_of<LoadEstimate>(self).put_off(now);
  return Py_NewRef(Py_None);
}

PyObject* note(PyObject* self, PyObject* args, PyObject* kwargs) {
  int threads, late;
  long long taken, longest, now;
  parse(args, kwargs, "iLLiL:note", {"threads", "taken", "longest", "late", "now"}, &threads,
        &taken, &longest, &late, &now);
  value_of<LoadEstimate>(self).note(threads, taken, {longest, late}, now);
  return Py_NewRef(Py_None);
}

const char* kernel(const Plan& p) {
  return name(p.kernel);
}
const char* isa(const Plan& p) {
  return name(p.isa);
}
const char* dtype(const Plan& p) {
  return name(p.dtype);
}
std::string shown(const Plan& p) {
  return "<Plan: " + describe(p) + ">";
}

void add_classes(PyObject* module) {
  static PyMemberDef topology[] = {
      LSTM_FUSED_MEMBER(Topology, cores),
      LSTM_FUSED_MEMBER(Topology, cache_cores),
      LSTM_FUSED_MEMBER(Topology, socket_cores),
      LSTM_FUSED_MEMBER(Topology, l2),
      LSTM_FUSED_MEMBER(Topology, l3),
      LSTM_FUSED_MEMBER(Topology, mhz),
      {},
  };
  add_class<Topology>(module, "lstm_fused._plan.Topology", {{Py_tp_members, topology}},
                      new_topology);
  static PyMethodDef load[] = {
      method<undisturbed>("undisturbed"),
      method<tries>("tries"),
      method<put_off>("put_off"),
      method<note>("note"),
      {},
  };
  add_class<LoadEstimate>(module, "lstm_fused._plan.LoadEstimate", {{Py_tp_methods, load}},
                          new_load);
  static PyMemberDef plan[] = {
      LSTM_FUSED_MEMBER(Plan, threads),     LSTM_FUSED_MEMBER(Plan, direction_groups),
      LSTM_FUSED_MEMBER(Plan, row_groups),  LSTM_FUSED_MEMBER(Plan, unit_groups),
      LSTM_FUSED_MEMBER(Plan, hoist_steps), LSTM_FUSED_MEMBER(Plan, undisturbed),
      LSTM_FUSED_MEMBER(Plan, nanoseconds), {},
  };
  static PyGetSetDef names[] = {
      text<Plan, kernel>("kernel"),
      text<Plan, isa>("isa"),
      text<Plan, dtype>("dtype"),
      {},
  };
  add_class<Plan>(module, "lstm_fused._plan.Plan",
                  {{Py_tp_members, plan},
                   {Py_tp_getset, names},
                   described<Plan, describe>(Py_tp_str),
                   described<Plan, shown>(Py_tp_repr)});
}

}  // namespace
}  // namespace lstm_fused

PyMODINIT_FUNC PyInit__plan() {
  using namespace lstm_fused;
  static PyMethodDef methods[] = {
      python::method<plan>("plan"),
      python::method<idle>("idle_cpus"),
      python::method<topology_of>("read_topology"),
      python::method<run_of>("run_of"),
      python::method<cells>("cells"),
      python::method<add_cell>("register_cell"),
      python::method<saved_layouts>("saved_layouts"),
      python::method<build_info>("build_info"),
      {},
  };
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_plan", nullptr, -1, methods};
  return python::guarded([] {
    PyObject* module = python::checked(PyModule_Create(&definition));
    add_classes(module);
    PyModule_AddIntConstant(module, "block", kBlock);
    PyModule_AddIntConstant(module, "quantization_group", kQuantizationGroup);
    cuda::add_plans(module);
    return module;
  });
}
