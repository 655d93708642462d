// The forward kernel of quantized weights (params.h), which come in panels: nothing is packed, and
// a single step reads what a long sequence does. Threads own units or rows as in the persistent
// kernel. The input's part of several steps is computed ahead, into memory; the hidden state's is
// added there.
#pragma once

#include "forward_state.h"
#include "team.h"
#include "tile.h"

namespace lstm_fused {
namespace {

// A format has
//   kDepth      consecutive k that a panel has side by side in each lane
//   Row         of activations as `stage` makes it from float32, in row_bytes(padded) bytes: n
//               values, then zeros up to `padded`
//   kRows, columns(R)  most rows, and vectors of a panel, at once: registers decide
//   product<R, C>(panel, rows, from, out, pitch)
//               out[r][c] (vectors) += rows[r] times the panel's vectors [from, from + C), out
//               having `pitch` floats a row

// The weights of a block of units: `steps` of k, each of `gates` times kBlock lanes.
struct Panel {
  const char* weights;
  const BFloat16* scales;
  int64_t steps;
  int gates;
};

// Rows of activations are rounded to integers by a scale of their own, of 10 bits: with 8 they
// would add as much error as the weights have. They are two digits of 5 bits, which multiply 8 bits
// exactly by the instructions there are: a group's products fit 16 bits. No bit of a sum depends on
// the ISA.
struct Int8Weights {
  static constexpr int kDepth = 4;
  static constexpr int64_t kGroupSteps = kQuantizationGroup / kDepth;
  static constexpr float kMost = 495;  // 15 * 32 + 15
  static_assert(kGroupSteps <= 4, "the products of more steps would not fit 16 bits");

  struct Row {
    const int8_t *high, *low;  // digits: value = 32 * high + low, each from -16 to 15
    const int32_t* offsets;    // of each group -128 times the sum of its values
    float scale;
  };

  static constexpr int64_t row_bytes(int64_t padded) {
    return 2 * padded + padded / kQuantizationGroup * sizeof(int32_t);
  }
  static constexpr int kRows = 2;
  static constexpr int columns(int R) { return R == 1 ? kMaxCols : kStripCols; }

  static Row stage(char* to, const float* from, int64_t n, int64_t padded) {
    constexpr int lanes = VectorOf<float>::lanes;
    VInt32 most = {};  // of |v|, by its bits: a NaN is the largest
    for (int64_t i = 0; i < n; i += lanes) {
      const VInt32 bits = bit_cast<VInt32>(load_first<VFloat>(from + i, n - i)) & 0x7fffffff;
      most = bits > most ? bits : most;
    }
    const int32_t bits = largest_lane(most);
    const float largest = bit_cast<float>(bits);
    const bool finite = bits < 0x7f800000, zero = largest < 1e-30f;
    const float factor = finite && !zero ? kMost / largest : 0;
    auto* high = reinterpret_cast<int8_t*>(to);
    int8_t* low = high + padded;
    auto* offsets = reinterpret_cast<int32_t*>(low + padded);
    for (int64_t group = 0; group < padded; group += kQuantizationGroup) {
      VInt32 sum = {};
      for (int64_t i = group; i < group + kQuantizationGroup; i += lanes) {
        const VFloat v = i < n ? load_first<VFloat>(from + i, n - i) : VFloat{};
        const VInt32 value = round_to_int(finite ? v * factor : VFloat{});
        const VInt32 digit = ((value + 16) & 31) - 16;
        store_bytes(high + i, (value - digit) >> 5);
        store_bytes(low + i, digit);
        sum += value;
      }
      offsets[group / kQuantizationGroup] = -128 * sum_of_lanes(sum);
    }
    return {high, low, offsets, !finite ? bit_cast<float>(0x7fc00000) : zero ? 0 : largest / kMost};
  }

  static LSTM_FUSED_INLINE VBytes broadcast(const int8_t* digits) {
    int32_t four;
    std::memcpy(&four, digits, sizeof(four));
    return bit_cast<VBytes>(VInt32{} + four);
  }

