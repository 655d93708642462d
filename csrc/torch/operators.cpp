// The operators: their schemas, and the CPU's kernels behind them. Bodies are in operators.h,
// arithmetic below (cpu/), autograd, vmap and fakes above (lstm_fused/).
#include "../cpu/registry.h"
#include "cpu_device.h"

namespace lstm_fused {
namespace {

using Tangents = std::tuple<Tensor, Tensor, Tensor>;

// Tangents of y, h_n and c_n. x, state0 and the biases among weights are tangents, w_ih and w_hh
// the values; primal_c0: the initial state the cell carries, if any; preacts (S, D, P, H), in the
// compute dtype: what is to be added to the tangents of the pre-activations.
Tangents recurrent_tangent(Tensor x, MaybeTensor batch_sizes, MaybeTensor resets, Tensors state0,
                           Tensors weights, MaybeTensor primal_c0, Tensor gates,
                           Tensor saved_states, MaybeTensor preacts, int64_t cell,
                           int64_t directions, bool cell_states) {
  Call call({x, batch_sizes, resets, state0, weights, cell, directions, cell_states}, false);
  const Layer& layer = call.layer();
  LSTM_FUSED_CHECK(storage_bytes(layer.dtype) >= 4 && !layer.projection,
                   "tangents are of float32 or float64, without a projection");
  const Outputs out = allocate_forward<Cpu>(call, x, 0);
  const bool carries = info(layer.cell).carried() > 0;
  const LayerSizes& s = layer.size;
  Tensors kept;
  std::vector<TangentParams> params;
  for (int64_t m = 0; m < call.models(); ++m) {
    TangentParams& p = params.emplace_back(params_of<TangentParams>(call.layers()[m]));
    p.y = call.part(out.y, m);
    p.h_n = call.part(out.h_n, m);
    p.c_n = call.part(out.c_n, m);
    p.primal_gates = read_saved<Cpu>(call, m, gates, x, kCpuSaved.gates, false, "gates", kept);
    p.primal_states = read_saved<Cpu>(call, m, saved_states, x, kCpuSaved.saved_states, !carries,
                                      "saved_states", kept);
    if (primal_c0) {
      const TensorView state = call.contiguous(*primal_c0, m, "primal_c0");
      // The primal may have a reset state where the tangent has none.
      LayerSizes& size = call.layers()[m].size;
      if (resets && state.dim == 3 && state.size(1) == 2 * s.steps.N && !p.h0)
        p.size.reset_states = size.reset_states = true;
      check_state(state, call.x(m), layer, size.state_rows(), s.H, "primal_c0");
      p.primal_c0 = state.data;
    }
    if (preacts) {
      const TensorView added = call.contiguous(*preacts, m, "preacts");
      check_like(added, call.x(m), "preacts");
      check_shape(added, {layer.rows, s.D, info(layer.cell).preacts, s.H}, "preacts");
      p.preacts = added.data;
    }
  }
  Problem problem = problem_of(layer, false);
  problem.tangents = true;
  if (s.steps.N > 0) launch_each(problem, params);
  clear_padding<Cpu>(call, layer, out.y, x);
  return {*out.y, *out.h_n, or_empty(out.c_n, x, x.scalar_type())};
}

// y, h_n and c_n of a layer of quantized weights (layer.h), without gradients.
std::tuple<Tensor, Tensor, Tensor> quantized_forward(Tensor x, MaybeTensor batch_sizes,
                                                     MaybeTensor resets, Tensors state0,
                                                     Tensors weights, int64_t hidden_size,
                                                     int64_t proj_size, int64_t cell,
                                                     int64_t directions, bool cell_states) {
  Call call({x, batch_sizes, resets, state0, weights, cell, directions, cell_states, hidden_size,
             proj_size},
            false);
  const Outputs out = run_forward<Cpu>(call, x, 0);
  return {*out.y, *out.h_n, or_empty(out.c_n, x, x.scalar_type())};
}

// What ran last on this thread, for _plan.run_of: the pass, then its plan; empty before any call.
std::vector<int64_t> last_run_numbers() {
  const Run& last = last_run();
  if (!last.plan) return {};
  std::vector<int64_t> numbers = encode(*last.plan);
  numbers.insert(numbers.begin(), static_cast<int64_t>(last.pass));
  return numbers;
}

// numbers: gates, preacts, cells, keeps_hidden, vectors, masks, groups, operand.
int64_t register_cell_of(std::string name, std::vector<int64_t> numbers) {
  LSTM_FUSED_CHECK(numbers.size() == 8, "a cell is described by 8 numbers");
  const auto at = [&](int i) { return static_cast<int>(numbers[i]); };
  return static_cast<int64_t>(register_cell(
      name,
      {nullptr, at(0), at(1), true, at(2), numbers[3] != 0, at(4), at(5), at(6), numbers[7] != 0}));
}

// The addresses of UnitFunctions<float> and <double> of a registered cell in an ISA.
void register_functions_of(int64_t cell, std::string isa, int64_t of_float, int64_t of_double) {
  LSTM_FUSED_CHECK(cell >= kCellCount && cell < cell_count(), "cell ", cell, " is not registered");
  for (int i = 0; i < kIsaCount; ++i)
    if (isa == name(static_cast<Isa>(i)))
      return register_functions(static_cast<CellKind>(cell), static_cast<Isa>(i),
                                reinterpret_cast<const void*>(of_float),
                                reinterpret_cast<const void*>(of_double));
  LSTM_FUSED_CHECK(false, "unknown ISA ", isa);
}

void force_isa_by_name(std::string name) {
  force_isa(name);
}

// By number (Isa), slowest first.
std::vector<int64_t> available_isas() {
  std::vector<int64_t> found;
  for (int i = 0; i < kIsaCount; ++i)
    if (runs(static_cast<Isa>(i))) found.push_back(i);
  return found;
}

// Machine::undisturbed, then the fields of Topology.
std::vector<int64_t> machine_numbers(int64_t threads) {
  const Machine machine = machine_for(static_cast<int>(threads));
  const Topology& t = machine.topology;
  return {machine.undisturbed, t.cores, t.cache_cores, t.socket_cores, t.l2, t.l3, t.mhz};
}

std::string active_isa() {
  return name(current_isa());
}

}  // namespace
}  // namespace lstm_fused

