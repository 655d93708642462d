// The gradients of x and of the weights on a CUDA device, from those of the pre-activations: one
// product each over all steps, and a sum for the biases.
#pragma once

#include "cuda_pass.h"

namespace lstm_fused::cuda {

// What the recurrence's backward pass left, each of the storage dtype.
struct Recurred {
  const Tensor& d_preacts;  // (S, D, P, H)
  const void* hidden;       // (S, D, H): h before a projection, or a cell's operand, or null
  const void* d_hidden;     // (S, D, R): gradient of h after it, or null
  const void* h_prev;       // (S, D, R): h that each step began with; or null
  void* d_vectors;          // compute (D, N, vectors, H): sums over a row's steps; or null
};

class Gradients {
 public:
  Gradients(const Pass& pass, const Layer& layer, const BackwardParams& p, const Recurred& recurred)
      : pass_(pass),
        layer_(layer),
        p_(p),
        recurred_(recurred),
        S_(layer.size.steps.rows()),
        H_(layer.size.H),
        P_(info(layer.cell).preacts),
        G_(info(layer.cell).gates),
        bytes_(storage_bytes(layer.dtype)) {
    for (int j = 0; j < G_; ++j) {
      input_gates_.push_back(input_gate_of(G_, P_, j));
      hidden_gates_.push_back(j);
    }
  }

  void compute() const {
    if (p_.dx) layer_.size.x_is_preacts ? to_input() : of_input();
    for (int d = 0; d < layer_.size.D; ++d) of_weights(d);
    if (p_.d_preacts && p_.d_preacts != recurred_.d_preacts.data_ptr()) {
      const Tensor wide = torch::stable::to(recurred_.d_preacts, compute_dtype(layer_.dtype));
      const int64_t bytes = wide.numel() * wide.element_size();
      pass_.copy_rows(p_.d_preacts, bytes, wide.data_ptr(), bytes, bytes, 1);
    }
  }

 private:
  // Of the input's pre-activations, or of the hidden state's: the gate of each.
  using Gates = std::vector<int>;

  // Pre-activations [first, first + count) of a direction as a matrix (S, count * H).
  Matrix preacts(int d, int first, int count) const {
    const int64_t at = (int64_t{d} * P_ + first) * H_ * bytes_;
    return {static_cast<const char*>(recurred_.d_preacts.data_ptr()) + at, S_, count * H_,
            layer_.size.D * P_ * H_, false};
  }

  static Matrix transposed(Matrix m) {
    std::swap(m.rows, m.columns);
    m.transposed = !m.transposed;
    return m;
  }

  void multiply(void* out, const Matrix& a, const Matrix& b) const {
    multiply_into(out, true, a, b, layer_.dtype, pass_.tf32());
  }

  // dx where x is the input's part of the pre-activations.
  void to_input() const {
    const int64_t block = H_ * bytes_, pitch = layer_.size.I * bytes_;
    for (int j = 0; j < G_; ++j)
      pass_.copy_rows(static_cast<char*>(p_.dx) + input_gates_[j] * block, pitch,
                      preacts(0, j, 1).data, P_ * block, block, S_);
  }

  // dx = d_preacts (S, D * P * H) times w_ih of both directions, its rows in the order of the
  // pre-activations and zero where the input has no part in one.
  void of_input() const {
    const LayerSizes& s = layer_.size;
    const int64_t block = H_ * s.I * bytes_;
    const bool in_order = s.D == 1 && input_gates_ == hidden_gates_;
    const int used = s.D == 1 ? G_ : P_;  // of each direction's pre-activations
    Matrix weights{layer_.weights[0].w_ih, s.D * used * H_, s.I, s.I, false};
    std::optional<Tensor> stacked;
    if (!in_order) {
      stacked = pass_.empty({weights.rows, s.I});
      char* to = static_cast<char*>(stacked->data_ptr());
      for (int d = 0; d < s.D; ++d)
        for (int j = 0; j < used; ++j, to += block) {
          const char* w = static_cast<const char*>(layer_.weights[d].w_ih);
          if (j < G_)
            pass_.copy_rows(to, block, w + input_gates_[j] * block, block, block, 1);
          else
            check(fill_async(to, 0, block, pass_.stream()), "zeros");
        }
      weights.data = stacked->data_ptr();
    }
    Matrix all = preacts(0, 0, used);
    all.columns = weights.rows;
    multiply(p_.dx, all, weights);
  }

  void of_weights(int d) const {
    const LayerSizes& s = layer_.size;
    const WeightGradients& out = p_.dweights[d];
    if (out.w_ih && !s.x_is_preacts) by_gate(out.w_ih, d, 0, input_gates_, input_of(layer_));
    if (out.w_hh && s.K > 0) of_recurrent_weights(out.w_hh, d);
    if (out.w_hr) {
      const Matrix d_hidden{part(recurred_.d_hidden, d, s.R), S_, s.R, s.D * s.R, false};
      const Matrix hidden{part(recurred_.hidden, d, H_), S_, H_, s.D * H_, false};
      multiply(out.w_hr, transposed(d_hidden), hidden);
    }
    if (out.b_ih || out.b_hh) of_biases(d);
    if (out.vectors) of_vectors(out.vectors, d);
  }

  // Direction d of (S, D, width).
  const void* part(const void* data, int d, int64_t width) const {
    return static_cast<const char*>(data) + d * width * bytes_;
  }

