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

// How a format multiplies. A pair is two consecutive k, which a panel has side by side in each
// lane.
//   stage   a row of activations from float32, zeros behind it: returns the scale of its products
//   Sum     of kGroupPairs pairs, to which a scale of the weights belongs if there are any

// Rows are rounded to int16 by a scale of their own. 16 bits, since 8 would double the error that
// int8 weights have. Sums of a group are exact, so that no bit depends on how an ISA multiplies.
struct Int8Weights {
  using Packed = int8_t;
  using Activation = int16_t;
  using Sum = VInt32;
  using Pair = VInt16;
  static constexpr int64_t kGroupPairs = kQuantizationGroup / 2;
  static constexpr float kMost = 32767;
  static_assert(kQuantizationGroup * 127 * 32767ll < 1ll << 31, "a group's sum would overflow");

  static LSTM_FUSED_INLINE Pair broadcast(const int16_t* a) {
    int32_t pair;
    std::memcpy(&pair, a, sizeof(pair));
    return bit_cast<VInt16>(VInt32{} + pair);
  }
  static LSTM_FUSED_INLINE Pair load_weights(const int8_t* w) {
    VInt8 v;
    std::memcpy(&v, w, sizeof(v));
    return LSTM_FUSED_CONVERT(v, VInt16);
  }
  static LSTM_FUSED_INLINE Sum multiply_add(Sum sum, Pair a, Pair w) {
    return sum + multiply_pairs(a, w);
  }
  static LSTM_FUSED_INLINE VFloat scaled(Sum sum, const BFloat16* scales) {
    return LSTM_FUSED_CONVERT(sum, VFloat) * load<VFloat>(scales);
  }

  static float stage(int16_t* to, const float* from, int64_t n, int64_t padded) {
    constexpr int lanes = VectorOf<float>::lanes;
    VInt32 most = {};  // of |v|, by its bits: a NaN is the largest
    for (int64_t i = 0; i < n; i += lanes) {
      const VInt32 bits = bit_cast<VInt32>(load_first<VFloat>(from + i, n - i)) & 0x7fffffff;
      most = bits > most ? bits : most;
    }
    int32_t bits = 0;
    for (int l = 0; l < lanes; ++l) bits = most[l] > bits ? most[l] : bits;
    const float largest = bit_cast<float>(bits);
    const bool finite = bits < 0x7f800000, zero = largest < 1e-30f;
    const float factor = finite && !zero ? kMost / largest : 0;
    for (int64_t i = 0; i < padded; i += lanes) {
      VFloat v = i < n ? load_first<VFloat>(from + i, n - i) * factor : VFloat{};
      LSTM_FUSED_IN_REGISTER(v);  // not part of a multiply-add: it would round otherwise
      // 1.5 * 2^23 leaves an integer, rounded to even, in the lowest bits.
      const VInt32 integer = bit_cast<VInt32>(v + 0x1.8p23f) - 0x4b400000;
      const VInt16Half narrow = LSTM_FUSED_CONVERT(integer, VInt16Half);
      std::memcpy(to + i, &narrow, sizeof(narrow));
    }
    return !finite ? __builtin_nanf("") : zero ? 0 : largest / kMost;
  }
};

// bfloat16 weights, multiplied in float32.
struct BFloat16Weights {
  using Packed = BFloat16;
  using Activation = float;
  using Sum = VFloat;
  struct Pair {
    VFloat even, odd;
  };
  static constexpr int64_t kGroupPairs = kPieceSteps / 2;

  static LSTM_FUSED_INLINE Pair broadcast(const float* a) {
    return {splat_of<VFloat>(a[0]), splat_of<VFloat>(a[1])};
  }
  static LSTM_FUSED_INLINE Pair load_weights(const BFloat16* w) {
    VUint32 v;
    std::memcpy(&v, w, sizeof(v));
    return {bit_cast<VFloat>(v << 16), bit_cast<VFloat>(v & 0xffff0000)};
  }
  static LSTM_FUSED_INLINE Sum multiply_add(Sum sum, const Pair& a, const Pair& w) {
    sum += a.even * w.even;
    return sum + a.odd * w.odd;
  }
  static LSTM_FUSED_INLINE VFloat scaled(Sum sum, const BFloat16*) { return sum; }
  static float stage(float* to, const float* from, int64_t n, int64_t padded) {
    stage_row(to, from, n, padded);
    return 1;
  }
};

// A row of activations, as `stage` left it.
template <class F>
struct StagedRow {
  const typename F::Activation* at;
  float scale;
};

// The weights of a block of units: `pairs` times `gates` times kBlock lanes.
template <class F>
struct Panel {
  const typename F::Packed* weights;
  const BFloat16* scales;
  int64_t pairs;
  int gates;
};