  // total[r][c] += the group's steps, scaled.
  template <int R, int C>
  static LSTM_FUSED_INLINE void add_group(VFloat (&total)[R][C], const Row* rows, int64_t group,
                                          const char* w, int64_t pitch, int64_t steps,
                                          const BFloat16* scales) {
    VDigits high[R][C] = {}, low[R][C] = {};
    const int64_t first = group * kQuantizationGroup;
    for (int64_t k = 0; k < steps; ++k, w += pitch) {
      VBytes v[C];
      LSTM_FUSED_UNROLLED_FOR (int c = 0; c < C; ++c) {
        std::memcpy(&v[c], w + c * kVectorBytes, sizeof(VBytes));
        v[c] = in_register(v[c]);
      }
      LSTM_FUSED_UNROLLED_FOR (int r = 0; r < R; ++r) {
        const VBytes a = broadcast(rows[r].high + first + k * kDepth);
        const VBytes b = broadcast(rows[r].low + first + k * kDepth);
        LSTM_FUSED_UNROLLED_FOR (int c = 0; c < C; ++c) {
          high[r][c] = add_quads(high[r][c], v[c], a);
          low[r][c] = add_quads(low[r][c], v[c], b);
        }
      }
    }
    LSTM_FUSED_UNROLLED_FOR (int r = 0; r < R; ++r)
      LSTM_FUSED_UNROLLED_FOR (int c = 0; c < C; ++c) {
        const VInt32 sum = sum_of_digits(high[r][c], low[r][c]) + rows[r].offsets[group];
        total[r][c] +=
            LSTM_FUSED_CONVERT(sum, VFloat) * load<VFloat>(scales + c * VectorOf<float>::lanes);
      }
  }

  template <int R, int C>
  static void product(const Panel& panel, const Row* rows_in, int from, float* out, int64_t pitch) {
    constexpr int lanes = VectorOf<float>::lanes;
    const int64_t width = panel.gates * kBlock;
    const char* w = panel.weights + from * kVectorBytes;
    const BFloat16* scales = panel.scales + from * lanes;
    Row rows[R];
    LSTM_FUSED_UNROLLED_FOR (int r = 0; r < R; ++r) rows[r] = rows_in[r];
    VFloat total[R][C] = {};
    const int64_t whole = panel.steps / kGroupSteps, rest = panel.steps % kGroupSteps;
    for (int64_t group = 0; group < whole; ++group) {
      add_group<R, C>(total, rows, group, w, width * kDepth, kGroupSteps, scales);
      w += kGroupSteps * width * kDepth;
      scales += width;
    }
    if (rest > 0) add_group<R, C>(total, rows, whole, w, width * kDepth, rest, scales);
    LSTM_FUSED_UNROLLED_FOR (int r = 0; r < R; ++r)
      LSTM_FUSED_UNROLLED_FOR (int c = 0; c < C; ++c) {
        float* at = out + r * pitch + c * lanes;
        store(at, load<VFloat>(at) + total[r][c] * rows[r].scale);
      }
  }
};

// bfloat16 weights, multiplied in float32.
struct BFloat16Weights {
  static constexpr int kDepth = 2;
  struct Row {
    const float* values;
  };

  static constexpr int64_t row_bytes(int64_t padded) { return padded * sizeof(float); }
  static constexpr int kRows = kMaxRows;
  static constexpr int columns(int R) {
    return R == 1 ? 2 * kMaxCols : R == 2 ? kMaxCols : kStripCols;
  }
  static Row stage(char* to, const float* from, int64_t n, int64_t padded) {
    auto* values = reinterpret_cast<float*>(to);
    stage_row(values, from, n, padded);
    return {values};
  }

