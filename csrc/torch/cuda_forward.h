// The forward pass of a layer on a CUDA device: of all steps, or of some steps at a time.
#pragma once

#include <algorithm>

#include "cuda_weights.h"

namespace lstm_fused::cuda {

// x.W_ih of rows [first, first + count) of x into out, compute (count, D * G * H); x itself if it
// holds that.
inline void input_product(const Pass& pass, const Layer& layer, const Tensor& like, int64_t first,
                          int64_t count, void* out) {
  const LayerSizes& s = layer.size;
  const int64_t height = pass.gates() * s.H;
  Matrix x = input_of(layer);
  x.data = static_cast<const char*>(x.data) + first * x.stride * storage_bytes(layer.dtype);
  x.rows = count;
  if (s.x_is_preacts) {
    const Shape shape{count, height}, strides{x.stride, 1};
    const auto device = like.device();
    Tensor to =
        torch::stable::from_blob(out, shape, Shape{height, 1}, device, compute_dtype(layer.dtype));
    torch::stable::copy_(to, torch::stable::from_blob(const_cast<void*>(x.data), shape, strides,
                                                      device, like.scalar_type()));
    return;
  }
  Matrix weights{layer.weights[0].w_ih, s.I, s.D * height, s.I, true};
  std::optional<Tensor> both;
  if (s.D == 2) {
    const int64_t bytes = height * s.I * storage_bytes(layer.dtype);
    both = pass.empty({2 * height, s.I});
    for (int d = 0; d < 2; ++d)
      pass.copy_rows(static_cast<char*>(both->data_ptr()) + d * bytes, bytes, layer.weights[d].w_ih,
                     bytes, bytes, 1);
    weights.data = both->data_ptr();
  }
  multiply_into(out, false, x, weights, layer.dtype, pass.tf32());
}

// Steps are counted in the order of the pass, so that those of both directions differ. A checkpoint
// is (D, N, checkpoint_width) in the compute dtype, as ForwardParams has them, but each direction's
// after so many of its own steps.
class ForwardPass {
 public:
  // most: steps that are run at once. saves: what backward needs of those that were run last is
  // kept here, where `given` has no place for it.
  ForwardPass(const Layer& layer, const ForwardParams& given, const Tensor& x, int64_t most,
              bool saves)
      : layer_(layer),
        size_(layer.size),
        cell_(info(layer.cell)),
        x_(x),
        most_(std::min(most, layer.size.steps.T)),
        width_(layer.size.checkpoint_width()),
        computed_(compute_bytes(layer.dtype)),
        pass_(layer, x, false) {
    reserve();
    params(given);
    make_buffers(given, saves);
  }

  // Steps [begin, end). resume: the checkpoint before them, or null.
  void run(int64_t begin, int64_t end, const void* resume) {
    const int64_t states = size_.D * size_.H * computed_, pre_bytes = states * pass_.gates();
    const int64_t first = first_row(0, begin, end), part = is_whole() ? 0 : most_ * size_.steps.N;
    const int64_t count = is_whole() ? size_.steps.rows() : (end - begin) * size_.steps.N;
    input_product(pass_, layer_, x_, first, count, pre_);
    if (size_.D == 2 && !is_whole())
      input_product(pass_, layer_, x_, first_row(1, begin, end), count,
                    static_cast<char*>(pre_) + part * pre_bytes);
    p_.pre = before(pre_, first * pre_bytes);
    p_.gates = before(gates_, first * states * cell_.preacts);
    p_.saved_states = before(states_, first * states * cell_.saved());
    p_.saved_shift = (part + first - first_row(1, begin, end)) * size_.D;
    for (int d = 0; d < size_.D && resume && cell_.carried() > 0; ++d)
      take_carry(d, resume, begin, end);
    p_.s_begin = begin;
    p_.s_end = end;
    p_.resume = resume;
    pass_.launch(p_, pass_.has_two_products() ? &second_ : nullptr);
  }

  // Writes the checkpoint after step end - 1, which was the last that was run.
  void store(void* checkpoint, int64_t end) const {
    const int64_t N = size_.steps.N, pitch = width_ * computed_;
    char* to = static_cast<char*>(checkpoint);
    const char* carry = static_cast<const char*>(p_.carry);
    each_carried([&](int64_t kept, int64_t at, int64_t bytes) {
      pass_.copy_rows(to + kept, pitch, carry + at, carry_bytes(), bytes, size_.D * N);
    });
    if (cell_.keeps_hidden) return;
    const ScalarType compute = compute_dtype(layer_.dtype);
    for (int d = 0; d < size_.D; ++d) {
      const int64_t row = first_row(d, end - 1, end);
      char* y = static_cast<char*>(p_.y) + size_.hidden_at(d, row) * storage_bytes(layer_.dtype);
      const Shape shape{N, size_.R};
      const Tensor from = torch::stable::from_blob(y, shape, Shape{size_.y_width(), 1}, x_.device(),
                                                   x_.scalar_type());
      Tensor h = torch::stable::from_blob(to + d * N * pitch, shape, Shape{width_, 1}, x_.device(),
                                          compute);
      torch::stable::copy_(h, from);
    }
  }

  // Gives a backward pass what it needs of the steps that were run last.
  void give_saved(RecurrenceParams& to) const {
    to.gates = p_.gates;
    to.saved_states = p_.saved_states;
    to.saved_shift = p_.saved_shift;
  }

 private:
  bool is_whole() const { return most_ == size_.steps.T; }

  // Bytes of what the cell carries of a row.
  int64_t carry_bytes() const { return cell_.carried() * size_.H * computed_; }

