// The backward pass of a layer on a CUDA device: the recurrence, between two checkpoints at a time
// if there are any, and then the other gradients.
#pragma once

#include "cuda_forward.h"
#include "cuda_gradients.h"

namespace lstm_fused::cuda {

// Checkpoint k of those that a pass keeps, after (k + 1) * checkpoint_every steps; null for k ==
// -1.
template <class Data>
Data* checkpoint(const Layer& layer, Data* all, int64_t k) {
  const int64_t bytes = layer.size.D * layer.size.steps.N * layer.size.checkpoint_width() *
                        compute_bytes(layer.dtype);
  using Byte = std::conditional_t<std::is_const_v<Data>, const char, char>;
  return k < 0 ? nullptr : static_cast<Byte*>(all) + k * bytes;
}

class BackwardPass {
 public:
  BackwardPass(const Layer& layer, const BackwardParams& given, const Tensor& x)
      : layer_(layer),
        size_(layer.size),
        given_(given),
        x_(x),
        every_(given.checkpoint_every ? given.checkpoint_every : size_.steps.T),
        again_(forward_again()),
        pass_(layer, x, true, every_ < size_.steps.T) {
    for (int d = 0; d < size_.D; ++d) {
      wants_hidden_weights_ = wants_hidden_weights_ || (given.dweights[d].w_hh && pass_.recurs());
      wants_vectors_ = wants_vectors_ || given.dweights[d].vectors;
    }
    reserve();
    make_results();
    params();
    make_products();
  }

  void run() {
    const int64_t T = size_.steps.T;
    for (int64_t k = ceil_div(T, every_) - 1; k >= 0; --k) {
      const int64_t begin = k * every_, end = std::min(begin + every_, T);
      if (again_) again_->run(begin, end, checkpoint(layer_, given_.checkpoints, k - 1));
      if (again_) again_->give_saved(p_);
      p_.s_begin = T - end;
      // A step past the last where the initial state's gradients are wanted.
      p_.s_end = T - begin + (k == 0 && (given_.dh0 || given_.dc0));
      pass_.launch(p_, pass_.has_two_products() ? &second_ : nullptr);
    }
    const Recurred recurred{*d_preacts_, p_.hidden, p_.d_hidden, p_.h_prev, p_.d_vectors};
    Gradients(pass_, layer_, given_, recurred).compute();
  }

 private:
  // The forward pass of the steps between two checkpoints, again.
  std::optional<ForwardPass> forward_again() const {
    if (!given_.checkpoints) return std::nullopt;
    return std::optional<ForwardPass>(std::in_place, layer_, ForwardParams{}, x_, every_, true);
  }

  void reserve() {
    if (pass_.recurs()) {
      of_gates_ =
          pass_.reserve_exchange(2, pass_.hidden_gates() * row_bytes(layer_.dtype, size_.H));
      between_ = pass_.has_two_products()
                     ? pass_.reserve_exchange(1, row_bytes(layer_.dtype, size_.R))
                     : of_gates_;
    }
    dh_reset_ = pass_.reserve_sums(size_.reset_states && given_.dh0 ? size_.R : 0);
    dc_reset_ = pass_.reserve_sums(size_.reset_states && given_.dc0 ? size_.cell_width() : 0);
    d_vectors_ = pass_.reserve_sums(wants_vectors_ ? pass_.cell().vectors * size_.H : 0);
    pass_.allocate();
  }

  // What the recurrence gives to the products after it.
  void make_results() {
    const int64_t S = size_.steps.rows(), D = size_.D, P = pass_.cell().preacts, H = size_.H;
    const Shape shape{S, D, P, H};
    const bool in_place =
        given_.d_preacts && storage_bytes(layer_.dtype) == compute_bytes(layer_.dtype);
    d_preacts_ =
        in_place ? torch::stable::from_blob(given_.d_preacts, shape, Shape{D * P * H, P * H, H, 1},
                                            x_.device(), x_.scalar_type())
                 : pass_.empty(shape);
    if (layer_.projection || (pass_.cell().operand && wants_hidden_weights_))
      hidden_ = pass_.empty({S, D, H});
    if (layer_.projection) d_hidden_ = pass_.empty({S, D, size_.R});
    const bool saves_h_prev = (size_.steps.sizes || size_.steps.resets) && wants_hidden_weights_;
    if (saves_h_prev) h_prev_ = pass_.empty({S, D, size_.R});
  }

  void params() {
    p_ = pass_.params();
    // Read only.
    p_.gates = const_cast<void*>(given_.gates);
    p_.saved_states = const_cast<void*>(given_.saved_states);
    p_.dy = given_.dy;
    p_.dh_n = given_.dh_n;
    p_.dc_n = given_.dc_n;
    p_.d_gates = d_preacts_->data_ptr();
    if (h_prev_) {
      p_.h = given_.y;
      p_.h_prev = h_prev_->data_ptr();
    }
    if (hidden_) p_.hidden = hidden_->data_ptr();
    if (d_hidden_) p_.d_hidden = d_hidden_->data_ptr();
    p_.dh0 = given_.dh0;
    p_.dc0 = given_.dc0;
    if (size_.reset_states && given_.dh0) p_.dh_reset = pass_.resolve_sums(dh_reset_);
    if (size_.reset_states && given_.dc0) p_.dc_reset = pass_.resolve_sums(dc_reset_);
    if (wants_vectors_) p_.d_vectors = pass_.resolve_sums(d_vectors_);
  }

  void make_products() {
    p_.product.units = layer_.projection ? size_.R : size_.H;
    if (!pass_.recurs()) return;
    p_.product.in = pass_.resolve(of_gates_);
    p_.product.out = pass_.resolve(between_);
    second_ = {{}, size_.H, p_.product.out, p_.product.in};
    for (int d = 0; d < size_.D; ++d) {
      const int gates = pass_.hidden_gates();
      p_.product.a[d] = keep(transposed_hidden_weights(pass_, layer_, d, {0, gates}, x_));
      if (layer_.projection) second_.a[d] = keep(transposed_projection(pass_, layer_, d, x_));
      if (pass_.cell().operand)
        second_.a[d] =
            keep(transposed_hidden_weights(pass_, layer_, d, {gates, pass_.gates()}, x_));
    }
  }

  const char* keep(Tensor t) {
    kept_.push_back(std::move(t));
    return static_cast<const char*>(kept_.back().data_ptr());
  }

  const Layer& layer_;
  const LayerSizes& size_;
  const BackwardParams& given_;
  const Tensor& x_;
  const int64_t every_;
  std::optional<ForwardPass> again_;  // before pass_: the pass that is made last is last_run
  Pass pass_;
  bool wants_hidden_weights_ = false, wants_vectors_ = false;
  Pass::ExchangeSlot of_gates_{}, between_{};
  Workspace::Slot dh_reset_ = 0, dc_reset_ = 0, d_vectors_ = 0;
  std::optional<Tensor> d_preacts_, hidden_, d_hidden_, h_prev_;
  RecurrenceParams p_{};
  Product second_{};
  std::vector<Tensor> kept_;
};

}  // namespace lstm_fused::cuda
