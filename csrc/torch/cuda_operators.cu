// The operators on a CUDA device (bodies in operators.h): the product of x and W_ih, the
// recurrence, and after its backward pass the other gradients.
#include "cuda_backward.h"
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
  for (size_t m = 0; m < layers.size(); ++m) BackwardPass(layers[m], params[m], x).run();
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