STABLE_TORCH_LIBRARY(lstm_fused, m) {
  m.def(lstm_fused::kForwardSchema);
  m.def(lstm_fused::kBackwardSchema);
  m.def(
      "recurrent_tangent(Tensor x, Tensor? batch_sizes, Tensor? resets, Tensor[] state0, "
      "Tensor[] weights, Tensor? primal_c0, Tensor gates, Tensor saved_states, Tensor? preacts, "
      "int cell, int directions, bool cell_states) "
      "-> (Tensor y, Tensor h_n, Tensor c_n)");
  m.def(
      "quantized_forward(Tensor x, Tensor? batch_sizes, Tensor? resets, Tensor[] state0, "
      "Tensor[] weights, int hidden_size, int proj_size, int cell, int directions, "
      "bool cell_states) -> (Tensor y, Tensor h_n, Tensor c_n)");
  m.def("force_isa(str isa) -> ()");
  m.def("register_cell(str name, int[] numbers) -> int");
  m.def("register_functions(int cell, str isa, int of_float, int of_double) -> ()");
  m.def("active_isa() -> str");
  m.def("machine(int threads) -> int[]");
  m.def("available_isas() -> int[]");
  m.def("last_run() -> int[]");
  m.def("poisoning() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(lstm_fused, CPU, m) {
  m.impl("recurrent_forward", TORCH_BOX(&lstm_fused::recurrent_forward<lstm_fused::Cpu>));
  m.impl("recurrent_backward", TORCH_BOX(&lstm_fused::recurrent_backward<lstm_fused::Cpu>));
  m.impl("recurrent_tangent", TORCH_BOX(&lstm_fused::recurrent_tangent));
  m.impl("quantized_forward", TORCH_BOX(&lstm_fused::quantized_forward));
}

STABLE_TORCH_LIBRARY_IMPL(lstm_fused, CompositeExplicitAutograd, m) {
  m.impl("force_isa", TORCH_BOX(&lstm_fused::force_isa_by_name));
  m.impl("register_cell", TORCH_BOX(&lstm_fused::register_cell_of));
  m.impl("register_functions", TORCH_BOX(&lstm_fused::register_functions_of));
  m.impl("active_isa", TORCH_BOX(&lstm_fused::active_isa));
  m.impl("machine", TORCH_BOX(&lstm_fused::machine_numbers));
  m.impl("available_isas", TORCH_BOX(&lstm_fused::available_isas));
  m.impl("last_run", TORCH_BOX(&lstm_fused::last_run_numbers));
  m.impl("poisoning", TORCH_BOX(&lstm_fused::poisoning));
}
