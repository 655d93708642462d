// The operators on a CUDA device (bodies in operators.h): the product of x and W_ih, the
// recurrence, and after its backward pass the other gradients.
#include <type_traits>

#include "cuda_forward.h"
#include "cuda_gradients.h"
#include "operators.h"

#if defined(LSTM_FUSED_EMULATION)
#define LSTM_FUSED_LIBRARY lstm_fused_emulation
#define LSTM_FUSED_KEY CPU
#else
#define LSTM_FUSED_LIBRARY lstm_fused
#define LSTM_FUSED_KEY CUDA
#endif

namespace lstm_fused::cuda {
namespace {

struct Cuda {
  static constexpr SavedLayouts kSaved = kCudaSaved;
  static constexpr bool kNeedsOutput = true, kNeedsUniformRows = true, kCheckpoints = true;

  static void forward(const std::vector<Layer>& layers, const std::vector<ForwardParams>& params,
                      const Tensor& x, bool training);
  static void backward(const std::vector<Layer>& layers, const std::vector<BackwardParams>& params,
                       const Tensor& x);
  static void fill(void* data, int byte, int64_t bytes, const Tensor& x) {
    const Guard guard(x.get_device_index());
    check(fill_async(data, byte, bytes, stream_of(x)), "fill");
  }
  static void move(void* to, const void* from, int64_t bytes, const Tensor& x) {
    const Guard guard(x.get_device_index());
    check(copy_rows_async(to, bytes, from, bytes, bytes, 1, stream_of(x)), "copy");
  }
};

// Checkpoint k of those that a pass keeps, after (k + 1) * checkpoint_every steps; null for k ==
// -1.
template <class Data>
Data* checkpoint(const Layer& layer, Data* all, int64_t k) {
  const int64_t bytes = layer.size.D * layer.size.steps.N * layer.size.checkpoint_width() *
                        compute_bytes(layer.dtype);
  using Byte = std::conditional_t<std::is_const_v<Data>, const char, char>;
  return k < 0 ? nullptr : static_cast<Byte*>(all) + k * bytes;
}

void Cuda::forward(const std::vector<Layer>& layers, const std::vector<ForwardParams>& params,
                   const Tensor& x, bool) {
  for (size_t m = 0; m < layers.size(); ++m) {
    const Layer& layer = layers[m];
    const ForwardParams& given = params[m];
    const int64_t T = layer.size.steps.T;
    const int64_t every = given.checkpoint_every ? given.checkpoint_every : T;
    ForwardPass pass(layer, given, x, every, false);
    for (int64_t begin = 0, k = 0; begin < T; begin += every, ++k) {
      const int64_t end = std::min(begin + every, T);
      pass.run(begin, end, checkpoint(layer, given.checkpoints, k - 1));
      if (end < T) pass.store(checkpoint(layer, given.checkpoints, k), end);
    }
  }
}

void Cuda::backward(const std::vector<Layer>& layers, const std::vector<BackwardParams>& params,
                    const Tensor& x) {
  for (size_t m = 0; m < layers.size(); ++m) {
    const Layer& layer = layers[m];
    const BackwardParams& given = params[m];
    const LayerSizes& s = layer.size;
    const int64_t S = s.steps.rows();
    const int64_t T = s.steps.T, every = given.checkpoint_every ? given.checkpoint_every : T;
    // The forward pass of the steps between two checkpoints, again.
    std::optional<ForwardPass> again;
    if (given.checkpoints) again.emplace(layer, ForwardParams{}, x, every, true);
    Pass pass(layer, x, true, every < T);
    const Shape preacts_shape{S, s.D, info(layer.cell).preacts, s.H};
    const bool in_place =
        given.d_preacts && storage_bytes(layer.dtype) == compute_bytes(layer.dtype);
    const Tensor d_preacts =
        in_place ? torch::stable::from_blob(
                       given.d_preacts, preacts_shape,
                       Shape{s.D * preacts_shape[2] * s.H, preacts_shape[2] * s.H, s.H, 1},
                       x.device(), x.scalar_type())
                 : pass.empty(preacts_shape);
    bool hidden_weights = false, vectors = false;
    for (int d = 0; d < s.D; ++d) {
      hidden_weights = hidden_weights || (given.dweights[d].w_hh && pass.recurs());
      vectors = vectors || given.dweights[d].vectors;
    }
    const auto maybe = [&](bool wanted, const Shape& shape) {
      return pass.empty(wanted ? shape : Shape{0});
    };
    const bool saves_h_prev = (s.steps.sizes || s.steps.resets) && hidden_weights;
    const Tensor hidden = maybe(layer.projection, {S, s.D, s.H});
    const Tensor d_hidden = maybe(layer.projection, {S, s.D, s.R});
    const Tensor h_prev = maybe(saves_h_prev, {S, s.D, s.R});

    const int64_t hidden_row = row_bytes(layer.dtype, s.H), width = row_bytes(layer.dtype, s.R);
    Pass::ExchangeSlot of_gates{}, of_h{};
    if (pass.recurs()) {
      of_gates = pass.reserve_exchange(2, pass.gates() * hidden_row);
      of_h = layer.projection ? pass.reserve_exchange(1, width) : of_gates;
    }
    const bool reset_state = s.reset_states;
    const Workspace::Slot dh_reset = pass.reserve_sums(reset_state && given.dh0 ? s.R : 0);
    const Workspace::Slot dc_reset =
        pass.reserve_sums(reset_state && given.dc0 ? s.cell_width() : 0);
    const Workspace::Slot d_vectors = pass.reserve_sums(vectors ? pass.cell().vectors * s.H : 0);
    pass.allocate();

    RecurrenceParams p = pass.params();
    // Read only.
    p.gates = const_cast<void*>(given.gates);
    p.saved_states = const_cast<void*>(given.saved_states);
    p.dy = given.dy;
    p.dh_n = given.dh_n;
    p.dc_n = given.dc_n;
    p.d_gates = d_preacts.data_ptr();
    if (saves_h_prev) {
      p.h = given.y;
      p.h_prev = h_prev.data_ptr();
    }
    p.dh0 = given.dh0;
    p.dc0 = given.dc0;
    if (reset_state && given.dh0) p.dh_reset = pass.resolve_sums(dh_reset);
    if (reset_state && given.dc0) p.dc_reset = pass.resolve_sums(dc_reset);
    if (vectors) p.d_vectors = pass.resolve_sums(d_vectors);
    p.product.units = layer.projection ? s.R : s.H;
    if (pass.recurs()) {
      p.product.in = pass.resolve(of_gates);
      p.product.out = pass.resolve(of_h);
    }
    Product second{{}, s.H, p.product.out, p.product.in};
    Tensors kept;
    for (int d = 0; d < s.D && pass.recurs(); ++d) {
      kept.push_back(transposed_hidden_weights(pass, layer, d, x));
      p.product.a[d] = static_cast<const char*>(kept.back().data_ptr());
      if (!layer.projection) continue;
      kept.push_back(transposed_projection(pass, layer, d, x));
      second.a[d] = static_cast<const char*>(kept.back().data_ptr());
    }
    if (layer.projection) {
      p.hidden = hidden.data_ptr();
      p.d_hidden = d_hidden.data_ptr();
    }
    for (int64_t k = ceil_div(T, every) - 1; k >= 0; --k) {
      const int64_t begin = k * every, end = std::min(begin + every, T);
      if (again) again->run(begin, end, checkpoint(layer, given.checkpoints, k - 1));
      if (again) again->give_saved(p);
      p.s_begin = T - end;
      // A step past the last where the initial state's gradients are wanted.
      p.s_end = T - begin + (k == 0 && (given.dh0 || given.dc0));
      pass.launch(p, layer.projection ? &second : nullptr);
    }
    const Recurred recurred{d_preacts, p.hidden, p.d_hidden, p.h_prev, p.d_vectors};
    Gradients(pass, layer, given, recurred).compute();
  }
}

// (major, minor, SMs, shared bytes of a block, CTAs of a cluster, clusters of that size at once).
std::vector<int64_t> device_properties(int64_t index) {
  const Device d = device_of(static_cast<int>(index));
  return {d.major, d.minor, d.sms, d.shared_bytes, d.cluster_ctas, d.clusters};
}

// What ran last, for _plan.cuda_run_of; empty before any call.
std::vector<int64_t> last_run_numbers() {
  const LastRun last = last_run().get();
  if (!last.plan) return {};
  const Plan& p = *last.plan;
  return {static_cast<int64_t>(last.dtype),
          static_cast<int64_t>(p.kind),
          p.backward,
          p.tile_rows,
          p.unit_ctas,
          p.row_groups,
          p.tf32};
}

}  // namespace
}  // namespace lstm_fused::cuda

