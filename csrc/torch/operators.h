// The bodies of the operators, the same for every device: checks, allocation, one call for each
// model, and what follows for packed data with padding. A Device has static members:
//   kSaved                what a forward pass saves, and how it is laid out
//   kNeedsOutput          whether the gradient of w_hh reads y without a projection too
//   kNeedsUniformRows     whether all rows of x must be one stride apart
//   kCheckpoints          whether states may be kept instead of what each step's backward needs
//   forward(layers, params, x, training), backward(layers, params, x)   run the kernels
//   fill(pointer, byte, bytes, x), move(to, from, bytes, x)              of memory where x is
#pragma once

#include "../poison.h"
#include "call.h"

namespace lstm_fused {

inline constexpr const char* kForwardSchema =
    "recurrent_forward(Tensor x, Tensor? batch_sizes, Tensor? resets, Tensor[] state0, "
    "Tensor[] weights, int cell, int directions, bool cell_states, int save_every) "
    "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor saved_states)";
inline constexpr const char* kBackwardSchema =
    "recurrent_backward(Tensor x, Tensor? batch_sizes, Tensor? resets, Tensor[] state0, "
    "Tensor[] weights, Tensor? y, Tensor gates, Tensor saved_states, Tensor? dy, Tensor? dh_n, "
    "Tensor? dc_n, int cell, int directions, int save_every, bool[] mask) "
    "-> (Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dweights, Tensor d_preacts)";

// A result of this shape, if it is wanted.
template <class Device>
MaybeTensor result(bool wanted, const Shape& shape, const Tensor& like, ScalarType dtype) {
  if (!wanted) return std::nullopt;
  Tensor t = allocate(shape, dtype, like);
  if (poisoning() && t.numel() > 0)
    Device::fill(t.data_ptr(), 0xff, t.numel() * t.element_size(), like);
  return t;
}

// The rows of a saved tensor: `runs` runs of `rows` rows, each of `bytes`.
struct SavedRows {
  int64_t runs, rows, bytes;

