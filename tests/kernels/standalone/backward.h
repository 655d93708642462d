// The part of a backward pass's params that its forward pass determines.
#pragma once

#include "../../../csrc/params.h"

namespace lstm_fused {

inline BackwardParams backward_of(const ForwardParams& f) {
  BackwardParams g{};
  g.size = f.size;
  g.x = f.x;
  g.h0 = f.h0;
  g.c0 = f.c0;
  g.y = f.y;
  g.gates = f.gates;
  g.saved_states = f.saved_states;
  g.checkpoints = f.checkpoints;
  g.checkpoint_every = f.checkpoint_every;
  for (int d = 0; d < f.size.D; ++d) g.weights[d] = f.weights[d];
  return g;
}

}  // namespace lstm_fused
