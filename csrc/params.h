// What a kernel is given: sizes, strides and raw pointers. Nothing here knows torch.
#pragma once

#include <cstdint>

#include "compiler.h"

namespace lstm_fused {

// Every dtype there is, a row each: its name, the types that kernels store and compute with, and
// torch's ScalarType. BFloat16 and Half are defined where kernels use them (cpu/simd.h,
// cuda/<dtype>.cu).
#define LSTM_FUSED_DTYPES(DTYPE)                       \
  DTYPE(Float32, float32, float, float, Float)         \
  DTYPE(Float64, float64, double, double, Double)      \
  DTYPE(BFloat16, bfloat16, BFloat16, float, BFloat16) \
  DTYPE(Float16, float16, Half, float, Half)

enum class DType : int {
#define LSTM_FUSED_DTYPE(Name, name, Storage, Compute, Torch) k##Name,
  LSTM_FUSED_DTYPES(LSTM_FUSED_DTYPE)
#undef LSTM_FUSED_DTYPE
      kCount
};
inline constexpr int kDTypeCount = static_cast<int>(DType::kCount);

inline const char* name(DType dtype) {
  constexpr const char* names[kDTypeCount] = {
#define LSTM_FUSED_DTYPE(Name, name, Storage, Compute, Torch) #name,
      LSTM_FUSED_DTYPES(LSTM_FUSED_DTYPE)
#undef LSTM_FUSED_DTYPE
  };
  return names[static_cast<int>(dtype)];
}

// Bytes of a value in memory, and of one that is computed with.
LSTM_FUSED_INLINE constexpr int storage_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}
LSTM_FUSED_INLINE constexpr int compute_bytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : 4;
}

// What the weights of a layer are stored in: its dtype, or for inference with float32 less. Those
// are laid out in panels, and of int8 ones each run of kQuantizationGroup in a row has a scale.
enum class WeightFormat : int { kPlain, kInt8, kBFloat16 };
inline constexpr int kQuantizationGroup = 16;

inline const char* name(WeightFormat format) {
  constexpr const char* names[] = {"plain", "int8", "bfloat16"};
  return names[static_cast<int>(format)];
}

// What a cell carries from step to step beside h, in the compute dtype.
enum class Carry : int {
  kNone,    // nothing
  kCell,    // a cell state, c
  kHidden,  // h before it is rounded to the storage dtype: c_0 is h_0
};

// The most parameters, and masks, of a unit: arrays on the stack hold so many vectors.
inline constexpr int kMaxUnitValues = 16;

// What the kernels need to know of a described cell (cells/unit.h), beside its gates.
struct UnitInfo {
  int gates, preacts;
  int cells;              // cell states of a unit
  bool keeps_hidden;      // whether h is carried, too, before it is rounded
  int vectors;            // parameters of a unit
  int masks;              // values of a unit for each step
  int groups;             // of values that are normalized over all units (cells/unit.h)
  bool operand;           // whether the last gate multiplies one of the cell's own (cells/unit.h)
  const void* functions;  // UnitFunctions of the ISA and the compute type
};

// Hidden units come in blocks of 16 in every packed or saved buffer, so that shapes do not depend
// on the ISA's vector length. The last block is zero-padded.
inline constexpr int kBlock = 16;

LSTM_FUSED_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
LSTM_FUSED_INLINE constexpr int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

// Which rows of the batch are alive at each step, and where their data is. Dense: `sizes ==
// nullptr`, all N of them. Otherwise rows are sorted by length, descending, and step t has the
// first sizes[t] of them. Packed (torch's PackedSequence): the data of a step is contiguous, from
// row offsets[t] of all steps' rows on. Documents: the data of a row is contiguous, from starts[n]
// on.
struct Steps {
  int64_t T;
  int64_t N;
  const int64_t* sizes;    // (T,) or null
  const int64_t* offsets;  // (T + 1,) sums of sizes, or null
  // Of documents, else null. Those of the caller are in any order: states are in his.
  const int64_t* starts;  // (N,) of each row
  const int64_t* places;  // (N,) of each row, its number in the caller's order
  const int64_t* bounds;  // (N + 1,) cu_seqlens, in the caller's order
  const int64_t* ranks;   // (N,) the inverse of places
  // Not 0 where a row begins anew before the step, in the order of the data: (S,); or null.
  const uint8_t* resets;
  bool continues;  // these are some of a row's steps: others follow, and the flag of the next is
                   // there