  SavedRows(const SavedLayout& layout, const Layer& layer, int64_t total_bytes)
      : runs(1), rows(layer.rows) {
    const Shape shape = layer.saved_shape(layout);
    for (int i = 0; layout.dims[i] != Dim::kRows; ++i) runs *= shape[i];
    bytes = rows > 0 ? total_bytes / (runs * rows) : 0;
  }
};

// What an operator returns for a result: an empty tensor for none.
inline Tensor or_empty(const MaybeTensor& t, const Tensor& like, ScalarType dtype) {
  return t ? *t : allocate({0}, dtype, like);
}

// Zeros for the rows of y, dx or d_preacts that belong to no step.
template <class Device>
void clear_padding(const Call& call, const Layer& layer, const MaybeTensor& t, const Tensor& x) {
  if (layer.padding() == 0 || !t || t->numel() == 0) return;
  const int64_t bytes = call.part_bytes(*t);
  const int64_t used = bytes / layer.rows * layer.size.steps.rows();
  for (int64_t m = 0; m < call.models(); ++m)
    Device::fill(static_cast<char*>(call.part(t, m)) + used, 0, bytes - used, x);
}

// Kernels write what they save without the padding's rows, run after run. Each run is moved to
// where the tensor's shape says it begins.
template <class Device>
void insert_padding(const Call& call, const Layer& layer, const SavedLayout& layout,
                    const MaybeTensor& t, const Tensor& x) {
  if (layer.padding() == 0 || !t || t->numel() == 0) return;
  const int64_t total = call.part_bytes(*t);
  const SavedRows saved(layout, layer, total);
  const int64_t used = layer.size.steps.rows() * saved.bytes, whole = saved.rows * saved.bytes;
  for (int64_t m = 0; m < call.models(); ++m) {
    char* data = static_cast<char*>(call.part(t, m));
    for (int64_t run = saved.runs; run-- > 0;) {
      if (run > 0) Device::move(data + run * whole, data + run * used, used, x);
      Device::fill(data + run * whole + used, 0, whole - used, x);
    }
  }
}

// What forward saved of model m, checked, and without the padding's rows.
template <class Device>
const void* read_saved(Call& call, int64_t m, const Tensor& t, const Tensor& x,
                       const SavedLayout& layout, bool empty, const char* name, Tensors& kept) {
  const Layer& layer = call.layers()[m];
  const TensorView view = view_of(t);
  LSTM_FUSED_CHECK(view.device == call.x(m).device && t.is_contiguous() &&
                       t.scalar_type() == compute_dtype(layer.dtype),
                   name, " must be as the forward pass saved it");
  const Shape shape = empty ? Shape{0} : call.of_all(layer.saved_shape(layout));
  LSTM_FUSED_CHECK(shape_of(t) == shape, name, " has shape ", describe(view), " but must be ",
                   describe(shape.data(), static_cast<int64_t>(shape.size())));
  if (empty) return nullptr;
  const int64_t total = call.part_bytes(t);
  const char* data = static_cast<const char*>(t.const_data_ptr()) + m * total;
  const SavedRows saved(layout, layer, total);
  if (layer.padding() == 0 || total == 0 || saved.runs == 1) return data;
  kept.push_back(allocate({total}, ScalarType::Byte, x));
  char* packed = static_cast<char*>(kept.back().data_ptr());
  const int64_t used = layer.size.steps.rows() * saved.bytes;
  for (int64_t run = 0; run < saved.runs; ++run)
    Device::move(packed + run * used, data + run * saved.rows * saved.bytes, used, x);
  return packed;
}

// The results of a forward pass that there are: y not of a step, where it is h_n; what is saved
// only for training; c_n and saved_states only of cells that have them.
struct Outputs {
  MaybeTensor y, h_n, c_n, gates, saved_states;
};

// Of states alone, those between every `every` steps: (count, D, N, width).
inline Shape checkpoints_shape(const Layer& layer, int64_t every) {
  const LayerSizes& s = layer.size;
  return {ceil_div(s.steps.T, every) - 1, s.D, s.steps.N, s.checkpoint_width()};
}

// Whether a pass keeps them.
template <class Device>
bool keeps_checkpoints(const Layer& layer, int64_t save_every) {
  return Device::kCheckpoints && save_every > 1 && !layer.size.steps.sizes;
}

template <class Device>
Outputs allocate_forward(const Call& call, const Tensor& x, int64_t save_every) {
  const Layer& layer = call.layer();
  const ScalarType dtype = x.scalar_type(), compute = compute_dtype(layer.dtype);
  const auto make = [&](bool wanted, const Shape& shape, ScalarType type) {
    return result<Device>(wanted, shape, x, type);
  };
  const bool carries = info(layer.cell).saved() > 0;
  const int64_t N = layer.size.steps.N;
  const bool checkpoints = keeps_checkpoints<Device>(layer, save_every);
  const Shape gates = checkpoints ? Shape{0} : call.of_all(layer.saved_shape(Device::kSaved.gates));
  const Shape saved_states =
      call.of_all(checkpoints ? checkpoints_shape(layer, save_every)
                              : layer.saved_shape(Device::kSaved.saved_states));
  return {make(!call.is_step(), call.output_shape(), dtype),
          make(true, call.state_shape(N, layer.size.R), dtype),
          make(layer.has_cell_state(), call.state_shape(N, layer.size.cell_width()), dtype),
          make(save_every > 0, gates, compute),
          make(save_every > 0 && (carries || checkpoints), saved_states, compute)};
}

template <class Device>
Outputs run_forward(Call& call, const Tensor& x, int64_t save_every) {
  const Layer& layer = call.layer();
  const Outputs out = allocate_forward<Device>(call, x, save_every);
  const bool checkpoints = keeps_checkpoints<Device>(layer, save_every);
  std::vector<ForwardParams> params;
  for (int64_t m = 0; m < call.models(); ++m) {
    ForwardParams& p = params.emplace_back(params_of<ForwardParams>(call.layers()[m]));
    p.h_n = call.part(out.h_n, m);
    p.y = call.is_step() ? p.h_n : call.part(out.y, m);
    p.c_n = call.part(out.c_n, m);
    if (checkpoints) {
      p.checkpoints = call.part(out.saved_states, m);
      p.checkpoint_every = save_every;
      continue;
    }
    p.gates = call.part(out.gates, m);
    p.saved_states = call.part(out.saved_states, m);
  }
  if (layer.size.steps.N > 0) Device::forward(call.layers(), params, x, save_every > 0);
  clear_padding<Device>(call, layer, out.y, x);
  insert_padding<Device>(call, layer, Device::kSaved.gates, out.gates, x);
  insert_padding<Device>(call, layer, Device::kSaved.saved_states, out.saved_states, x);
  return out;
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Device>
Forward recurrent_forward(Tensor x, MaybeTensor batch_sizes, MaybeTensor resets, Tensors state0,
                          Tensors weights, int64_t cell, int64_t directions, bool cell_states,
                          int64_t save_every) {
  Call call({x, batch_sizes, resets, state0, weights, cell, directions, cell_states},
            Device::kNeedsUniformRows);
  const Outputs out = run_forward<Device>(call, x, save_every);
  const ScalarType dtype = x.scalar_type(), compute = compute_dtype(call.layer().dtype);
  return {*out.y, *out.h_n, or_empty(out.c_n, x, dtype), or_empty(out.gates, x, compute),
          or_empty(out.saved_states, x, compute)};
}

// Which gradients a backward pass is to compute: one entry each for x, h0, c0, every weight and the
// pre-activations.
struct Wanted {
  bool x, h0, c0;
  std::vector<bool> weights;
  bool preacts;

  Wanted(const std::vector<bool>& mask, size_t count) {
    LSTM_FUSED_CHECK(mask.size() == 4 + count,
                     "mask must have one entry each for x, h0, c0, every weight and the "
                     "pre-activations");
    x = mask[0];
    h0 = mask[1];
    c0 = mask[2];
    weights.assign(mask.begin() + 3, mask.end() - 1);
    preacts = mask.back();
  }

  // Any direction's w_hh.
  bool hidden_weights(int each) const {
    bool any = false;
    for (size_t i = 1; i < weights.size(); i += each) any = any || weights[i];
    return any;
  }
};

// The gradients that are wanted.
struct GradientTensors {
  MaybeTensor dx, dh0, dc0;
  std::vector<MaybeTensor> dweights;
  MaybeTensor d_preacts;
};

template <class Device>
GradientTensors allocate_backward(const Call& call, const Tensor& x, const Tensors& weights,
                                  const Wanted& wanted) {
  const Layer& layer = call.layer();
  const LayerSizes& s = layer.size;
  const ScalarType dtype = x.scalar_type();
  const auto make = [&](bool want, const Shape& shape, ScalarType type) {
    return result<Device>(want, shape, x, type);
  };
  std::vector<MaybeTensor> dweights;
  for (size_t i = 0; i < weights.size(); ++i)
    dweights.push_back(make(wanted.weights[i], shape_of(weights[i]), dtype));
  const Shape preacts = call.of_all({layer.rows, s.D, info(layer.cell).preacts, s.H});
  return {make(wanted.x, shape_of(x), dtype),
          make(wanted.h0, call.state_shape(s.state_rows(), s.R), dtype),
          make(wanted.c0, call.state_shape(s.state_rows(), s.cell_width()), dtype),
          std::move(dweights), make(wanted.preacts, preacts, compute_dtype(layer.dtype))};
}

// The gradient of weight i of a direction, of weights_per_direction; null for masks.
inline void** gradient_of(WeightGradients& gradients, const Layer& layer, int i) {
  void** const places[] = {&gradients.w_ih, &gradients.w_hh, &gradients.b_ih, &gradients.b_hh};
  const int matrices = 2 + 2 * layer.bias;
  if (i < matrices) return places[i];
  if (layer.projection && i == matrices) return &gradients.w_hr;
  return i == matrices + layer.projection && info(layer.cell).vectors ? &gradients.vectors
                                                                      : nullptr;
}

// Whether y, or its gradient, holds cell states too: its width tells.
inline bool has_cell_states(const MaybeTensor& y, const Tensors& weights, int64_t cell,
                            int64_t directions) {
  if (!y || y->dim() == 0 || weights.size() < 2 || weights[1].dim() < 2) return false;
  if (cell < 0 || cell >= cell_count() || directions < 1) return false;
  const CellInfo& known = info(static_cast<CellKind>(cell));
  const size_t matrices = weights.size() / directions - (known.vectors > 0) - (known.masks > 0);
  const Tensor& w_hh = weights[1];
  const int64_t R =
      matrices % 2 == 1 ? w_hh.size(w_hh.dim() - 1) : w_hh.size(w_hh.dim() - 2) / known.gates;
  return y->size(y->dim() - 1) > directions * R;
}

// The outputs' gradients, and y where a gradient of w_hh reads it.
template <class Device>
void read_outputs(Call& call, int64_t m, const Wanted& wanted, const MaybeTensor& y,
                  const MaybeTensor& dy, const MaybeTensor& dh_n, const MaybeTensor& dc_n,
                  BackwardParams& p) {
  const Layer& layer = call.layers()[m];
  const TensorView& x = call.x(m);
  const auto read_output = [&](const Tensor& t, const char* name) -> const void* {
    const TensorView view = call.contiguous(t, m, name);
    check_like(view, x, name);
    const int64_t width = layer.size.y_width();
    if (x.dim == 3)
      check_shape(view, {x.size(0), x.size(1), width}, name);
    else
      check_shape(view, {x.size(0), width}, name);
    return view.data;
  };
  const auto read_state = [&](const Tensor& t, int64_t width, const char* name) -> const void* {
    const TensorView view = call.contiguous_state(t, m, name);
    check_state(view, x, layer, layer.size.steps.N, width, name);
    return view.data;
  };
  if (wanted.hidden_weights(layer.weights_per_direction) &&
      (layer.projection || Device::kNeedsOutput)) {
    LSTM_FUSED_CHECK(y.has_value(), Device::kNeedsOutput ? "" : "with a projection, ",
                     "the gradient of w_hh needs y");
    p.y = read_output(*y, "y");
  }
  if (dy) p.dy = read_output(*dy, "dy");
  if (dh_n) p.dh_n = read_state(*dh_n, layer.size.R, "dh_n");
  if (dc_n) p.dc_n = read_state(*dc_n, layer.size.cell_width(), "dc_n");
}

template <class Device>
GradientTensors run_backward(Call& call, const Tensor& x, const Tensors& weights,
                             const MaybeTensor& y, const Tensor& gates,
                             const MaybeTensor& saved_states, const MaybeTensor& dy,
                             const MaybeTensor& dh_n, const MaybeTensor& dc_n, int64_t save_every,
                             const std::vector<bool>& mask) {
  const Layer& layer = call.layer();
  const Wanted wanted(mask, weights.size());
  LSTM_FUSED_CHECK(layer.has_cell_state() || (!wanted.c0 && !dc_n), "cell ", info(layer.cell).name,
                   " has no c0 or c_n to have a gradient");
  const bool carries = info(layer.cell).saved() > 0;
  const bool checkpoints = keeps_checkpoints<Device>(layer, save_every);
  if (info(layer.cell).masks > 0) {
    const size_t each = layer.weights_per_direction;
    for (size_t i = each - 1; i < weights.size(); i += each)
      LSTM_FUSED_CHECK(!wanted.weights[i], "masks have no gradient");
  }
  LSTM_FUSED_CHECK(!(carries || checkpoints) || saved_states,
                   "saved_states must be as the forward pass saved it");
  Tensors kept;
  std::vector<BackwardParams> params;
  for (int64_t m = 0; m < call.models(); ++m) {
    BackwardParams& p = params.emplace_back(params_of<BackwardParams>(call.layers()[m]));
    if (checkpoints) {
      const Shape shape = checkpoints_shape(layer, save_every);
      const TensorView view = call.contiguous(*saved_states, m, "saved_states");
      check_shape(view, {shape[0], shape[1], shape[2], shape[3]}, "saved_states");
      p.checkpoints = view.data ? view.data : params.data();  // of one part there is none to read
      p.checkpoint_every = save_every;
    } else {
      p.gates = read_saved<Device>(call, m, gates, x, Device::kSaved.gates, false, "gates", kept);
    }
    if (saved_states && !checkpoints)
      p.saved_states = read_saved<Device>(call, m, *saved_states, x, Device::kSaved.saved_states,
                                          !carries, "saved_states", kept);
    read_outputs<Device>(call, m, wanted, y, dy, dh_n, dc_n, p);
  }
  GradientTensors out = allocate_backward<Device>(call, x, weights, wanted);
  const int each = layer.weights_per_direction;
  for (int64_t m = 0; m < call.models(); ++m) {
    BackwardParams& p = params[m];
    p.dx = call.part(out.dx, m);
    p.dh0 = call.part(out.dh0, m);
    p.dc0 = call.part(out.dc0, m);
    for (size_t i = 0; i < weights.size(); ++i)
      if (void** const place = gradient_of(p.dweights[i / each], layer, i % each))
        *place = call.part(out.dweights[i], m);
    p.d_preacts = call.part(out.d_preacts, m);
  }
  if (layer.size.steps.N > 0) {
    Device::backward(call.layers(), params, x);
  } else {
    for (MaybeTensor& t : out.dweights)
      if (t) torch::stable::zero_(*t);
  }
  clear_padding<Device>(call, layer, out.dx, x);
  clear_padding<Device>(call, layer, out.d_preacts, x);
  return out;
}

using Backward = std::tuple<Tensor, Tensor, Tensor, Tensors, Tensor>;

template <class Device>
Backward recurrent_backward(Tensor x, MaybeTensor batch_sizes, MaybeTensor resets, Tensors state0,
                            Tensors weights, MaybeTensor y, Tensor gates, Tensor saved_states,
                            MaybeTensor dy, MaybeTensor dh_n, MaybeTensor dc_n, int64_t cell,
                            int64_t directions, int64_t save_every, std::vector<bool> mask) {
  const bool cell_states = has_cell_states(y ? y : dy, weights, cell, directions);
  Call call({x, batch_sizes, resets, state0, weights, cell, directions, cell_states},
            Device::kNeedsUniformRows);
  const GradientTensors out = run_backward<Device>(call, x, weights, y, gates, saved_states, dy,
                                                   dh_n, dc_n, save_every, mask);
  const ScalarType dtype = x.scalar_type();
  Tensors dweights;
  for (const MaybeTensor& t : out.dweights) dweights.push_back(or_empty(t, x, dtype));
  return {or_empty(out.dx, x, dtype), or_empty(out.dh0, x, dtype), or_empty(out.dc0, x, dtype),
          dweights, or_empty(out.d_preacts, x, compute_dtype(call.layer().dtype))};
}

}  // namespace lstm_fused
