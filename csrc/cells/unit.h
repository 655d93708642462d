// What the kernels give a described cell's functions: pointers to one vector of `lanes` units of
// one row. Value k of an array begins at element k * its stride; an array without a stride has
// `lanes`. A is the compute type. Inputs are read before results are written, so that any result
// may lie where an input lies.
#pragma once

#include <cstdint>

#include "../compiler.h"

namespace lstm_fused {

template <class A>
struct UnitForward {
  const A *preacts, *vectors, *masks;  // (kPreacts, lanes), (kVectors, lanes), (kMasks, lanes)
  const A* prev;                       // (kCells + kKeepsHidden, lanes)
  int64_t prev_stride;
  A* next;  // as prev; may be prev itself
  int64_t next_stride;
  A* h;  // (lanes,)
};

template <class A>
struct UnitBackward {
  const A* preacts;  // as forward was given them
  int64_t preacts_stride;
  const A *vectors, *masks;
  const A* prev;
  int64_t prev_stride;
  const A* next;  // as forward left it
  int64_t next_stride;
  const A* dh;
  // In: gradients of next from later steps; out: gradients of prev, from the cell alone.
  A* d_state;
  int64_t d_state_stride;
  A *d_preacts, *d_vectors;  // out
  A* h;                      // out: h again, not rounded
};

template <class A>
struct UnitFunctions {
  void (*forward)(const UnitForward<A>&);
  void (*backward)(const UnitBackward<A>&);
};

}  // namespace lstm_fused
