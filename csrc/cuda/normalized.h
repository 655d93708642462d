// The kernels of the gemm plan for cells that normalize over all units of a row (cells/trace.h): a
// CTA has a row, whose units its threads divide. Before the epilogue come sums over the row, level
// by level (cells/unit.h): forward of each group's values, backward of their gradients, from the
// last level on. Grid: (1, rows, directions).
#pragma once

#include <cmath>

#include "backward.h"
#include "forward.h"
#include "pointwise.h"

namespace lstm_fused::cuda {

// Adds up each of kCount values over the CTA's threads, in a fixed order: with more accuracy than
// the values have, since the rounding errors of a mean are in every unit. finish(k, sum) is called
// by one thread, for what takes many cycles in float64. All threads get its results.
template <int kCount, class C, class Finish>
LSTM_FUSED_DEVICE void sum_over_row(C (&values)[kCount], const Finish& finish) {
  static_assert(kCount <= kMaxRowSums);
  const int threads = thread_count(), thread = thread_index();
  double* const of_threads = reinterpret_cast<double*>(shared_memory());  // (kCount, threads)
  double* const of_lanes = of_threads + kMaxRowSums * threads;            // (kCount, 32)
  double* const results = of_lanes + kMaxRowSums * 32;                    // (kCount,)
  LSTM_FUSED_UNROLL
  for (int k = 0; k < kCount; ++k) of_threads[k * threads + thread] = values[k];
  sync_block();
  if (thread < 32) {
    LSTM_FUSED_UNROLL
    for (int k = 0; k < kCount; ++k) {
      double sum = 0;
      for (int i = thread; i < threads; i += 32) sum += of_threads[k * threads + i];
      of_lanes[k * 32 + thread] = sum;
    }
  }
  sync_block();
  if (thread < kCount) {
    double sum = 0;
    for (int i = 0; i < 32; ++i) sum += of_lanes[thread * 32 + i];
    results[thread] = finish(thread, sum);
  }
  // The next call writes results behind two more barriers, when all have read them.
  sync_block();
  LSTM_FUSED_UNROLL
  for (int k = 0; k < kCount; ++k) values[k] = static_cast<C>(results[k]);
}

// f(group, step, operand) for each value of a level: the steps of the trace before and after it is
// normalized.
template <class Cell, int level, int step, class F>
LSTM_FUSED_DEVICE void visit_step(const F& f) {
  constexpr TraceStep traced = kDerivation<Cell>.trace.steps[step];
  if constexpr (traced.operation == Operation::kNormalize) {
    if constexpr (kDerivation<Cell>.group[traced.group].level == level)
      f(traced.group, step, traced.operands[0]);
  }
}
template <class Cell, int level, class F, int... step>
LSTM_FUSED_DEVICE void visit_steps(const F& f, Numbers<step...>) {
  (visit_step<Cell, level, step>(f), ...);
}
template <class Cell, int level, class F>
LSTM_FUSED_DEVICE void each_value(const F& f) {
  visit_steps<Cell, level>(f, FirstNumbers<kDerivation<Cell>.trace.count>());
}

// The row of a CTA. Epilogue: ForwardCell or BackwardCell.
template <class Cell, class S, class Epilogue>
struct NormalizedRow {
  using C = Compute<S>;
  using Runner = TraceRunner<Cell, C>;
  static constexpr int kGroups = CellNumbers<Cell>::kGroups;
  static constexpr int kLevels = kDerivation<Cell>.levels;

  const RecurrenceParams& p;
  const StepRows& rows;
  const int d;
  const int64_t n;
  typename Epilogue::Unit unit;
  C product[Epilogue::kGates];
  C statistics[4 * kGroups] = {};  // (groups, 4) of cells/unit.h

  LSTM_FUSED_DEVICE NormalizedRow(const RecurrenceParams& params, const StepRows& step_rows,
                                  int direction, int64_t row)
      : p(params), rows(step_rows), d(direction), n(row) {}

  LSTM_FUSED_DEVICE Element<int64_t> element(int64_t u) const { return {rows, d, n, u}; }

  // Loads a unit; a forward pass adds the product to its pre-activations.
  LSTM_FUSED_DEVICE void load_unit(int64_t u) {
    const Element<int64_t> e = element(u);
    Epilogue::fetch(p, e, unit);
    load_product<Epilogue>(p, d, n, u, product);
    if constexpr (Epilogue::kBackward) {
      if (n < rows.active) Epilogue::complete(p, e, unit);
    } else {
      typename Epilogue::Constants constants;
      constants.load(p, d, u);
      Epilogue::add(constants, unit, product);
    }
  }

  // f(u) for each of the thread's units, which `unit` holds then. again: not the first time, so
  // that it is there already if the thread has one alone.
  template <class F>
  LSTM_FUSED_DEVICE void each_unit(bool again, const F& f) {
    for (int64_t u = thread_index(); u < p.H; u += thread_count()) {
      if (!again || p.H > thread_count()) load_unit(u);
      f(u);
    }
  }

  // Not indexed by `group` directly: device code knows the derivation's constants alone.
  static_assert(kMaxUnitGroups == 3);
  static LSTM_FUSED_DEVICE UnitGroup group_of(int group) {
    constexpr UnitGroup first = kDerivation<Cell>.group[0], second = kDerivation<Cell>.group[1],
                        third = kDerivation<Cell>.group[2];
    return group == 0 ? first : group == 1 ? second : third;
  }
  LSTM_FUSED_DEVICE double count(int group) const {
    return static_cast<double>(group_of(group).count * p.H);
  }