  // copy(byte of a checkpoint's row, byte of a row of p_.carry, bytes): the cell states, which are
  // behind h in the one and first in the other, and a carried h.
  template <class Copy>
  void each_carried(const Copy& copy) const {
    const int64_t states = size_.cell_width() * computed_;
    if (states) copy(size_.R * computed_, 0, states);
    if (cell_.keeps_hidden) copy(0, states, size_.H * computed_);
  }

  // The first row of all steps' data that direction d has in [begin, end).
  int64_t first_row(int d, int64_t begin, int64_t end) const {
    return is_whole() ? 0 : (d == 0 ? begin : size_.steps.T - end) * size_.steps.N;
  }

  static void* before(void* data, int64_t bytes) {
    return data ? reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(data) - bytes) : nullptr;
  }

  void reserve() {
    if (pass_.recurs()) {
      h_ = pass_.reserve_exchange(2, row_bytes(layer_.dtype, size_.R));
      hidden_ = pass_.has_two_products()
                    ? pass_.reserve_exchange(1, row_bytes(layer_.dtype, size_.H))
                    : h_;
      for (int d = 0; d < size_.D; ++d) {
        const Weights& w = layer_.weights[d];
        if (size_.heads() == 1)
          w_hh_[d] = pass_.reserve_operand(w.w_hh, pass_.gates() * size_.H, size_.R);
        const int64_t last = (pass_.gates() - 1) * size_.H * size_.K * storage_bytes(layer_.dtype);
        if (layer_.projection) w_second_[d] = pass_.reserve_operand(w.w_hr, size_.R, size_.H);
        if (cell_.operand)
          w_second_[d] =
              pass_.reserve_operand(static_cast<const char*>(w.w_hh) + last, size_.H, size_.H);
      }
    }
    pass_.allocate();
  }

  void params(const ForwardParams& given) {
    p_ = pass_.params();
    p_.y = given.y;
    p_.h_n = given.h_n;
    p_.c_n = given.c_n;
    p_.in_parts = !is_whole();
    p_.resume_width = width_;
    for (int d = 0; d < size_.D; ++d) {
      p_.b_ih[d] = layer_.weights[d].b_ih;
      p_.b_hh[d] = layer_.weights[d].b_hh;
    }
    p_.product.units = size_.H;
    if (!pass_.recurs()) return;
    p_.product = {{}, size_.H, pass_.resolve(h_), pass_.resolve(hidden_)};
    second_ = {{}, size_.R, p_.product.out, p_.product.in};
    for (int d = 0; d < size_.D; ++d) {
      p_.product.a[d] = hidden_weights(d);
      if (pass_.has_two_products()) second_.a[d] = pass_.resolve(w_second_[d]);
    }
  }

  const char* hidden_weights(int d) {
    if (size_.heads() == 1) return pass_.resolve(w_hh_[d]);
    kept_.push_back(whole_hidden_weights(pass_, layer_, d, x_));
    return static_cast<const char*>(kept_.back().data_ptr());
  }

  // Each unit's pre-activations are read before its gates are written, so that both may share
  // memory.
  void make_buffers(const ForwardParams& given, bool saves) {
    const int P = cell_.preacts;
    gates_ = given.gates || !saves ? given.gates : make(P);
    pre_ = gates_ && P == pass_.gates() ? gates_ : make(pass_.gates());
    const bool states = !given.saved_states && saves && cell_.saved() > 0;
    states_ = states ? make(cell_.saved()) : given.saved_states;
  }

  // A tensor (rows, D, values, H) of the steps that are run at once. If these are not all of them,
  // it has direction 0's rows and then direction 1's, with space for a step before those in time
  // and behind these: for the one before them in the order of the pass.
  void* make(int64_t values) {
    const int64_t N = size_.steps.N, row = size_.D * values * size_.H;
    const int64_t rows = is_whole() ? size_.steps.rows() : size_.D * (most_ + 1) * N;
    kept_.push_back(pass_.empty({rows, row}, compute_dtype(layer_.dtype)));
    return static_cast<char*>(kept_.back().data_ptr()) + (is_whole() ? 0 : N * row * computed_);
  }

  // Copies what the cell carries from a checkpoint to where step `begin` takes it from, and to
  // where its backward pass does.
  void take_carry(int d, const void* resume, int64_t begin, int64_t end) const {
    const int64_t N = size_.steps.N, pitch = width_ * computed_;
    const char* from = static_cast<const char*>(resume) + d * N * pitch;
    const auto copy_to = [&](char* to, int64_t to_pitch) {
      each_carried([&](int64_t kept, int64_t at, int64_t bytes) {
        pass_.copy_rows(to + at, to_pitch, from + kept, pitch, bytes, N);
      });
    };
    copy_to(static_cast<char*>(p_.carry) + d * N * carry_bytes(), carry_bytes());
    if (!p_.saved_states) return;
    const int64_t first = first_row(d, begin, end), saved = cell_.saved() * size_.H * computed_;
    const int64_t row = d == 0 ? first - N : first + (end - begin) * N;
    copy_to(
        static_cast<char*>(p_.saved_states) + (row * size_.D + d * (1 + p_.saved_shift)) * saved,
        size_.D * saved);
  }

  const Layer& layer_;
  const LayerSizes& size_;
  const CellInfo& cell_;
  const Tensor& x_;
  const int64_t most_, width_, computed_;
  Pass pass_;
  Pass::ExchangeSlot h_, hidden_;
  Pass::OperandSlot w_hh_[2], w_second_[2];
  RecurrenceParams p_{};
  Product second_{};
  std::vector<Tensor> kept_;
  // Of the rows of the steps that are run, in the compute dtype: as RecurrenceParams has them.
  void *pre_ = nullptr, *gates_ = nullptr, *states_ = nullptr;
};

}  // namespace lstm_fused::cuda
