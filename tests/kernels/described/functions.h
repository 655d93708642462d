// What tests/kernels/test_described.py calls of one ISA: the functions of the cells of cells.h, and
// those of activations.h.
#include "cpu/activations.h"

#include "cells.h"
#include "cells/derive.h"

namespace lstm_fused {
namespace {

template <class A>
void activation(int which, const A* from, A* to, int64_t count) {
  using V = Vector<A>;
  for (int64_t i = 0; i < count; i += VectorOf<A>::lanes) {
    const V x = load<V>(from + i);
    store(to + i, which == 0 ? exp(x) : which == 1 ? log(x) : log_sigmoid(x));
  }
}

struct Counts {
  int preacts, vectors, masks, states, lanes;
};

template <class A, class Cell>
Counts described(UnitFunctions<A>& functions) {
  using D = Derivation<Cell>;
  functions = {unit_forward<Cell, Vector<A>>, unit_backward<Cell, Vector<A>>};
  return {D::kPreacts, D::kVectors, D::kMasks, D::kStates, VectorOf<A>::lanes};
}

// Runs `rows` vectors of units; each array is (rows, its count, lanes), one after the other.
template <class A>
void run(const UnitFunctions<A>& functions, const Counts& n, int64_t rows, const A* in, A* out) {
  const int inputs = n.preacts + n.vectors + n.masks + n.states;
  for (int64_t i = 0; i < rows; ++i) {
    const A* preacts = in;
    const A* vectors = preacts + n.preacts * n.lanes;
    const A* masks = vectors + n.vectors * n.lanes;
    const A* prev = masks + n.masks * n.lanes;
    const A* dh = in + inputs * n.lanes;
    const A* d_next = dh + n.lanes;
    A* h = out;
    A* next = h + n.lanes;
    A* h_again = next + n.states * n.lanes;
    A* d_preacts = h_again + n.lanes;
    A* d_vectors = d_preacts + n.preacts * n.lanes;
    A* d_prev = d_vectors + n.vectors * n.lanes;
    functions.forward({preacts, vectors, masks, prev, n.lanes, next, n.lanes, h});
    std::memcpy(d_prev, d_next, n.states * n.lanes * sizeof(A));
    functions.backward({preacts, n.lanes, vectors, masks, prev, n.lanes, next, n.lanes, dh, d_prev,
                        n.lanes, d_preacts, d_vectors, h_again});
    in = d_next + n.states * n.lanes;
    out = d_prev + n.states * n.lanes;
  }
}

template <class A>
Counts find(const char* name, UnitFunctions<A>& functions) {
#define LSTM_FUSED_FIND(Cell) \
  if (!std::strcmp(name, #Cell)) return described<A, Cell>(functions);
  LSTM_FUSED_TESTED_CELLS(LSTM_FUSED_FIND)
#undef LSTM_FUSED_FIND
  return {};
}

template <class A>
int run_cell(const char* name, int64_t rows, const A* in, A* out) {
  UnitFunctions<A> functions{};
  const Counts counts = find(name, functions);
  if (functions.forward && rows > 0) run(functions, counts, rows, in, out);
  return counts.lanes;
}

}  // namespace
}  // namespace lstm_fused

extern "C" {
void activation_float(int which, const float* from, float* to, int64_t count) {
  lstm_fused::activation(which, from, to, count);
}
void activation_double(int which, const double* from, double* to, int64_t count) {
  lstm_fused::activation(which, from, to, count);
}
// -> lanes, of a vector; 0: there is no such cell.
int run_float(const char* name, int64_t rows, const float* in, float* out) {
  return lstm_fused::run_cell(name, rows, in, out);
}
int run_double(const char* name, int64_t rows, const double* in, double* out) {
  return lstm_fused::run_cell(name, rows, in, out);
}
}
