// What a CUDA kernel is given. Nothing here knows torch, and the host emulation uses the same.
//
// The recurrence is a product a step, A (stationary weights) times B (what the last step handed
// on), and an epilogue on its results, unit by unit:
//   forward     A = w_hh (G * H, R)             B = h (N, R)         -> cell -> h (N, H)
//   project     A = w_hr (R, H)                 B = hidden (N, H)    -> h (N, R)
//   backward    A = w_hh^T (R, G, H)            B = d_gates (N, G*H) -> cell -> d_gates
//   unproject   A = w_hr^T (H, R)               B = d_h (N, R)       -> cell -> d_gates
// Rows of A are M of the matrix instructions, rows of the batch are N.
#pragma once

#include "../params.h"

namespace lstm_fused::cuda {

// The steps of one walk over a sequence that a step's epilogue must tell apart. A row n begins at
// this step of the walk if n >= before, and ends with it if n >= after.
struct StepRows {
  int64_t active;        // rows alive at this step
  int64_t before;        // at the walk's step before, 0 at its first
  int64_t after;         // at the walk's step after, 0 at its last
  int64_t offset;        // first row of this step in y, pre, gates, cells
  int64_t offset_after;  // first row of the walk's step after
};

LSTM_FUSED_INLINE int64_t active_at(const Steps& steps, int64_t s, bool reversed) {
  if (s < 0 || s >= steps.T) return 0;
  return steps.active(reversed ? steps.T - 1 - s : s);
}

LSTM_FUSED_INLINE int64_t offset_at(const Steps& steps, int64_t s, bool reversed) {
  if (s < 0 || s >= steps.T) return 0;
  return steps.offset(reversed ? steps.T - 1 - s : s);
}

// Step s of a walk of T steps; s == T is the step past the end that a backward walk adds, where no
// row is alive.
LSTM_FUSED_INLINE StepRows rows_at(const Steps& steps, int64_t s, bool reversed) {
  return {active_at(steps, s, reversed), active_at(steps, s - 1, reversed),
          active_at(steps, s + 1, reversed), offset_at(steps, s, reversed),
          offset_at(steps, s + 1, reversed)};
}

// A buffer that one step writes and the next reads: (2, D, rows, bytes), or (1, D, rows, bytes)
// where a launch lies between writing and reading. Zero where nothing is ever written: rows beyond
// N, columns beyond the last unit.
struct Exchange {
  char* data;
  int64_t flip;   // bytes from one half to the other, 0 if there is one
  int64_t rows;   // of a direction, a multiple of every tile's
  int64_t bytes;  // of a row, a multiple of kKBytes

  LSTM_FUSED_INLINE char* at(int64_t s, int d, int64_t n) const {
    return data + (s & 1) * flip + (d * rows + n) * bytes;
  }
};

struct Product {
  const char* a[2];  // for each direction (gates * units, in.bytes), rows 16-byte aligned
  int64_t units;     // rows of A of one gate
  Exchange in;       // B, read half s & 1
  Exchange out;      // the next product's B, written half (s + 1) & 1, or the half read if !flip
};

struct RecurrenceParams {
  Steps steps;  // device pointers in a persistent kernel, host pointers never reach a kernel
  int64_t s_begin, s_end;
  StepRows rows[2];  // of step s_begin for each direction, where a launch is one step
  int64_t N, H, R;   // below, S is the sum of all steps' active rows
  int D;
  bool projection;  // the cell's h is not yet the recurrent one
  Product product;
  // Groups of CTAs that meet each step: (D, groups) counters kBarrierBytes apart, zero at the
  // launch.
  char* barrier;

  // Where a library takes the product: its results for each direction, compute (N, gates * units).
  const void* sums[2];

  // Forward. The compute dtype is float, or double of float64.
  const void* pre;      // compute (S, D, G, H): x.W_ih, in w_ih's gate order
  const void* b_ih[2];  // storage (G * H,) or null
  const void* b_hh[2];  // storage (G * H,) or null
  const void* h0;       // storage (D, N, R) or null
  const void* c0;       // storage (D, N, H) or null
  void* y;              // storage (S, D * R)
  void* h_n;            // storage (D, N, R)
  void* c_n;            // storage (D, N, H), or null where the cell has no state of its own
  void* carry;          // compute (D, N, H): what the cell carries; d_c backward
  void* gates;          // compute (S, D, sums, H) or null; may be pre's own memory
  void* cells;          // compute (S, D, H), or null without gradients or memory
  // Backward.
  const void* h;     // storage (S, D * R): y, where before is wanted
  void* before;      // storage (S, D, R): h of the step before, or null
  const void* dy;    // storage (S, D * R) or null
  const void* dh_n;  // storage (D, N, R) or null
  const void* dc_n;  // storage (D, N, H) or null
  void* d_gates;     // storage (S, D, sums, H)
  void* hidden;      // storage (S, D, H): h before the projection, or null without one
  void* d_hidden;    // storage (S, D, R): gradient of h after the projection, or null without
  void* dh0;         // storage (D, N, R) or null
  void* dc0;         // storage (D, N, H) or null
};

}  // namespace lstm_fused::cuda