  LSTM_FUSED_INLINE int64_t active(int64_t t) const { return sizes ? sizes[t] : N; }
  LSTM_FUSED_INLINE int64_t offset(int64_t t) const { return offsets ? offsets[t] : t * N; }
  LSTM_FUSED_INLINE int64_t rows() const { return offset(T); }
  // Where (t, n) is among all steps' rows.
  LSTM_FUSED_INLINE int64_t row(int64_t t, int64_t n) const {
    return starts ? starts[n] + t : offset(t) + n;
  }
  LSTM_FUSED_INLINE int64_t place(int64_t n) const { return places ? places[n] : n; }

  // Whether row n has a step t, before which it begins anew: nothing passes from step t - 1 to
  // step t, nor the other way.
  LSTM_FUSED_INLINE bool parted(int64_t t, int64_t n) const {
    if (!resets || t < 0 || t >= T + continues) return false;
    return (t == T || n < active(t)) && resets[row(t, n)];
  }
  // Whether the state before step t of row n in direction d is the one that resets put in, and
  // whether the state after it is not passed on.
  LSTM_FUSED_INLINE bool begins_anew(int d, int64_t t, int64_t n) const {
    return parted(d == 0 ? t : t + 1, n);
  }
  LSTM_FUSED_INLINE bool ends_before_reset(int d, int64_t t, int64_t n) const {
    return d == 0 ? parted(t + 1, n) : t > 0 && parted(t, n);
  }

  // The step whose state step t of row n in direction d continues, or -1 if there is none.
  LSTM_FUSED_INLINE int64_t before(int d, int64_t t, int64_t n) const {
    const int64_t at = d == 0 ? t - 1 : t + 1;
    return at >= 0 && at < T && n < active(at) && !begins_anew(d, t, n) ? at : -1;
  }
};

// Element (t, n, i) of a sequence lies at data[t * stride_t + n * stride_n + i] when dense, at
// data[row(t, n) * stride_n + i] otherwise.
struct Sequence {
  const void* data;
  int64_t stride_t;
  int64_t stride_n;

  LSTM_FUSED_INLINE int64_t row(const Steps& s, int64_t t, int64_t n) const {
    return s.sizes ? s.row(t, n) * stride_n : t * stride_t + n * stride_n;
  }
};

// Pointers in the structs below: inputs are owned by the caller and only read, results are
// allocated by the caller and written in full. No result overlaps an input or another result. S is
// the number of rows of all steps, D the number of directions, P the pre-activations of a unit, C
// the cell states of a unit.

// One direction's parameters, each contiguous, in the layer's dtype. Of another WeightFormat the
// three matrices are panels (blocks, columns / 4, gates, 16, 4), of bfloat16 (.., columns / 2, ..,
// 2): for the units of a block, of every four columns, the rows of each gate; zero where there is
// none. Numbers of 8 bits have 128 added, and scales (blocks, groups, gates, 16), bfloat16: weight
// = (number - 128) * scale.
struct Weights {
  const void* w_ih;                // (G * H, I), G gates
  const void* w_hh;                // (G * H, K)
  const void* b_ih;                // (G * H,) or null
  const void* b_hh;                // (G * H,) or null
  const void* w_hr;                // (R, H) or null: no projection, R == H
  const void *s_ih, *s_hh, *s_hr;  // scales, or null
  const void* vectors;             // (vectors, H) of a described cell that has any, else null
  const void* masks;               // (S, masks * H) in the same way
};

struct LayerSizes {
  Steps steps;
  int64_t I, H, R;
  // Columns of w_hh: R; or of heads H / heads, unit u being of head u / K; or 0.
  int64_t K;
  int D;              // directions
  int C;              // cell states of a unit
  bool x_is_preacts;  // x holds the input's part of the pre-activations, I == G * H: no w_ih
  bool reset_states;  // the initial states have N more rows: what resets put in, else zeros
  bool cell_states;   // y holds the cell states of all steps, too
  int only;           // 1 + the one direction that is run; 0: all

  LSTM_FUSED_INLINE int64_t blocks() const { return ceil_div(H, kBlock); }
  LSTM_FUSED_INLINE int64_t state_rows() const { return reset_states ? 2 * steps.N : steps.N; }
  LSTM_FUSED_INLINE int first_direction() const { return only ? only - 1 : 0; }
  LSTM_FUSED_INLINE int end_direction() const { return only ? only : D; }
  LSTM_FUSED_INLINE int64_t cell_width() const { return C * H; }
  LSTM_FUSED_INLINE int64_t checkpoint_width() const { return R + cell_width(); }
  LSTM_FUSED_INLINE int64_t heads() const { return K == 0 || K == R ? 1 : H / K; }
  // Of a row of y: the hidden states of all directions, then their cell states if wanted.
  LSTM_FUSED_INLINE int64_t y_width() const { return D * (cell_states ? R + cell_width() : R); }
  LSTM_FUSED_INLINE int64_t hidden_at(int d, int64_t s) const { return s * y_width() + d * R; }
  LSTM_FUSED_INLINE int64_t cell_at(int d, int64_t s) const {
    return s * y_width() + D * R + d * cell_width();
  }
  // Row n of the initial states (D, state_rows, width), or of those that resets put in; -1 for
  // zeros.
  LSTM_FUSED_INLINE int64_t initial_row(int d, int64_t n, bool reset) const {
    if (reset && !reset_states) return -1;
    return d * state_rows() + (reset ? steps.N : 0) + steps.place(n);
  }
  // Row n of the final states (D, N, width).
  LSTM_FUSED_INLINE int64_t final_row(int d, int64_t n) const {
    return d * steps.N + steps.place(n);
  }
};

