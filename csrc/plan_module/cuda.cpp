#include "cuda.h"

#include <pybind11/stl.h>

#include <sstream>
#include <stdexcept>

#include "../cells/cells.h"
#include "../cuda/architectures.h"

namespace py = pybind11;

namespace lstm_fused::cuda {
namespace {

template <class Enum>
Enum from_name(const std::string& wanted, int count, const char* what) {
  for (int i = 0; i < count; ++i)
    if (wanted == name(static_cast<Enum>(i))) return static_cast<Enum>(i);
  throw std::invalid_argument(std::string("no such ") + what + ": '" + wanted + "'");
}

Device read_device(const std::vector<int64_t>& v) {
  if (v.size() != 6) throw std::invalid_argument("device must hold 6 properties");
  const auto at = [&](int i) { return static_cast<int>(v[i]); };
  return {at(0), at(1), at(2), at(3), at(4), at(5)};
}

std::string describe(const Plan& p) {
  std::ostringstream s;
  s << name(p.kind) << " plan, " << (p.kind == PlanKind::kGemm ? "products by cuBLAS, " : "")
    << p.unit_ctas << " x " << p.row_groups << " CTAs of " << p.threads << " threads, tile "
    << p.unit_tiles * kUnitTile << " units x " << p.tile_rows << " rows";
  if (p.shared_bytes) s << ", " << (p.shared_bytes + 1023) / 1024 << " KB of shared memory";
  if (p.tf32) s << ", TF32";
  return s.str();
}

// kind: "" for the best. None if a plan of the kind does not fit the device.
std::optional<Plan> plan(const std::string& dtype, int64_t T, int64_t N, int64_t H, int64_t R,
                         int directions, int gates, bool projection, bool tf32,
                         const std::vector<int64_t>& device, bool backward,
                         const std::string& kind) {
  const Problem problem{from_name<DType>(dtype, kDTypeCount, "dtype"),
                        T,
                        N,
                        H,
                        R,
                        directions,
                        gates,
                        projection,
                        tf32};
  const Device on = read_device(device);
  if (!supported(on))
    throw std::invalid_argument("the CUDA kernels need compute capability 8.0 or later, this is " +
                                std::to_string(on.major) + "." + std::to_string(on.minor));
  if (kind.empty()) return make_plan(problem, on, backward);
  return plan_as(from_name<PlanKind>(kind, kPlanKinds, "kind"), problem, on, backward);
}

// What the operator cuda_last_run returns, as a dict.
py::dict run_of(const std::vector<int64_t>& v) {
  py::dict run;
  if (v.empty()) return run;
  run["pass"] = v[2] ? "backward" : "forward";
  run["dtype"] = lstm_fused::name(static_cast<DType>(v[0]));
  run["kernel"] = name(static_cast<PlanKind>(v[1]));
  run["tile_rows"] = v[3];
  run["unit_ctas"] = v[4];
  run["row_groups"] = v[5];
  run["tf32"] = v[6];
  return run;
}

}  // namespace

void define_plans(py::module_& m) {
  py::class_<Plan>(m, "CudaPlan")
      .def_property_readonly("kind", [](const Plan& p) { return name(p.kind); })
      .def_readonly("backward", &Plan::backward)
      .def_readonly("tf32", &Plan::tf32)
      .def_readonly("tile_rows", &Plan::tile_rows)
      .def_readonly("unit_tiles", &Plan::unit_tiles)
      .def_readonly("unit_ctas", &Plan::unit_ctas)
      .def_readonly("row_groups", &Plan::row_groups)
      .def_readonly("threads", &Plan::threads)
      .def_readonly("shared_bytes", &Plan::shared_bytes)
      .def("__str__", &describe)
      .def("__repr__", [](const Plan& p) { return "<CudaPlan: " + describe(p) + ">"; });
  m.def("cuda_plan", &plan, py::arg("dtype"), py::arg("T"), py::arg("N"), py::arg("H"),
        py::arg("R"), py::arg("directions"), py::arg("gates"), py::arg("projection"),
        py::arg("tf32"), py::arg("device"), py::arg("backward") = false, py::arg("kind") = "");
  m.def("cuda_run_of", &run_of);
  m.def("cuda_kinds", [] {
    py::tuple kinds(kPlanKinds);
    for (int i = 0; i < kPlanKinds; ++i) kinds[i] = name(static_cast<PlanKind>(i));
    return kinds;
  });
  // [(target, GPU, its properties)].
  m.def("cuda_architectures", [] {
    py::list rows;
    for (const Architecture& a : kArchitectures) {
      const Device& d = a.device;
      rows.append(py::make_tuple(
          a.target, a.gpu,
          py::make_tuple(d.major, d.minor, d.sms, d.shared_bytes, d.cluster_ctas, d.clusters)));
    }
    return rows;
  });
  m.def("cuda_row_bytes", [](const std::string& dtype, int64_t values) {
    return row_bytes(from_name<DType>(dtype, kDTypeCount, "dtype"), values);
  });
}

}  // namespace lstm_fused::cuda
