// The tensors of a call as an operator is given them, and the layers that they describe.
#pragma once

#include <deque>

#include "../layer.h"
#include "stable.h"

namespace lstm_fused {

using Tensors = std::vector<Tensor>;
using MaybeTensor = std::optional<Tensor>;

// Whether x and the states have all dimensions of a layer's, or those of a single-step cell's: (N,
// I) and (N, H), or (I,) and (H,).
enum class Form { kLayer, kStep };

// What an operator is given to say which layer it runs. batch_sizes: (T,) of packed data, or the
// documents' cu_seqlens as (1, N + 1). resets: uint8, as x with a last dimension of 1.
struct CallTensors {
  const Tensor& x;
  const MaybeTensor &batch_sizes, &resets;
  const Tensors &state0, &weights;
  int64_t cell, directions;
  bool cell_states;
  int64_t hidden_size = 0, proj_size = 0;  // of quantized weights
};

// The tensors of a call: of one model, or of several with as many sets of weights, which every
// tensor but batch_sizes then has a first dimension for.
class Call {
 public:
  Call(const CallTensors& given, bool uniform_rows, Form form = Form::kLayer)
      : Call(given, given.x, given.weights, uniform_rows, form) {}

 private:
  Call(const CallTensors& given, const Tensor& x, const Tensors& weights, bool uniform_rows,
       Form form)
      : several_(weights.size() > 1 && weights[1].dim() == 3 && x.dim() > 0),
        models_(several_ ? x.size(0) : 1),
        missing_(form == Form::kStep ? 3 - x.dim() : 0) {
    LSTM_FUSED_CHECK(models_ > 0, "there must be at least one model");
    LSTM_FUSED_CHECK(form == Form::kLayer || (!several_ && (missing_ == 1 || missing_ == 2)),
                     "a step's x must be (N, I) or (I,)");
    const std::optional<std::span<const int64_t>> sizes = read_batch_sizes(given.batch_sizes);
    const bool documents = given.batch_sizes && given.batch_sizes->dim() == 2;
    layers_.reserve(models_);
    for (int64_t m = 0; m < models_; ++m) {
      x_.push_back(with_usable_rows(x, m, uniform_rows));
      std::vector<TensorView> states, w;
      for (const Tensor& t : given.state0) states.push_back(contiguous_state(t, m, "state0"));
      for (const Tensor& t : weights) w.push_back(contiguous(t, m, "every weight"));
      layers_.push_back(describe_layer({x_[m], sizes, states, w, given.cell, given.directions,
                                        documents, read_resets(given.resets, x_[m], m),
                                        given.cell_states, given.hidden_size, given.proj_size}));
    }
    LSTM_FUSED_CHECK(layer().size.steps.T > 0 || (sizes && !documents),
                     "x must have at least one time step");
  }

 public:
  int64_t models() const { return models_; }
  std::vector<Layer>& layers() { return layers_; }
  const Layer& layer() const { return layers_[0]; }
  const TensorView& x(int64_t m) const { return x_[m]; }

  // Model m's part of t, copied if that is not contiguous.
  TensorView contiguous(const Tensor& t, int64_t m, const char* name) {
    const TensorView view = of_model(t, m, name);
    return view.is_contiguous() ? view : keep_copy(t, m);
  }

  TensorView contiguous_state(const Tensor& t, int64_t m, const char* name) {
    return with_all_dims(contiguous(t, m, name));
  }

  bool is_step() const { return missing_ > 0; }

  // Shapes of results: x's with y_width for I; a state's; with a dimension of models if there are
  // several.
  Shape output_shape() const {
    const TensorView& x = x_[0];
    Shape shape(x.sizes, x.sizes + x.dim);
    shape.back() = layers_[0].size.y_width();
    return of_all(shape);
  }
  Shape state_shape(int64_t rows, int64_t width) const {
    Shape shape = {layers_[0].size.D, rows, width};
    shape.erase(shape.begin(), shape.begin() + missing_);
    return of_all(shape);
  }
  Shape of_all(Shape one) const {
    if (several_) one.insert(one.begin(), models_);
    return one;
  }