  // out (G * H, m): for each gate, its pre-activations' gradients transposed times `right` (S, m).
  void by_gate(void* out, int d, int first, const Gates& gates, const Matrix& right) const {
    if (gates == hidden_gates_) return multiply(out, transposed(preacts(d, first, G_)), right);
    for (int j = 0; j < G_; ++j) {
      char* to = static_cast<char*>(out) + gates[j] * H_ * right.columns * bytes_;
      multiply(to, transposed(preacts(d, first + j, 1)), right);
    }
  }

  // The same for w_hh: with heads, units by the hidden units of their head, a product for each; of
  // a cell with an operand, the last gate by that.
  void by_head(void* out, int d, const Matrix& h_prev) const {
    const int64_t heads = layer_.size.heads(), K = layer_.size.K;
    if (pass_.cell().operand) {
      const int gates = pass_.hidden_gates();
      const Matrix operand{part(recurred_.hidden, d, H_), S_, H_, layer_.size.D * H_, false};
      multiply(out, transposed(preacts(d, P_ - G_, gates)), h_prev);
      return multiply(static_cast<char*>(out) + gates * H_ * H_ * bytes_,
                      transposed(preacts(d, P_ - 1, 1)), operand);
    }
    if (heads == 1) return by_gate(out, d, P_ - G_, hidden_gates_, h_prev);
    char* to = static_cast<char*>(out);
    for (int j = 0; j < G_; ++j)
      for (int64_t head = 0; head < heads; ++head, to += K * K * bytes_)
        multiply(to, transposed(columns_of(preacts(d, P_ - G_ + j, 1), head * K, K)),
                 columns_of(h_prev, head * K, K));
  }

  Matrix columns_of(Matrix m, int64_t first, int64_t count) const {
    m.data = static_cast<const char*>(m.data) + first * bytes_;
    m.columns = count;
    return m;
  }

  // Of w_hh: every step's gradients times what h was before it. Without resets, dense data's is y,
  // a step later.
  void of_recurrent_weights(void* out, int d) const {
    const LayerSizes& s = layer_.size;
    const int64_t N = s.steps.N, width = s.R * bytes_, pitch = s.y_width() * bytes_;
    if (recurred_.h_prev) {
      const Matrix h_prev{part(recurred_.h_prev, d, s.R), S_, s.R, s.D * s.R, false};
      return by_head(out, d, h_prev);
    }
    const Tensor h_prev = pass_.empty({S_, s.R});
    char* to = static_cast<char*>(h_prev.data_ptr());
    char* first = d == 0 ? to : to + (S_ - N) * width;  // the direction's first step
    char* later = d == 0 ? to + N * width : to;
    const char* y = static_cast<const char*>(part(p_.y, d, s.R));
    const char* earlier = d == 0 ? y : y + N * pitch;
    if (S_ > N) pass_.copy_rows(later, width, earlier, pitch, width, S_ - N);
    if (layer_.h0)
      pass_.copy_rows(first, N * width, part(layer_.h0, d, N * s.R), N * width, N * width, 1);
    else
      check(fill_async(first, 0, N * width, pass_.stream()), "zeros");
    by_head(out, d, {to, S_, s.R, s.R, false});
  }

  // Sums over all rows, accumulated in the compute dtype.
  void of_biases(int d) const {
    const int64_t D = layer_.size.D, unit_preacts = P_ * H_;
    const Tensor rows = reinterpret(recurred_.d_preacts, {S_, unit_preacts}, {D * unit_preacts, 1},
                                    d * unit_preacts);
    const int64_t dims[] = {0};
    const Tensor sums = torch::stable::sum(rows, torch::headeronly::IntHeaderOnlyArrayRef(dims, 1));
    const auto copy_gates = [&](void* out, int first, const Gates& gates) {
      const int64_t block = H_ * bytes_;
      const char* from = static_cast<const char*>(sums.data_ptr()) + first * block;
      for (int j = 0; out && j < G_; ++j)
        pass_.copy_rows(static_cast<char*>(out) + gates[j] * block, block, from + j * block, block,
                        block, 1);
    };
    copy_gates(p_.dweights[d].b_ih, 0, input_gates_);
    copy_gates(p_.dweights[d].b_hh, P_ - G_, hidden_gates_);
  }

  // Sums over the rows of the batch.
  void of_vectors(void* out, int d) const {
    const int64_t N = layer_.size.steps.N, width = pass_.cell().vectors * H_;
    char* first =
        static_cast<char*>(recurred_.d_vectors) + d * N * width * compute_bytes(layer_.dtype);
    const Tensor rows =
        torch::stable::from_blob(first, Shape{N, width}, Shape{width, 1},
                                 recurred_.d_preacts.device(), compute_dtype(layer_.dtype));
    const int64_t dims[] = {0};
    const Tensor sums = torch::stable::to(
        torch::stable::sum(rows, torch::headeronly::IntHeaderOnlyArrayRef(dims, 1)),
        recurred_.d_preacts.scalar_type());
    const int64_t bytes = width * bytes_;
    pass_.copy_rows(out, bytes, sums.data_ptr(), bytes, bytes, 1);
  }

  const Pass& pass_;
  const Layer& layer_;
  const BackwardParams& p_;
  const Recurred& recurred_;
  const int64_t S_, H_;
  const int P_, G_;
  const int64_t bytes_;
  Gates input_gates_, hidden_gates_;
};

}  // namespace lstm_fused::cuda
