// What the kernels give a described cell's functions: pointers to one vector of `lanes` units of
// one row. Value k of an array begins at element k * its stride; an array without a stride has
// `lanes`. A is the compute type. Inputs are read before results are written, so that any result
// may lie where an input lies.
#pragma once

#include <cstdint>

#include "../compiler.h"

namespace lstm_fused {

// Of normalize() (trace.h): values of each unit that share a mean. A group of level k needs those
// of lower levels.
inline constexpr int kMaxUnitGroups = 3;
struct UnitGroup {
  int level, count;
};

template <class A>
struct UnitForward {
  const A *preacts, *vectors, *masks;  // (kPreacts, lanes), (kVectors, lanes), (kMasks, lanes)
  const A* prev;                       // (kCells + kKeepsHidden, lanes)
  int64_t prev_stride;
  A* next;  // as prev; may be prev itself
  int64_t next_stride;
  A* h;  // (lanes,)
  // (groups, 4): the mean, 1 / the standard deviation; in backward also the means of d and of d *
  // value, where value is normalized and d its gradient.
  const A* statistics;
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
  const A* statistics;
  // Of a cell with an operand (described.h): its gradient; out: the operand again, not rounded.
  const A* d_operand;
  A* operand;
};

template <class A>
struct UnitFunctions {
  void (*forward)(const UnitForward<A>&);
  void (*backward)(const UnitBackward<A>&);
  int groups, levels;
  UnitGroup group[kMaxUnitGroups];
  // For each level: the values of its groups (count, lanes), one group after the other; and of each
  // group the sums of d and of d * value over its values, (2, lanes). They write nothing else.
  void (*values[kMaxUnitGroups])(const UnitForward<A>&, A* to);
  void (*sums[kMaxUnitGroups])(const UnitBackward<A>&, A* to);
  // Of a cell with an operand, else null: the operand, in the place of h; and the gradient of the
  // last pre-activation (lanes,), from which that of the operand follows. They write nothing else.
  void (*operand)(const UnitForward<A>&);
  void (*last_gradient)(const UnitBackward<A>&, A* to);
};

}  // namespace lstm_fused
