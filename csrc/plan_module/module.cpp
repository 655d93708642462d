// `lstm_fused._plan`: plans and build information as Python objects. No torch here: torch's own
// pybind11 headers do not go with the stable ABI, so this module is built on the pybind11 package.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <stdexcept>

#include "../cpu/load.h"
#include "../cpu/topology.h"
#include "../saved.h"
#include "cuda.h"

namespace py = pybind11;
using namespace lstm_fused;

namespace {

const char* name(CellKind cell) {
  return info(cell).name;
}

template <class Enum>
Enum from_name(const std::string& wanted, int count, const char* what) {
  std::string known;
  for (int i = 0; i < count; ++i) {
    const Enum value = static_cast<Enum>(i);
    if (wanted == name(value)) return value;
    known += (i ? ", " : "") + std::string(name(value));
  }
  throw std::invalid_argument(std::string(what) + " is '" + wanted + "' but must be one of " +
                              known);
}

Plan make_plan(const std::string& dtype, const std::string& isa, int threads, int64_t T, int64_t N,
               int64_t I, int64_t H, int64_t R, int directions, bool projection, bool training,
               bool backward, const std::string& cell, int undisturbed, const Topology& topology) {
  const Problem problem{from_name<CellKind>(cell, kCellCount, "cell"),
                        from_name<DType>(dtype, kDTypeCount, "dtype"),
                        T,
                        N,
                        I,
                        H,
                        R,
                        directions,
                        projection,
                        training};
  const Machine machine{from_name<Isa>(isa, kIsaCount, "isa"), threads, undisturbed, topology};
  return backward ? plan_backward(problem, machine) : plan_forward(problem, machine);
}

// What the operator last_run returns, as a dict.
py::dict run_of(std::vector<int64_t> numbers) {
  py::dict run;
  if (numbers.empty()) return run;
  constexpr const char* passes[] = {"forward", "backward", "tangent"};
  run["pass"] = passes[numbers[0]];
  numbers.erase(numbers.begin());
  const Plan p = decode(numbers);
  run["kernel"] = name(p.kernel);
  run["isa"] = name(p.isa);
  run["dtype"] = name(p.dtype);
  run["threads"] = p.threads;
  run["direction_groups"] = p.direction_groups;
  run["row_groups"] = p.row_groups;
  run["unit_groups"] = p.unit_groups;
  run["hoist_steps"] = p.hoist_steps;
  run["undisturbed"] = p.undisturbed;
  run["nanoseconds"] = p.nanoseconds;
  return run;
}

// What Python needs to know of each cell, by name: the contract of cells/cells.h.
py::dict cells() {
  constexpr const char* carries[] = {"none", "cell", "hidden"};
  py::dict all;
  const auto add = [&](auto type, CellKind kind) {
    using Cell = decltype(type);
    py::list input, hidden;
    for (int j = 0; j < Cell::kGates; ++j) {
      input.append(Cell::input_gate(j));
      hidden.append(Cell::hidden_gate(j));
    }
    const CellInfo& known = info(kind);
    py::dict cell;
    cell["id"] = static_cast<int>(kind);
    cell["gates"] = known.gates;
    cell["preacts"] = known.preacts;
    cell["carry"] = carries[static_cast<int>(known.carry)];
    cell["input_gates"] = input;
    cell["hidden_gates"] = hidden;
    all[known.name] = cell;
  };
#define LSTM_FUSED_ADD(name, Cell) add(Cell{}, CellKind::k##Cell);
  LSTM_FUSED_CELLS(LSTM_FUSED_ADD)
#undef LSTM_FUSED_ADD
  return all;
}

py::tuple dims_of(const SavedLayout& layout) {
  py::tuple dims(layout.count);
  for (int i = 0; i < layout.count; ++i) dims[i] = lstm_fused::name(layout.dims[i]);
  return dims;
}

// The dimensions of what a forward pass saves, by device and tensor: csrc/saved.h.
py::dict saved_layouts() {
  py::dict all;
  for (const auto& [device, layouts] : {std::pair("cpu", kCpuSaved), {"cuda", kCudaSaved}}) {
    py::dict tensors;
    tensors["gates"] = dims_of(layouts.gates);
    tensors["saved_states"] = dims_of(layouts.saved_states);
    all[device] = tensors;
  }
  return all;
}

py::dict build_info() {
  py::dict info;
  info["version"] = LSTM_FUSED_VERSION;
  info["compiler"] = __VERSION__;
  info["torch"] = LSTM_FUSED_BUILT_WITH_TORCH;
  info["cuda"] = static_cast<bool>(LSTM_FUSED_CUDA);
  std::vector<std::string> isas;
  for (int i = 0; i < kIsaCount; ++i) isas.push_back(name(static_cast<Isa>(i)));
  info["isas"] = isas;
  return info;
}

}  // namespace

