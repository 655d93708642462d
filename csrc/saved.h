// What a forward pass saves for backward, as the kernels of each device lay it out. The layouts are
// data, so that C++ allocates and Python's fake kernels and vmap rules derive the same shapes.
#pragma once

#include "cells/cells.h"

namespace lstm_fused {

// A dimension of a saved tensor.
enum class Dim : int {
  kDirections,    // D
  kBlocks,        // ceil(H / kBlock)
  kRows,          // T * N, or S of packed data
  kPreacts,       // P, pre-activations of a unit
  kLanes,         // kBlock units, the last block zero-padded
  kUnits,         // H
  kCarriedLanes,  // kBlock units of each carried state
  kCarriedUnits,  // H of each carried state
};

inline const char* name(Dim dim) {
  constexpr const char* names[] = {"directions", "blocks", "rows",          "preacts",
                                   "lanes",      "units",  "carried_lanes", "carried_units"};
  return names[static_cast<int>(dim)];
}

inline constexpr int kMaxSavedDims = 5;

struct SavedLayout {
  int count;
  Dim dims[kMaxSavedDims];
};

// gates: the P values of a unit that backward needs, after the activations. saved_states: what the
// cell carries (Carry), nothing if that is none. Both in the compute dtype.
struct SavedLayouts {
  SavedLayout gates, saved_states;
};

inline constexpr SavedLayouts kCpuSaved{
    {5, {Dim::kDirections, Dim::kBlocks, Dim::kRows, Dim::kPreacts, Dim::kLanes}},
    {4, {Dim::kDirections, Dim::kBlocks, Dim::kRows, Dim::kCarriedLanes}}};
inline constexpr SavedLayouts kCudaSaved{
    {4, {Dim::kRows, Dim::kDirections, Dim::kPreacts, Dim::kUnits}},
    {3, {Dim::kRows, Dim::kDirections, Dim::kCarriedUnits}}};

}  // namespace lstm_fused