  template <int R, int C>
  static void product(const Panel& panel, const Row* rows, int from, float* out, int64_t pitch) {
    constexpr int lanes = VectorOf<float>::lanes;
    constexpr int64_t kPieceOfSteps = kPieceSteps / kDepth;
    const int64_t step_bytes = panel.gates * kBlock * kDepth * sizeof(BFloat16);
    const char* w = panel.weights + from * kVectorBytes;
    const float* a[R];
    LSTM_FUSED_UNROLLED_FOR (int r = 0; r < R; ++r) a[r] = rows[r].values;
    for (int64_t left = panel.steps; left > 0; left -= kPieceOfSteps) {
      VFloat sum[R][C] = {};
      for (int64_t k = 0, end = min64(left, kPieceOfSteps); k < end; ++k, w += step_bytes) {
        LSTM_FUSED_UNROLLED_FOR (int c = 0; c < C; ++c) {
          VUint32 v;
          std::memcpy(&v, w + c * kVectorBytes, sizeof(v));
          const VFloat even = in_register(bit_cast<VFloat>(v << 16));
          const VFloat odd = in_register(bit_cast<VFloat>(v & 0xffff0000));
          LSTM_FUSED_UNROLLED_FOR (int r = 0; r < R; ++r) {
            sum[r][c] += splat_of<VFloat>(a[r][2 * k]) * even;
            sum[r][c] += splat_of<VFloat>(a[r][2 * k + 1]) * odd;
          }
        }
      }
      LSTM_FUSED_UNROLLED_FOR (int r = 0; r < R; ++r) {
        LSTM_FUSED_UNROLLED_FOR (int c = 0; c < C; ++c) {
          float* at = out + r * pitch + c * lanes;
          store(at, load<VFloat>(at) + sum[r][c]);
        }
        a[r] += kPieceOfSteps * kDepth;
      }
    }
  }
};

// The product of all vectors of a panel with any number of rows.
template <class F>
void add_all_products(const Panel& panel, const typename F::Row* rows, int count, float* out,
                      int64_t pitch) {
  constexpr int lanes = VectorOf<float>::lanes;
  const int cols = panel.gates * (kBlock / lanes);
  for (int row = 0; row < count; row += F::kRows)
    with_constant<F::kRows>(count - row, [&](auto r) {
      constexpr int R = decltype(r)::value, kCols = F::columns(R);
      for (int from = 0; from < cols; from += kCols)
        with_constant<kCols>(cols - from, [&](auto c) {
          F::template product<R, decltype(c)::value>(panel, rows + row, from,
                                                     out + row * pitch + from * lanes, pitch);
        });
    });
}

template <class Cell, class F>
struct QuantizedForward : ForwardState<Cell, float, Multiply<float>> {
  using Base = ForwardState<Cell, float, Multiply<float>>;
  using Base::G, Base::P, Base::lanes, Base::p, Base::T, Base::N, Base::I, Base::H, Base::R;
  using typename Base::V;
  using Row = typename F::Row;
  static constexpr int kVectors = kBlock / lanes;  // of a block
  static constexpr int64_t kPitch = P * kBlock;    // pre-activations of a row and block

  const Plan& plan;
  const int64_t chunk_rows;  // max rows whose input part is computed at once
  float* pre;                // (threads, chunk_rows, blocks of a slice, P, kBlock)
  char* inputs;              // (threads, chunk_rows) rows of I, staged
  char* hiddens;             // (threads, rows) rows of R, or of H if a projection has more
  Row* rows;                 // (threads, chunk_rows + rows)
  Barrier* barriers;         // one a direction and row group, then the team's

  static int64_t padded(int64_t n) { return round_up(n, 2 * kBlock); }
  int64_t slice() const { return ceil_div(p.size.blocks(), plan.unit_groups); }
  int64_t group_rows() const { return ceil_div(N, plan.row_groups); }
  int64_t input_bytes() const { return F::row_bytes(padded(I)); }
  int64_t hidden_bytes() const { return F::row_bytes(padded(p.weights[0].w_hr ? max64(R, H) : R)); }
  int groups() const { return plan.direction_groups * plan.row_groups; }

  QuantizedForward(const ForwardParams& params, const Plan& the_plan, Arena& arena)
      : Base(params, arena), plan(the_plan), chunk_rows(plan.hoist_steps * group_rows()) {
    const int threads = plan.threads;
    pre = arena.take<float>(threads * slice() * chunk_rows * kPitch);
    inputs = arena.take<char>(threads * chunk_rows * input_bytes());
    hiddens = arena.take<char>(threads * group_rows() * hidden_bytes());
    rows = arena.take<Row>(threads * (chunk_rows + group_rows()));
    barriers = arena.take<Barrier>(groups() + 1);
  }

