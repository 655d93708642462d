// The parameters and masks of a described cell (cells/unit.h), as its functions read them: vectors
// of units in the compute type, zero where there is no unit.
#pragma once

#include "partition.h"

namespace lstm_fused {
namespace {

// to (count, lanes): the masks (S, count * H) of step t of row n, for the vector of units from u
// on.
template <class S, class A>
void load_masks(const LayerSizes& size, const void* masks, int count, int64_t t, int64_t n,
                int64_t u, A* to) {
  const int64_t H = size.H;
  const S* from = static_cast<const S*>(masks) + size.steps.row(t, n) * count * H + u;
  for (int k = 0; k < count; ++k)
    store(to + k * VectorOf<A>::lanes, load_first<Vector<A>>(from + k * H, H - u));
}

// to (units, count, lanes): the parameters (count, H) for vectors of units.
template <class S, class A>
void load_unit_vectors(const LayerSizes& size, const void* vectors, int count, Range units, A* to) {
  constexpr int lanes = VectorOf<A>::lanes;
  const int64_t H = size.H;
  for (int64_t vec = units.begin; vec < units.end; ++vec)
    for (int k = 0; k < count; ++k) {
      const S* from = static_cast<const S*>(vectors) + k * H + vec * lanes;
      store(to + (vec * count + k) * lanes, load_first<Vector<A>>(from, H - vec * lanes));
    }
}

}  // namespace
}  // namespace lstm_fused
