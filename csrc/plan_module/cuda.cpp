#include "cuda.h"

#include <sstream>
#include <string>

#include "../cells/cells.h"
#include "../cuda/architectures.h"

namespace lstm_fused::cuda {
namespace {

using namespace python;

Device read_device(PyObject* properties) {
  const std::vector<int64_t> v = integers(properties);
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

std::string shown(const Plan& p) {
  return "<CudaPlan: " + describe(p) + ">";
}

struct Request {
  Problem problem;
  Device device;
  bool backward;
  std::string kind;  // "" for the best
};

Request requested(PyObject* args, PyObject* kwargs, const char* format) {
  const char *dtype, *kind = "";
  long long T, N, H, R;
  int directions, gates, projection, tf32, backward = 0, described = 0, normalizes = 0;
  PyObject* properties;
  parse(args, kwargs, format,
        {"dtype", "T", "N", "H", "R", "directions", "gates", "projection", "tf32", "device",
         "backward", "kind", "described", "normalizes"},
        &dtype, &T, &N, &H, &R, &directions, &gates, &projection, &tf32, &properties, &backward,
        &kind, &described, &normalizes);
  const Problem problem{from_name<DType>(dtype, kDTypeCount, "dtype"),
                        T,
                        N,
                        H,
                        R,
                        directions,
                        gates,
                        projection != 0,
                        tf32 != 0,
                        described != 0,
                        normalizes != 0};
  const Device device = read_device(properties);
  if (!supported(device))
    throw std::invalid_argument("the CUDA kernels need compute capability 8.0 or later, this is " +
                                std::to_string(device.major) + "." + std::to_string(device.minor));
  return {problem, device, backward != 0, kind};
}

const char* kind(const Plan& p) {
  return name(p.kind);
}

// kind: "" for the best. None if a plan of the kind does not fit the device.
PyObject* plan(PyObject*, PyObject* args, PyObject* kwargs) {
  const Request r = requested(args, kwargs, "sLLLLiippO|pspp:cuda_plan");
  if (r.kind.empty()) return box<Plan>(make_plan(r.problem, r.device, r.backward));
  const PlanKind kind = from_name<PlanKind>(r.kind.c_str(), kPlanKinds, "kind");
  const std::optional<Plan> found = plan_as(kind, r.problem, r.device, r.backward);
  return found ? box<Plan>(*found) : Py_NewRef(Py_None);
}

// Why a call without gradients runs torch's own kernels, or None; of the best plan.
PyObject* reason_for_cudnn(PyObject*, PyObject* args, PyObject* kwargs) {
  const Request r = requested(args, kwargs, "sLLLLiippO|pspp:cuda_cudnn_reason");
  const char* reason = cudnn_reason(make_plan(r.problem, r.device, r.backward), r.problem);
  return reason ? string(reason) : Py_NewRef(Py_None);
}

// What the operator cuda_last_run returns, as a dict.
PyObject* run_of(PyObject*, PyObject* args, PyObject* kwargs) {
  PyObject* numbers;
  parse(args, kwargs, "O:cuda_run_of", {"numbers"}, &numbers);
  const std::vector<int64_t> v = integers(numbers);
  if (v.empty()) return PyDict_New();
  const auto at = [&](int i) { return static_cast<long long>(v[i]); };
  return Py_BuildValue("{s:s,s:s,s:s,s:L,s:L,s:L,s:L}", "pass", v[2] ? "backward" : "forward",
                       "dtype", lstm_fused::name(static_cast<DType>(v[0])), "kernel",
                       name(static_cast<PlanKind>(v[1])), "tile_rows", at(3), "unit_ctas", at(4),
                       "row_groups", at(5), "tf32", at(6));
}

PyObject* kinds(PyObject*, PyObject*, PyObject*) {
  return tuple_of(kPlanKinds, [](int i) { return string(name(static_cast<PlanKind>(i))); });
}

// ((target, GPU, its properties), ...).
PyObject* architectures(PyObject*, PyObject*, PyObject*) {
  return tuple_of(std::size(kArchitectures), [](int i) {
    const Architecture& a = kArchitectures[i];
    const Device& d = a.device;
    return Py_BuildValue("(ss(iiiiii))", a.target, a.gpu, d.major, d.minor, d.sms, d.shared_bytes,
                         d.cluster_ctas, d.clusters);
  });
}

PyObject* bytes_of_row(PyObject*, PyObject* args, PyObject* kwargs) {
  const char* dtype;
  long long values;
  parse(args, kwargs, "sL:cuda_row_bytes", {"dtype", "values"}, &dtype, &values);
  return PyLong_FromLongLong(row_bytes(from_name<DType>(dtype, kDTypeCount, "dtype"), values));
}

}  // namespace

void add_plans(PyObject* module) {
  static PyMemberDef members[] = {
      LSTM_FUSED_MEMBER(Plan, backward),
      LSTM_FUSED_MEMBER(Plan, tf32),
      LSTM_FUSED_MEMBER(Plan, tile_rows),
      LSTM_FUSED_MEMBER(Plan, unit_tiles),
      LSTM_FUSED_MEMBER(Plan, unit_ctas),
      LSTM_FUSED_MEMBER(Plan, row_groups),
      LSTM_FUSED_MEMBER(Plan, threads),
      LSTM_FUSED_MEMBER(Plan, shared_bytes),
      {},
  };
  static PyGetSetDef names[] = {text<Plan, kind>("kind"), {}};
  add_class<Plan>(module, "lstm_fused._plan.CudaPlan",
                  {{Py_tp_members, members},
                   {Py_tp_getset, names},
                   described<Plan, describe>(Py_tp_str),
                   described<Plan, shown>(Py_tp_repr)});
  static PyMethodDef methods[] = {
      method<plan>("cuda_plan"),
      method<reason_for_cudnn>("cuda_cudnn_reason"),
      method<run_of>("cuda_run_of"),
      method<kinds>("cuda_kinds"),
      method<architectures>("cuda_architectures"),
      method<bytes_of_row>("cuda_row_bytes"),
      {},
  };
  if (PyModule_AddFunctions(module, methods) != 0) throw Failed();
}

}  // namespace lstm_fused::cuda
