// What a CUDA kernel is given. Nothing here knows torch, and the host emulation uses the same.
//
// A step of the recurrence is a product of A (the weights) with B (what the previous step computed)
// and an epilogue on each of its results. A described cell whose w_hh has no columns has the
// epilogue alone: A and B are null then.
//   epilogue       A                     B                      gives B of the next product
//   ForwardCell    w_hh (G * H, R)       h (N, R)               h (N, H)
//   Project        w_hr (R, H)           h of the cell (N, H)   h (N, R)
//   BackwardCell   w_hh^T (R, G, H)      d_gates (N, G * H)     d_gates (N, G * H)
//   with a projection the last one is two:
//   ProjectedGradient  w_hh^T (R, G, H)      d_gates (N, G * H)     d_h (N, R)
//   BackwardCell   w_hr^T (H, R)         d_h (N, R)             d_gates (N, G * H)
//   with an operand (cells/described.h) all are two, G' = G - 1:
//   OperandCell      w_hh (G' * H, H)      h (N, H)               operand (N, H)
//   OperandForward   last gate (H, H)      operand (N, H)         h (N, H)
//   OperandGradient  w_hh^T (H, G', H)     d_gates (N, G' * H)    last gate's d_gates (N, H)
//   OperandBackward  last gate^T (H, H)    those (N, H)           d_gates (N, G' * H)
// In the terms of the matrix instructions, rows of A are M and rows of the batch are N.
#pragma once

#include "../params.h"

namespace lstm_fused::cuda {

// The rows that one step of a pass over the sequence concerns. Steps are counted in the order of
// the pass. Row n has its first step here if n >= active_prev, and its last one if n >=
// active_next. Persistent kernels count in int, of which the product with a width is a single
// instruction: plan.cpp gives them no more rows than that.
template <class I>
struct StepRowsOf {
  using Index = I;
  I active;       // rows of the batch at this step
  I active_prev;  // at the previous step, 0 at the first one
  I active_next;  // at the next step, 0 at the last one
  I offset;       // first row of this step in y, pre, gates, saved_states
  I offset_next;  // first row of the next step
};
using StepRows = StepRowsOf<int64_t>;

LSTM_FUSED_INLINE int64_t active_at(const Steps& steps, int64_t s, bool reversed) {
  if (s < 0 || s >= steps.T) return 0;
  return steps.active(reversed ? steps.T - 1 - s : s);
}

LSTM_FUSED_INLINE int64_t offset_at(const Steps& steps, int64_t s, bool reversed) {
  if (s < 0 || s >= steps.T) return 0;
  return steps.offset(reversed ? steps.T - 1 - s : s);
}

// Step s of a pass. A backward pass has a step s == T, in which no row is active, if it computes
// gradients of the initial state.
LSTM_FUSED_INLINE StepRows rows_at(const Steps& steps, int64_t s, bool reversed) {
  return {active_at(steps, s, reversed), active_at(steps, s - 1, reversed),
          active_at(steps, s + 1, reversed), offset_at(steps, s, reversed),
          offset_at(steps, s + 1, reversed)};
}

// The buffer that carries B from one step to the next: double buffered, (2, D, rows, bytes), or
// (1, D, rows, bytes) where a launch ends between writing and reading. It starts as zeros, and
// stays zero where no step writes: in rows from N on and in columns after the last unit.
struct Exchange {
  char* data;
  int64_t buffer_bytes;  // from one buffer to the other, 0 if there is one
  int64_t rows;          // of a direction, a multiple of the plan's tile_rows
  int64_t bytes;         // of a row, a multiple of kSliceBytes