struct ForwardParams {
  LayerSizes size;
  Sequence x;      // (T, N, I) or (S, I)
  const void* h0;  // (D, state_rows, R), or null for zeros
  const void* c0;  // (D, state_rows, C * H), or null for zeros and without a cell state
  Weights weights[2];
  void* y;    // (S, y_width); may be h_n itself where T, D and the number of layers are 1
  void* h_n;  // (D, N, R)
  void* c_n;  // (D, N, C * H), or null without a cell state
  // Saved for backward, in the compute dtype; null without gradients. Layouts: saved.h.
  void* gates;  // (D, H/16, S, P, 16) the pre-activations as the cell's forward left them
  // (D, H/16, S, C' + groups, 16) the C' carried states, then of each group that is normalized its
  // mean and 1 / its standard deviation; or null if there is none of either.
  void* saved_states;
  // The states between steps k * checkpoint_every - 1 and k * checkpoint_every of dense data, for k
  // from 1 on: (count, D, N, checkpoint_width) in the compute dtype: h, as it is carried if it is,
  // and the cell states. Or null.
  void* checkpoints;
  int64_t checkpoint_every;
  const void* resume;    // one of them, (D, N, checkpoint_width): where the pass begins; or null
  int64_t calls;         // of this thread until now
  const UnitInfo* unit;  // of a described cell, else null; set by the launch
  void* scratch;         // forward_scratch() bytes, 64-byte aligned, owned by the calling thread
};

// The forward pass of tangents. x, h0, c0, the biases, y, h_n and c_n are tangents; w_ih and w_hh
// are values, whose own tangents have been multiplied into preacts.
struct TangentParams : ForwardParams {
  const void* primal_c0;  // (D, state_rows, H) the initial carried state, h0 if that is h; or null
  const void* primal_gates;   // as forward saved them
  const void* primal_states;  // as forward saved them
  const void* preacts;        // (S, D, P, H) added to the pre-activations' tangents, or null
};

// Each shaped as its weight, or null where it is not wanted.
struct WeightGradients {
  void* w_ih;
  void* w_hh;
  void* b_ih;
  void* b_hh;
  void* w_hr;
  void* vectors;
};

struct BackwardParams {
  LayerSizes size;
  Sequence x;  // as in ForwardParams, as are h0, c0 and weights
  const void* h0;
  const void* c0;
  Weights weights[2];
  const void* y;             // (S, y_width), where the gradient of w_hh reads it; else null
  const void* gates;         // as forward saved them
  const void* saved_states;  // as forward saved them, or null
  const void* dy;            // (S, y_width) or null for zeros
  const void* dh_n;          // (D, N, R) or null for zeros
  const void* dc_n;          // (D, N, C * H) or null for zeros
  void* dx;                  // (S, I), or null where it is not wanted
  void* dh0;                 // (D, state_rows, R), or null where it is not wanted
  void* dc0;                 // (D, state_rows, C * H), or null where it is not wanted
  WeightGradients dweights[2];
  // What forward stored, and then neither gates nor saved_states.
  const void* checkpoints;
  int64_t checkpoint_every;
  // A call for the steps between two checkpoints, in one direction. The gradients of the states at
  // either end are (D, N, R + C' * H) in the compute dtype, of h and of what is carried; null: dh_n
  // and dc_n, dh0 and dc0. Sums over the steps of all calls are in lasting, backward_lasting()
  // bytes.
  const void* resume;
  const void* d_after;
  void* d_before;
  void* lasting;    // or null: one call for all steps
  bool continued;   // lasting holds sums
  bool unfinished;  // more calls follow
  bool add_dx;      // to what dx holds
  void* d_preacts;  // (S, D, P, H) gradients of the pre-activations, in the compute dtype, or null
  const UnitInfo* unit;  // of a described cell, else null; set by the launch
  void* scratch;         // backward_scratch() bytes, 64-byte aligned, owned by the calling thread
};

}  // namespace lstm_fused