  void init_barriers() {
    for (int i = 0; i < groups(); ++i) barriers[i].init(plan.unit_groups);
    barriers[groups()].init(plan.threads);
  }

  bool has_hidden(int64_t step) const { return step > 0 || this->has_initial(); }

  // Block b of a weight with K columns.
  static Panel panel(const void* weights, const void* scales, int64_t b, int gates, int64_t K) {
    const int64_t steps = ceil_div(K, F::kDepth), width = gates * kBlock;
    return {static_cast<const char*>(weights) + b * steps * width * 4,
            static_cast<const BFloat16*>(scales) + b * ceil_div(K, kQuantizationGroup) * width,
            steps, gates};
  }

  // One thread's part of the whole layer.
  struct Worker {
    const QuantizedForward& k;
    const Place place;
    const RowGroup group;
    const Range units, states;  // vectors of hidden units; of the recurrent state
    float* pre;
    char *inputs, *hiddens;
    Row *input_rows, *hidden_rows;
    Barrier& barrier;
    int d = 0;
    int64_t step = 0;
    int64_t chunk_row = 0;  // of the current step's first row in `pre`

    Worker(const QuantizedForward& kernel, int i)
        : k(kernel),
          place(k.plan, i),
          group(k.p.size.steps, k.plan, place.row_group),
          units(vector_slice<float>(k.H, k.plan.unit_groups, place.unit_group)),
          states(vector_slice<float>(k.R, k.plan.unit_groups, place.unit_group)),
          pre(k.pre + i * k.slice() * k.chunk_rows * kPitch),
          inputs(k.inputs + i * k.chunk_rows * k.input_bytes()),
          hiddens(k.hiddens + i * k.group_rows() * k.hidden_bytes()),
          input_rows(k.rows + i * (k.chunk_rows + k.group_rows())),
          hidden_rows(input_rows + k.chunk_rows),
          barrier(k.barriers[place.direction_group * k.plan.row_groups + place.row_group]) {}

    void run() {
      const int first = k.p.size.first_direction() + place.direction_group;
      const int end = k.p.size.end_direction();
      for (d = first; d < end; d += k.plan.direction_groups)
        for (int64_t i = place.unit_group; i < group.count; i += k.plan.unit_groups)
          k.init_row(d, group.row(i));
      k.barriers[k.groups()].wait();
      for (d = first; d < end; d += k.plan.direction_groups) {
        const int64_t chunk = k.plan.hoist_steps;
        for (int64_t begin = 0; begin < k.T; begin += chunk) {
          const int64_t end = min64(k.T, begin + chunk);
          hoist(begin, end);
          chunk_row = 0;
          for (step = begin; step < end; ++step) run_step();
        }
      }
    }

    int64_t active(int64_t of_step) const { return group.active(k.active_at(d, of_step)); }
    float* pre_of(int64_t block, int64_t row) const {
      return pre + row * row_pitch() + (block - first_block()) * kPitch;
    }
    int64_t row_pitch() const { return k.slice() * kPitch; }
    int64_t first_block() const { return units.begin / kVectors; }

    // f(block of units) for each of the slice. The order alternates from call to call and step to
    // step (boustrophedon traversal): the weights read last are still in the cache.
    template <class Function>
    void for_blocks(int64_t turn, const Function& f) const {
      const int64_t begin = first_block(), end = ceil_div(units.end, kVectors);
      for (int64_t i = begin; i < end; ++i) f(turn % 2 ? begin + end - 1 - i : i);
    }