// total[r][c] += `count` pairs of a[r] times C vectors of weights, `width` lanes a pair, and then
// the group's scales.
template <class F, int R, int C>
LSTM_FUSED_INLINE void add_group(VFloat (&total)[R][C], const typename F::Activation* const* a,
                                 const typename F::Packed* w, int64_t width, int64_t count,
                                 const BFloat16* scales) {
  constexpr int lanes = VectorOf<float>::lanes;
  typename F::Sum sum[R][C] = {};
  for (int64_t k = 0; k < count; ++k, w += width * 2) {
    typename F::Pair v[C];
    LSTM_FUSED_UNROLLED_FOR (int c = 0; c < C; ++c) v[c] = F::load_weights(w + c * lanes * 2);
    LSTM_FUSED_UNROLLED_FOR (int r = 0; r < R; ++r) {
      const typename F::Pair pair = F::broadcast(a[r] + 2 * k);
      LSTM_FUSED_UNROLLED_FOR (int c = 0; c < C; ++c)
        sum[r][c] = F::multiply_add(sum[r][c], pair, v[c]);
    }
  }
  LSTM_FUSED_UNROLLED_FOR (int r = 0; r < R; ++r)
    LSTM_FUSED_UNROLLED_FOR (int c = 0; c < C; ++c)
      total[r][c] += F::scaled(sum[r][c], scales + c * lanes);
}

// out[r][c] (vectors) += rows[r] times the panel's vectors [from, from + C), out having `pitch`
// floats a row.
template <class F, int R, int C>
void add_products(const Panel<F>& panel, const StagedRow<F>* rows, int from, float* out,
                  int64_t pitch) {
  constexpr int lanes = VectorOf<float>::lanes;
  const int64_t width = panel.gates * kBlock;
  const typename F::Packed* w = panel.weights + from * lanes * 2;
  const BFloat16* scales = panel.scales + from * lanes;
  const typename F::Activation* a[R];
  LSTM_FUSED_UNROLLED_FOR (int r = 0; r < R; ++r) a[r] = rows[r].at;
  VFloat total[R][C] = {};
  int64_t left = panel.pairs;
  for (; left >= F::kGroupPairs; left -= F::kGroupPairs) {
    add_group<F, R, C>(total, a, w, width, F::kGroupPairs, scales);
    LSTM_FUSED_UNROLLED_FOR (int r = 0; r < R; ++r) a[r] += 2 * F::kGroupPairs;
    w += F::kGroupPairs * width * 2;
    scales += width;
  }
  if (left > 0) add_group<F, R, C>(total, a, w, width, left, scales);
  LSTM_FUSED_UNROLLED_FOR (int r = 0; r < R; ++r)
    LSTM_FUSED_UNROLLED_FOR (int c = 0; c < C; ++c) {
      float* at = out + r * pitch + c * lanes;
      store(at, load<VFloat>(at) + total[r][c] * rows[r].scale);
    }
}

// The same for all vectors of a panel and any R <= kMaxRows: as many at once as registers hold.
template <class F>
void add_all_products(const Panel<F>& panel, const StagedRow<F>* rows, int count, float* out,
                      int64_t pitch) {
  constexpr int lanes = VectorOf<float>::lanes;
  const int cols = panel.gates * (kBlock / lanes);
  with_constant<kMaxRows>(count, [&](auto r) {
    constexpr int R = decltype(r)::value;
    constexpr int kCols = R == 1 ? 2 * kMaxCols : R == 2 ? kMaxCols : kStripCols;
    for (int from = 0; from < cols; from += kCols)
      with_constant<kCols>(cols - from, [&](auto c) {
        add_products<F, R, decltype(c)::value>(panel, rows, from, out + from * lanes, pitch);
      });
  });
}

template <class Cell, class F>
struct QuantizedForward : ForwardState<Cell, float, Multiply<float>> {
  using Base = ForwardState<Cell, float, Multiply<float>>;
  using Base::G, Base::P, Base::lanes, Base::p, Base::T, Base::N, Base::I, Base::H, Base::R;
  using typename Base::V;
  using Activation = typename F::Activation;
  static constexpr int kVectors = kBlock / lanes;  // of a block
  static constexpr int64_t kPitch = P * kBlock;    // pre-activations of a row and block

  const Plan& plan;
  const int64_t chunk_rows;  // max rows whose input part is computed at once
  float* pre;                // (threads, blocks of a slice, chunk_rows, P, kBlock)
  Activation* inputs;        // (threads, chunk_rows, padded I)
  Activation* hiddens;       // (threads, rows, padded R, or H if a projection has more)
  StagedRow<F>* rows;        // (threads, chunk_rows + rows)
  Barrier* barriers;         // one a direction and row group, then the team's

  static int64_t padded(int64_t n) { return round_up(n, 2 * kBlock); }
  int64_t slice() const { return ceil_div(p.size.blocks(), plan.unit_groups); }
  int64_t group_rows() const { return ceil_div(N, plan.row_groups); }
  int64_t hidden_width() const { return padded(this->full ? max64(R, H) : R); }
  int groups() const { return plan.direction_groups * plan.row_groups; }