  // The mean and 1 / the standard deviation of each group of this level and of those after it. The
  // squares are of the distances from the mean, so that no digits cancel.
  template <int level>
  LSTM_FUSED_DEVICE void describe_values() {
    Runner runner;
    runner.statistics = statistics;
    C sums[kGroups] = {};
    const auto run = [&] {
      runner.put_inputs(unit.preact, unit.vector, unit.mask, unit.prev);
      runner.template run<false>(nullptr);
    };
    each_unit(level > 0, [&](int64_t) {
      run();
      each_value<Cell, level>(
          [&](int group, int, int operand) { sums[group] += runner.value[operand]; });
    });
    sum_over_row(sums, [&](int group, double sum) { return sum / count(group); });
    C squares[kGroups] = {};
    each_unit(true, [&](int64_t) {
      run();
      each_value<Cell, level>([&](int group, int, int operand) {
        const C distance = runner.value[operand] - sums[group];
        squares[group] += distance * distance;
      });
    });
    const S* vectors = as<S>(p.vectors[d]);
    sum_over_row(squares, [&](int group, double sum) {
      const double epsilon = load(vectors[(CellNumbers<Cell>::kVectors - 1) * p.H]);
      return 1 / ::sqrt(sum / count(group) + epsilon);
    });
    LSTM_FUSED_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      if (group_of(group).level != level) continue;
      statistics[4 * group] = sums[group];
      statistics[4 * group + 1] = squares[group];
    }
    if constexpr (level + 1 < kLevels) describe_values<level + 1>();
  }

  // What backward needs besides: the means of the gradients of the normalized values, and of the
  // gradients times these values.
  template <int level>
  LSTM_FUSED_DEVICE void describe_gradients(bool again) {
    Runner runner;
    runner.statistics = statistics;
    C sums[2 * kGroups] = {};
    each_unit(again, [&](int64_t) {
      runner.put_inputs(unit.preact, unit.vector, unit.mask, unit.prev);
      runner.template run<true>(unit.next);
      runner.run_backward(Epilogue::gradient_of_h(p, unit, product), unit.d_state);
      each_value<Cell, level>([&](int group, int step, int) {
        sums[2 * group] += runner.gradient[step];
        sums[2 * group + 1] += runner.gradient[step] * runner.value[step];
      });
    });
    sum_over_row(sums, [&](int k, double sum) { return sum / count(k / 2); });
    LSTM_FUSED_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      if (group_of(group).level != level) continue;
      statistics[4 * group + 2] = sums[2 * group];
      statistics[4 * group + 3] = sums[2 * group + 1];
    }
    if constexpr (level > 0) describe_gradients<level - 1>(true);
  }

  // Where forward saves the two numbers of a group. A row of one unit has no space for them.
  LSTM_FUSED_DEVICE C* saved_statistics(int group) const {
    constexpr int kCarried = Epilogue::Values::kCarried, kSaved = Epilogue::Values::kSaved;
    return as<C>(p.saved_states) +
           element(0).unit_at(p, element(0).saved_row(p), kSaved, kCarried + group);
  }
};

template <class Cell, class S>
LSTM_FUSED_KERNEL(kMaxRowThreads, 1)
normalized_forward_kernel(const LSTM_FUSED_CONSTANT RecurrenceParams p) {
  using Epilogue = ForwardCell<Cell, S>;
  const int d = block_index().z;
  const StepRows& rows = p.rows[d];
  const int64_t count = Epilogue::row_count(rows);
  for (int64_t n = block_index().y; n < count; n += block_count().y) {
    NormalizedRow<Cell, S, Epilogue> row(p, rows, d, n);
    row.template describe_values<0>();
    row.each_unit(true, [&](int64_t u) {
      S out[Epilogue::kOut];
      Epilogue::finish(p, row.element(u), row.unit, row.statistics, out);
      put_out<Epilogue, S>(p, d, n, u, out);
      Epilogue::store(p, row.element(u), row.unit);
    });
    if (!p.saved_states || p.H == 1 || thread_index() != 0) continue;
    LSTM_FUSED_UNROLL
    for (int group = 0; group < CellNumbers<Cell>::kGroups; ++group) LSTM_FUSED_UNROLL
    for (int j = 0; j < 2; ++j) row.saved_statistics(group)[j] = row.statistics[4 * group + j];
  }
}

template <class Cell, class S>
LSTM_FUSED_KERNEL(kMaxRowThreads, 1)
normalized_backward_kernel(const LSTM_FUSED_CONSTANT RecurrenceParams p) {
  using Epilogue = BackwardCell<Cell, S>;
  const int d = block_index().z;
  const StepRows& rows = p.rows[d];
  const int64_t count = Epilogue::row_count(rows);
  for (int64_t n = block_index().y; n < count; n += block_count().y) {
    NormalizedRow<Cell, S, Epilogue> row(p, rows, d, n);
    const bool active = n < rows.active;
    if (active && p.H == 1) {
      row.template describe_values<0>();
    } else if (active) {
      LSTM_FUSED_UNROLL
      for (int group = 0; group < CellNumbers<Cell>::kGroups; ++group) LSTM_FUSED_UNROLL
      for (int j = 0; j < 2; ++j) row.statistics[4 * group + j] = row.saved_statistics(group)[j];
    }
    if (active) row.template describe_gradients<kDerivation<Cell>.levels - 1>(false);
    row.each_unit(active, [&](int64_t u) {
      S out[Epilogue::kOut];
      const Element<int64_t> e = row.element(u);
      if (Epilogue::apply(p, e, NoConstants{}, row.unit, row.product, out, row.statistics))
        put_out<Epilogue, S>(p, d, n, u, out);
      Epilogue::store(p, e, row.unit);
    });
  }
}

}  // namespace lstm_fused::cuda