    // The input's part of steps [begin, end), biases included.
    void hoist(int64_t begin, int64_t end) {
      const Weights& w = k.p.weights[d];
      int64_t count = 0;
      for (int64_t s = begin; s < end; ++s) {
        const int64_t t = k.time(d, s);
        for (int64_t i = 0, n = active(s); i < n; ++i, ++count) {
          char* to = inputs + count * k.input_bytes();
          const auto* x =
              static_cast<const float*>(k.p.x.data) + k.p.x.row(k.p.size.steps, t, group.row(i));
          input_rows[count] = F::stage(to, x, k.I, padded(k.I));
        }
      }
      for_blocks(k.p.calls + begin / k.plan.hoist_steps, [&](int64_t block) {
        V bias[P * kVectors];
        for (int j = 0; j < P; ++j)
          for (int v = 0; v < kVectors; ++v)
            bias[j * kVectors + v] = k.bias_from(w, j, block * kBlock + v * lanes);
        const Panel weights = panel(w.w_ih, w.s_ih, block, G, k.I);
        for_each_tile(0, count, [&](int64_t first, int n) {
          float* out = pre_of(block, first);
          for (int r = 0; r < n; ++r)
            for (int j = 0; j < P * kVectors; ++j)
              store(out + r * row_pitch() + j * lanes, bias[j]);
          add_all_products<F>(weights, input_rows + first, n, out, row_pitch());
        });
      });
    }

    void stage_hidden(int64_t count, int64_t n, const float* (*row_of)(const Worker&, int64_t)) {
      for (int64_t i = 0; i < count; ++i)
        hidden_rows[i] =
            F::stage(hiddens + i * k.hidden_bytes(), row_of(*this, group.row(i)), n, padded(n));
    }

    void run_step() {
      const Weights& w = k.p.weights[d];
      const int64_t count = active(step);
      const bool has_hidden = k.has_hidden(step);
      if (has_hidden)
        stage_hidden(count, k.R, [](const Worker& worker, int64_t n) -> const float* {
          return worker.k.hidden(worker.d, worker.step, n);
        });
      if (has_hidden)
        for_blocks(k.p.calls + step, [&](int64_t block) {
          const Panel weights = panel(w.w_hh, w.s_hh, block, G, k.R);
          for_each_tile(0, count, [&](int64_t first, int n) {
            add_all_products<F>(weights, hidden_rows + first, n,
                                pre_of(block, chunk_row + first) + (P - G) * kBlock, row_pitch());
          });
        });
      // Not block by block after its products: a cell's long chain of instructions overlaps with
      // that of another block alone.
      for (int64_t i = 0; i < count; ++i)
        for_blocks(0, [&](int64_t block) {
          finish_row(group.row(i), block, pre_of(block, chunk_row + i));
        });
      chunk_row += count;
      if (k.full) {
        barrier.wait();
        project(count);
      }
      k.finish_step(d, step, group, units, states);
      barrier.wait();
    }

    void finish_row(int64_t n, int64_t block, const float* out) const {
      const int64_t end = min64(units.end, (block + 1) * kVectors);
      for (int64_t vec = block * kVectors; vec < end; ++vec) {
        V preacts[P];
        LSTM_FUSED_UNROLLED_FOR (int j = 0; j < P; ++j)
          preacts[j] = load<V>(out + j * kBlock + vec % kVectors * lanes);
        k.finish(d, step, n, vec, preacts);
      }
    }

    void project(int64_t count) {
      const Weights& w = k.p.weights[d];
      stage_hidden(count, k.H, [](const Worker& worker, int64_t n) -> const float* {
        return worker.k.full + (worker.d * worker.k.N + n) * worker.k.Hp;
      });
      for (int64_t block = states.begin / kVectors; block * kVectors < states.end; ++block) {
        const Panel weights = panel(w.w_hr, w.s_hr, block, 1, k.H);
        for_each_tile(0, count, [&](int64_t first, int n) {
          float out[kMaxRows * kBlock] = {};
          add_all_products<F>(weights, hidden_rows + first, n, out, kBlock);
          for (int r = 0; r < n; ++r)
            for (int v = 0; v < kVectors && block * kVectors + v < states.end; ++v)
              k.put_hidden(d, step, group.row(first + r), block * kBlock + v * lanes,
                           load<V>(out + r * kBlock + v * lanes));
        });
      }
    }
  };

  // bias_sum, and zeros for a vector past the last unit.
  V bias_from(const Weights& w, int j, int64_t u) const {
    return u < H ? this->bias_sum(w, j, u) : V{};
  }
};

}  // namespace
}  // namespace lstm_fused
