// Cells whose steps tests/kernels/test_described.py has in Python, for every operation and every
// way in which a gradient reaches an input.
#pragma once

#include "cells/described.h"

#define LSTM_FUSED_TESTED_CELLS(CELL) \
  CELL(Peephole) CELL(Exponential) CELL(Functions) CELL(Kinks) CELL(Passing)

namespace lstm_fused {
namespace {

struct Peephole : DescribedCell {
  static constexpr int kGates = 4, kPreacts = 4, kCells = 1, kVectors = 3;

  template <class V>
  static constexpr V forward(const V* preact, const V* vector, const V*, const V* prev, V* next) {
    const V i = sigmoid(preact[0] + vector[0] * prev[0]);
    const V f = sigmoid(preact[1] + vector[1] * prev[0]);
    const V c = f * prev[0] + i * tanh(preact[2]);
    next[0] = c;
    return sigmoid(preact[3] + vector[2] * c) * tanh(c);
  }
};

// Three states of which two enter h, exponential gates.
struct Exponential : DescribedCell {
  static constexpr int kGates = 4, kPreacts = 4, kCells = 3;

  template <class V>
  static constexpr V forward(const V* preact, const V*, const V*, const V* prev, V* next) {
    const V forget = log_sigmoid(preact[1]) + prev[2], m = max(preact[0], forget);
    const V i = exp(preact[0] - m), f = exp(forget - m);
    next[0] = f * prev[0] + i * tanh(preact[2]);
    next[1] = f * prev[1] + i;
    next[2] = m;
    return sigmoid(preact[3]) * next[0] / next[1];
  }
};

struct Functions : DescribedCell {
  static constexpr int kGates = 2, kPreacts = 3, kVectors = 2, kMasks = 2;
  static constexpr bool kKeepsHidden = true;

  template <class V>
  static constexpr V forward(const V* preact, const V* vector, const V* mask, const V* prev, V*) {
    const V half = 0.1;
    V sum = half * 5 * -preact[0];
    sum += mask[0] * log(abs(preact[1]) + 1.5);
    sum -= 2 / (1 + exp(vector[0]));
    sum *= mask[1] - preact[2];
    sum /= 3;
    const V square = sum * sum;
    return clip(sum, 1.25) + min(square, vector[1]) * prev[0] + relu(preact[2]) * (half + 1);
  }
};

// What torch does where a derivative jumps.
struct Kinks : DescribedCell {
  static constexpr int kGates = 4, kPreacts = 4, kVectors = 1, kCells = 1;

  template <class V>
  static constexpr V forward(const V* preact, const V* vector, const V*, const V* prev, V* next) {
    next[0] = max(preact[0], preact[1]) + 3 * min(preact[0], preact[1]) + relu(preact[2]) +
              if_less(preact[2], preact[3], preact[0] * 2, preact[1] * 3);
    return abs(preact[3]) + clip(prev[0], vector[0]) + clip(preact[1], 1.0);
  }
};

// A state that is passed on, one that h is, and one that is a constant.
struct Passing : DescribedCell {
  static constexpr int kGates = 1, kPreacts = 2, kCells = 3;
  static constexpr bool kKeepsHidden = true;

  template <class V>
  static constexpr V forward(const V* preact, const V*, const V*, const V* prev, V* next) {
    const V h = tanh(preact[0] + preact[1]) + prev[3] / 2;
    next[0] = prev[1];
    next[1] = h;
    next[2] = -0.75;
    return h;
  }
};

}  // namespace
}  // namespace lstm_fused