  // Row n of direction d in the buffer that step s reads and step s - 1 writes.
  LSTM_FUSED_INLINE char* at(int64_t s, int d, int64_t n) const {
    return data + buffer(s) + (d * rows + n) * bytes;
  }
  LSTM_FUSED_INLINE int64_t buffer(int64_t s) const { return s & 1 ? buffer_bytes : 0; }
};

struct Product {
  const char* a[2];  // for each direction (gates * units, in.bytes), rows 16-byte aligned
  int64_t units;     // rows of A of one gate
  Exchange in;       // B
  Exchange out;      // B of the next product; may be the same buffers as `in`
};

// All tensors are contiguous. S is the sum of the active rows of all steps, C the cell states of a
// unit (1 of an LSTM), C' the states that it carries: these, and h if it is carried before it is
// rounded. "storage" is the layer's dtype, "compute" is float32, or float64 for float64. The caller
// owns all memory. Pointers alias each other only where that is said.
struct RecurrenceParams {
  // Device pointers, for a launch of several steps: of a persistent kernel, or of a cell without
  // products. Zeros for a launch of one step.
  Steps steps;
  int64_t s_begin, s_end;
  StepRows rows[2];  // of step s_begin for each direction, for a launch of one step
  int64_t N, H, R;
  int D;
  bool projection;     // the cell's h is projected by w_hr before the recurrence uses it
  bool cell_states;    // y holds those of all steps, and dy their gradients
  int64_t y_width;     // of a row of y: D * R, with cell states D * R + D * C * H
  int64_t state_rows;  // of h0, c0 and their gradients: N, or 2 * N with a reset state
  // Not 0 where a row begins anew before the step, (S,); or null. It begins with the last N rows of
  // h0 and c0, or with zeros.
  const uint8_t* resets;
  Product product;
  // Counters of the barriers of a grid plan, (D, row groups), kBarrierBytes apart. The CTAs of a
  // group share one. Zero at the launch.
  char* barrier;

  // For a gemm plan: the product of each direction, compute (N, gates * units), or null.
  const void* products[2];

  // What the first epilogue of a step of a cell with an operand leaves to the second: the
  // pre-activations, compute (D, N, P, H), or backward the gradient of h, compute (D, N, H).
  void* between;

  // Of pre, gates and saved_states there may be the rows of some steps alone: the pointers are
  // where direction 0 would have the first row of all, and direction 1 has its rows (s, d) so many
  // of them further on.
  int64_t saved_shift;

  // Forward.
  const void* pre;      // compute (S, D, G, H): x.W_ih, in w_ih's gate order
  const void* b_ih[2];  // storage (G * H,) or null
  const void* b_hh[2];  // storage (G * H,) or null
  const void* h0;       // storage (D, state_rows, R) or null for zeros
  const void* c0;       // storage (D, state_rows, C * H) or null for zeros
  // Of a described cell that has any, else null: storage (vectors, H) and (S, masks * H).
  const void *vectors[2], *masks[2];
  // Where a launch of some of the steps begins: the states before step s_begin, h first, compute
  // (D, N, resume_width), or null for the initial states. What the cell carries is in `carry` then.
  const void* resume;
  int64_t resume_width;
  bool in_parts;  // such launches share B, which may then hold anything at their begin
  void* y;        // storage (S, y_width), or null as are h_n and c_n where they are not wanted
  void* h_n;      // storage (D, N, R)
  void* c_n;      // storage (D, N, C * H), or null where the cell has no state of its own
  void* carry;    // compute (D, N, C', H): what the cell carries, cell states first; its gradient
                  // backward
  void* gates;    // compute (S, D, P, H), P preacts a unit, or null; may alias pre
  // compute (S, D, C' + groups, H): what the cell carries after each step, and of each group that
  // is normalized over the row its mean and 1 / its standard deviation, the first two of H values;
  // or null. Backward also reads that of the step before s_begin.
  void* saved_states;
  // Backward.
  const void* h;     // storage (S, y_width): y, where h_prev is wanted
  void* h_prev;      // storage (S, D, R): h that the step began with, or null
  const void* dy;    // storage (S, y_width) or null
  const void* dh_n;  // storage (D, N, R) or null
  const void* dc_n;  // storage (D, N, C * H) or null
  void* d_gates;     // storage (S, D, P, H): gradients of the preacts
  // storage (S, D, H): h before the projection, or the operand of a cell that has one and where
  // w_hh's gradient is wanted; or null.
  void* hidden;
  void* d_hidden;  // storage (S, D, R): gradient of h after the projection, or null without one
  void* dh0;       // storage (D, state_rows, R) or null
  void* dc0;       // storage (D, state_rows, C * H) or null
  // Sums of the reset state's gradients over the steps that began with it, which start as zeros;
  // null where they are not wanted.
  void* dh_reset;  // compute (D, N, R)
  void* dc_reset;  // compute (D, N, C * H)
  // Sums of the vectors' gradients over the steps of a row, which start as zeros; or null.
  void* d_vectors;  // compute (D, N, vectors, H)
};

}  // namespace lstm_fused::cuda
