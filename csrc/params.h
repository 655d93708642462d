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

// What a cell carries from step to step beside h, in the compute dtype.
enum class Carry : int {
  kNone,    // nothing
  kCell,    // a cell state, c
  kHidden,  // h before it is rounded to the storage dtype: c_0 is h_0
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

// Which rows of the batch are alive at each step. Dense: `sizes == nullptr`, all N of them. Packed
// (torch's PackedSequence): rows sorted by length, descending; step t has sizes[t] rows, the first
// of which is row offsets[t] of the packed data.
struct Steps {
  int64_t T;
  int64_t N;
  const int64_t* sizes;    // (T,) or null
  const int64_t* offsets;  // (T + 1,) or null

  LSTM_FUSED_INLINE int64_t active(int64_t t) const { return sizes ? sizes[t] : N; }
  LSTM_FUSED_INLINE int64_t offset(int64_t t) const { return offsets ? offsets[t] : t * N; }
  LSTM_FUSED_INLINE int64_t rows() const { return offset(T); }
  // The step before step t of row n in direction d, or -1 if t is its first.
  LSTM_FUSED_INLINE int64_t before(int d, int64_t t, int64_t n) const {
    const int64_t at = d == 0 ? t - 1 : t + 1;
    return at >= 0 && at < T && n < active(at) ? at : -1;
  }
};

// Element (t, n, i) of a sequence lies at data[t * stride_t + n * stride_n + i] when dense, at
// data[(offset(t) + n) * stride_n + i] when packed.
struct Sequence {
  const void* data;
  int64_t stride_t;
  int64_t stride_n;

  LSTM_FUSED_INLINE int64_t row(const Steps& s, int64_t t, int64_t n) const {
    return s.sizes ? (s.offsets[t] + n) * stride_n : t * stride_t + n * stride_n;
  }
};

// Pointers in the structs below: inputs are owned by the caller and only read, results are
// allocated by the caller and written in full. No result overlaps an input or another result. S is
// the number of rows of all steps, D the number of directions, P the pre-activations of a unit.

// One direction's parameters, each contiguous, in the layer's dtype.
struct Weights {
  const void* w_ih;  // (G * H, I), G gates
  const void* w_hh;  // (G * H, R)
  const void* b_ih;  // (G * H,) or null
  const void* b_hh;  // (G * H,) or null
  const void* w_hr;  // (R, H) or null: no projection, R == H
};

struct LayerSizes {
  Steps steps;
  int64_t I, H, R;
  int D;  // directions

  LSTM_FUSED_INLINE int64_t blocks() const { return ceil_div(H, kBlock); }
};

struct ForwardParams {
  LayerSizes size;
  Sequence x;      // (T, N, I) or (S, I)
  const void* h0;  // (D, N, R), or null for zeros
  const void* c0;  // (D, N, H), or null for zeros and without a cell state
  Weights weights[2];
  void* y;    // (S, D * R); may be h_n itself where T, D and the number of layers are 1
  void* h_n;  // (D, N, R)
  void* c_n;  // (D, N, H), or null without a cell state
  // Saved for backward, in the compute dtype; null without gradients. Layouts: saved.h.
  void* gates;         // (D, H/16, S, P, 16) the pre-activations as the cell's forward left them
  void* saved_states;  // (D, H/16, S, 16) the carried state, or null if the cell carries none
  int64_t calls;       // of this thread until now
  void* scratch;       // forward_scratch() bytes, 64-byte aligned, owned by the calling thread
};

// The forward pass of tangents. x, h0, c0, the biases, y, h_n and c_n are tangents; w_ih and w_hh
// are values, whose own tangents have been multiplied into preacts.
struct TangentParams : ForwardParams {
  const void* primal_c0;  // (D, N, H) the initial carried state, h0 if the cell carries h; or null
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
};

struct BackwardParams {
  LayerSizes size;
  Sequence x;  // as in ForwardParams, as are h0, c0 and weights
  const void* h0;
  const void* c0;
  Weights weights[2];
  const void* y;             // (S, D * R), where the gradient of w_hh reads it; else null
  const void* gates;         // as forward saved them
  const void* saved_states;  // as forward saved them, or null
  const void* dy;            // (S, D * R) or null for zeros
  const void* dh_n;          // (D, N, R) or null for zeros
  const void* dc_n;          // (D, N, H) or null for zeros
  void* dx;                  // (S, I), or null where it is not wanted
  void* dh0;                 // (D, N, R), or null where it is not wanted
  void* dc0;                 // (D, N, H), or null where it is not wanted
  WeightGradients dweights[2];
  void* d_preacts;  // (S, D, P, H) gradients of the pre-activations, in the compute dtype, or null
  void* scratch;    // backward_scratch() bytes, 64-byte aligned, owned by the calling thread
};

}  // namespace lstm_fused