PYBIND11_MODULE(_plan, m) {
  const Topology guess;
  py::class_<Topology>(m, "Topology")
      .def(py::init(
               [](int cores, int cache_cores, int socket_cores, int64_t l2, int64_t l3,
                  int64_t mhz) { return Topology{cores, cache_cores, socket_cores, l2, l3, mhz}; }),
           py::arg("cores") = guess.cores, py::arg("cache_cores") = guess.cache_cores,
           py::arg("socket_cores") = guess.socket_cores, py::arg("l2") = guess.l2,
           py::arg("l3") = guess.l3, py::arg("mhz") = guess.mhz)
      .def_readonly("cores", &Topology::cores)
      .def_readonly("cache_cores", &Topology::cache_cores)
      .def_readonly("socket_cores", &Topology::socket_cores)
      .def_readonly("l2", &Topology::l2)
      .def_readonly("l3", &Topology::l3)
      .def_readonly("mhz", &Topology::mhz);
  py::class_<LoadEstimate>(m, "LoadEstimate")
      .def(py::init<>())
      .def("undisturbed", &LoadEstimate::undisturbed, py::arg("threads"), py::arg("now"))
      .def("tries", &LoadEstimate::tries, py::arg("threads"), py::arg("now"))
      .def("put_off", &LoadEstimate::put_off, py::arg("now"))
      .def(
          "note",
          [](LoadEstimate& load, int threads, int64_t taken, int64_t longest, int late,
             int64_t now) { load.note(threads, taken, {longest, late}, now); },
          py::arg("threads"), py::arg("taken"), py::arg("longest"), py::arg("late"),
          py::arg("now"));
  py::class_<Plan>(m, "Plan")
      .def_property_readonly("kernel", [](const Plan& p) { return name(p.kernel); })
      .def_property_readonly("isa", [](const Plan& p) { return name(p.isa); })
      .def_property_readonly("dtype", [](const Plan& p) { return name(p.dtype); })
      .def_readonly("threads", &Plan::threads)
      .def_readonly("direction_groups", &Plan::direction_groups)
      .def_readonly("row_groups", &Plan::row_groups)
      .def_readonly("unit_groups", &Plan::unit_groups)
      .def_readonly("hoist_steps", &Plan::hoist_steps)
      .def_readonly("undisturbed", &Plan::undisturbed)
      .def_readonly("nanoseconds", &Plan::nanoseconds)
      .def("__str__", [](const Plan& p) { return describe(p); })
      .def("__repr__", [](const Plan& p) { return "<Plan: " + describe(p) + ">"; });
  m.def("plan", &make_plan, py::arg("dtype"), py::arg("isa"), py::arg("threads"), py::arg("T"),
        py::arg("N"), py::arg("I"), py::arg("H"), py::arg("R"), py::arg("directions") = 1,
        py::arg("projection") = false, py::arg("training") = false, py::arg("backward") = false,
        py::arg("cell") = "lstm", py::arg("undisturbed") = 0, py::arg("topology") = Topology{});
  m.def("idle_cpus", &idle_cpus, py::arg("root"));
  m.def("read_topology", &read_topology, py::arg("root"), py::arg("cpus"));
  m.def("run_of", &run_of);
  m.def("cells", &cells);
  m.def("saved_layouts", &saved_layouts);
  m.attr("block") = kBlock;
  m.def("build_info", &build_info);
  lstm_fused::cuda::define_plans(m);
}