#if defined(LSTM_FUSED_EMULATION)
STABLE_TORCH_LIBRARY_FRAGMENT(LSTM_FUSED_LIBRARY, m) {
  m.def(lstm_fused::kForwardSchema);
  m.def(lstm_fused::kBackwardSchema);
}
#endif

STABLE_TORCH_LIBRARY_FRAGMENT(LSTM_FUSED_LIBRARY, m) {
  m.def("cuda_device_properties(int index) -> int[]");
  m.def("cuda_last_run() -> int[]");
  m.def("cuda_force_plan(str kind) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(LSTM_FUSED_LIBRARY, LSTM_FUSED_KEY, m) {
  m.impl("recurrent_forward", TORCH_BOX(&lstm_fused::recurrent_forward<lstm_fused::cuda::Cuda>));
  m.impl("recurrent_backward", TORCH_BOX(&lstm_fused::recurrent_backward<lstm_fused::cuda::Cuda>));
}

STABLE_TORCH_LIBRARY_IMPL(LSTM_FUSED_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("cuda_device_properties", TORCH_BOX(&lstm_fused::cuda::device_properties));
  m.impl("cuda_last_run", TORCH_BOX(&lstm_fused::cuda::last_run_numbers));
  m.impl("cuda_force_plan", TORCH_BOX(&lstm_fused::cuda::force_plan));
}