  QuantizedForward(const ForwardParams& params, const Plan& the_plan, Arena& arena)
      : Base(params, arena), plan(the_plan), chunk_rows(plan.hoist_steps * group_rows()) {
    const int threads = plan.threads;
    pre = arena.take<float>(threads * slice() * chunk_rows * kPitch);
    inputs = arena.take<Activation>(threads * chunk_rows * padded(I));
    hiddens = arena.take<Activation>(threads * group_rows() * hidden_width());
    rows = arena.take<StagedRow<F>>(threads * (chunk_rows + group_rows()));
    barriers = arena.take<Barrier>(groups() + 1);
  }

  void init_barriers() {
    for (int i = 0; i < groups(); ++i) barriers[i].init(plan.unit_groups);
    barriers[groups()].init(plan.threads);
  }

  bool has_hidden(int64_t step) const { return step > 0 || this->has_initial(); }

  // Block b of a weight with K columns.
  static Panel<F> panel(const void* weights, const void* scales, int64_t b, int gates, int64_t K) {
    const int64_t pairs = ceil_div(K, 2), width = gates * kBlock;
    const auto* first = static_cast<const typename F::Packed*>(weights);
    const auto* first_scale = static_cast<const BFloat16*>(scales);
    return {first + b * pairs * width * 2,
            first_scale + (scales ? b * ceil_div(K, kQuantizationGroup) * width : 0), pairs, gates};
  }

  // One thread's part of the whole layer.
  struct Worker {
    const QuantizedForward& k;
    const Place place;
    const RowGroup group;
    const Range units, states;  // vectors of hidden units; of the recurrent state
    float* pre;
    Activation *inputs, *hiddens;
    StagedRow<F>*input_rows, *hidden_rows;
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
          inputs(k.inputs + i * k.chunk_rows * padded(k.I)),
          hiddens(k.hiddens + i * k.group_rows() * k.hidden_width()),
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
      return pre + ((block - first_block()) * k.chunk_rows + row) * kPitch;
    }
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
      const int64_t width = padded(k.I);
      int64_t count = 0;
      for (int64_t s = begin; s < end; ++s) {
        const int64_t t = k.time(d, s);
        for (int64_t i = 0, n = active(s); i < n; ++i, ++count) {
          Activation* to = inputs + count * width;
          const auto* x =
              static_cast<const float*>(k.p.x.data) + k.p.x.row(k.p.size.steps, t, group.row(i));
          input_rows[count] = {to, F::stage(to, x, k.I, width)};
        }
      }
      for_blocks(k.p.calls + begin / k.plan.hoist_steps, [&](int64_t block) {
        V bias[P * kVectors];
        for (int j = 0; j < P; ++j)
          for (int v = 0; v < kVectors; ++v)
            bias[j * kVectors + v] = k.bias_from(w, j, block * kBlock + v * lanes);
        const Panel<F> weights = panel(w.w_ih, w.s_ih, block, G, k.I);
        for_each_tile(0, count, [&](int64_t first, int n) {
          float* out = pre_of(block, first);
          for (int r = 0; r < n; ++r)
            for (int j = 0; j < P * kVectors; ++j) store(out + r * kPitch + j * lanes, bias[j]);
          add_all_products(weights, input_rows + first, n, out, kPitch);
        });
      });
    }

    void stage_hidden(int64_t count, int64_t n, const float* (*row_of)(const Worker&, int64_t)) {
      const int64_t width = padded(n);
      for (int64_t i = 0; i < count; ++i) {
        Activation* to = hiddens + i * width;
        hidden_rows[i] = {to, F::stage(to, row_of(*this, group.row(i)), n, width)};
      }
    }

    void run_step() {
      const Weights& w = k.p.weights[d];
      const int64_t count = active(step);
      const bool has_hidden = k.has_hidden(step);
      if (has_hidden)
        stage_hidden(count, k.R, [](const Worker& worker, int64_t n) -> const float* {
          return worker.k.hidden(worker.d, worker.step, n);
        });
      for_blocks(k.p.calls + step, [&](int64_t block) {
        const Panel<F> weights = panel(w.w_hh, w.s_hh, block, G, k.R);
        for_each_tile(0, count, [&](int64_t first, int n) {
          float* out = pre_of(block, chunk_row + first);
          if (has_hidden)
            add_all_products(weights, hidden_rows + first, n, out + (P - G) * kBlock, kPitch);
          for (int r = 0; r < n; ++r, out += kPitch) finish_row(group.row(first + r), block, out);
        });
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
        const Panel<F> weights = panel(w.w_hr, w.s_hr, block, 1, k.H);
        for_each_tile(0, count, [&](int64_t first, int n) {
          float out[kMaxRows * kBlock] = {};
          add_all_products(weights, hidden_rows + first, n, out, kBlock);
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