  // Model m's part of a result, or null where there is none.
  void* part(const MaybeTensor& t, int64_t m) const {
    return t ? static_cast<char*>(t->data_ptr()) + m * part_bytes(*t) : nullptr;
  }
  int64_t part_bytes(const Tensor& t) const { return t.numel() / models_ * t.element_size(); }

 private:
  TensorView of_model(const Tensor& t, int64_t m, const char* name) const {
    const TensorView view = view_of(t);
    if (!several_) return view;
    LSTM_FUSED_CHECK(view.dim > 0 && view.size(0) == models_, name, " has shape ", describe(view),
                     " but must begin with ", models_, ", the number of models");
    return view.at(m);
  }

  TensorView keep_copy(const Tensor& t, int64_t m) {
    kept_.push_back(as_contiguous(several_ ? select_first(t, m) : t));
    return view_of(kept_.back());
  }

  // A step's view with the dimensions that it lacks.
  TensorView with_all_dims(TensorView view) {
    if (!is_step() || view.dim + missing_ != 3) return view;
    auto& [sizes, strides] = dims_.emplace_back();
    for (int64_t i = 0; i < 3; ++i) {
      sizes[i] = i < missing_ ? 1 : view.sizes[i - missing_];
      strides[i] = i < missing_ ? 0 : view.strides[i - missing_];
    }
    view.dim = 3;
    view.sizes = sizes;
    view.strides = strides;
    return view;
  }

  TensorView with_usable_rows(const Tensor& x, int64_t m, bool uniform) {
    const TensorView view = with_all_dims(of_model(x, m, "x"));
    const int64_t last = view.dim - 1;
    if (last < 1) return view;  // describe_layer refuses it
    const int64_t I = view.size(last), row = view.strides[last - 1];
    bool usable = view.strides[last] == 1 || I == 1;
    if (uniform) {
      usable = usable && (row >= I || view.size(last - 1) == 1);
      if (last == 2 && view.size(0) > 1)
        usable = usable && view.strides[0] == view.size(1) * (view.size(1) > 1 ? row : I);
    }
    return usable ? view : with_all_dims(keep_copy(x, m));
  }

  std::optional<std::span<const int64_t>> read_batch_sizes(const MaybeTensor& batch_sizes) {
    if (!batch_sizes) return std::nullopt;
    const bool documents = batch_sizes->dim() == 2 && batch_sizes->size(0) == 1;
    LSTM_FUSED_CHECK((batch_sizes->dim() == 1 || documents) && batch_sizes->is_cpu() &&
                         batch_sizes->scalar_type() == ScalarType::Long,
                     "batch_sizes must be a 1-D int64 tensor on the CPU, or cu_seqlens (1, N + 1)");
    kept_.push_back(as_contiguous(*batch_sizes));
    return std::span(kept_.back().const_data_ptr<int64_t>(),
                     static_cast<size_t>(batch_sizes->numel()));
  }

  const uint8_t* read_resets(const MaybeTensor& resets, const TensorView& x, int64_t m) {
    if (!resets) return nullptr;
    LSTM_FUSED_CHECK(resets->scalar_type() == ScalarType::Byte, "resets must be of dtype uint8");
    TensorView view = of_model(*resets, m, "resets");
    // of_model counts in bytes of the layers' dtypes, of which uint8 is none.
    if (several_)
      view.data = const_cast<uint8_t*>(resets->const_data_ptr<uint8_t>()) + m * resets->stride(0);
    LSTM_FUSED_CHECK(view.device == x.device, "resets must be on the device of x");
    if (x.dim == 3)
      check_shape(view, {x.size(0), x.size(1), 1}, "resets");
    else
      check_shape(view, {x.size(0), 1}, "resets");
    const TensorView usable = view.is_contiguous() ? view : keep_copy(*resets, m);
    return static_cast<const uint8_t*>(usable.data);
  }

  struct Dims {
    int64_t sizes[3], strides[3];
  };

  const bool several_;
  const int64_t models_;
  const int64_t missing_;  // leading dimensions that a step's tensors lack
  std::deque<Dims> dims_;  // what views of a step point into
  std::vector<TensorView> x_;
  std::vector<Layer> layers_;
  Tensors kept_;  // copies that layers point into
};

}  // namespace lstm_fused
