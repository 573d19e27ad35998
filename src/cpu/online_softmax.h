// The online softmax of a panel of rows (FlashAttention-2, algorithm 1), and what becomes of a row at its end.
#pragma once

#include "cpu/products.h"
#include "cpu/score_steps.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

// Of a panel's rows: m, in log2 units, and l, the sum of 2^(S - m).
struct SoftmaxState {
  alignas(64) float m[panel_rows];
  alignas(64) float l[panel_rows];
};

// A sink is a key that was seen before all others, whose value is 0: where keys are divided into runs, by the first run.
inline void start_softmax(const RowPanel& panel, const float* learnable_sink, SoftmaxState& state) {
  for (int lane = 0; lane < panel.width(); ++lane) {
    const float sink = learnable_sink ? learnable_sink[panel.head[lane]] * log2_e : -__builtin_inff();
    state.m[lane] = sink > lowest_score ? sink : lowest_score;
    state.l[lane] = sink > lowest_score ? 1.0f : 0.0f;
  }
}

// How far above m a score may be, in log2 units. Where it may be some way, m rarely moves, and with it what was summed up so
// far; float32 has room for P up to 2^8. Where P is rounded and few keys weigh much, m is the largest score: P of one key is
// exactly 1.
constexpr float most_above_m = 8.0f;

// Raises m where a score is farther above, and l with it; rescale(factors [N vectors]) does so with what else was summed up.
template <int N, class Rescale>
inline void raise_m(const Vec (&largest)[N], float most_above, SoftmaxState& state, Rescale rescale) {
  IVec is_far[N];
  IVec any_far = {};
  for (int n = 0; n < N; ++n) {
    is_far[n] = largest[n] > load(state.m + n * lanes) + most_above;
    any_far |= is_far[n];
  }
  if (!any_of(any_far)) return;
  alignas(64) float factors[N * lanes];
  for (int n = 0; n < N; ++n) {
    const Vec m = load(state.m + n * lanes);
    const Vec raised = select(is_far[n], largest[n], m);
    const Vec factor = exp2_of(m - raised);
    store(factors + n * lanes, factor);
    store(state.m + n * lanes, raised);
    store(state.l + n * lanes, load(state.l + n * lanes) * factor);
  }
  rescale(factors);
}

// The same for the scores of a tile over `scale`, which is positive.
template <int N, class Rescale>
FA_INLINE void raise_m_to(const ScoreTile& tile, float scale, float most_above, SoftmaxState& state, Rescale rescale) {
  Vec largest[N];
  for (int n = 0; n < N; ++n) largest[n] = minus_infinity();
  for (int key = 0; key < tile.keys; ++key) {
    for (int n = 0; n < N; ++n) largest[n] = larger_of(load(tile.scores + key * tile.stride + n * lanes), largest[n]);
  }
  for (int n = 0; n < N; ++n) largest[n] *= scale;
  raise_m<N>(largest, most_above, state, rescale);
}

// Turns S into P, adds it to l. The tile holds the scores over `scale`, which is positive. The rest: see raise_m.
template <int N, class Rescale>
inline void softmax_tile(const ScoreTile& tile, SoftmaxState& state, float scale, float most_above, Rescale rescale) {
  raise_m_to<N>(tile, scale, most_above, state, rescale);
  Vec minus_m[N];
  Vec sum[N] = {};
  for (int n = 0; n < N; ++n) minus_m[n] = -load(state.m + n * lanes);
  for (int key = 0; key < tile.keys; ++key) {
    float* row = tile.scores + key * tile.stride;
    for (int n = 0; n < N; ++n) {
      const Vec p = exp2_of(load(row + n * lanes) * scale + minus_m[n]);
      sum[n] += p;
      store(row + n * lanes, p);
    }
  }
  for (int n = 0; n < N; ++n) store(state.l + n * lanes, load(state.l + n * lanes) + sum[n]);
}

// Drops probabilities of a tile; the survivors are scaled when the row is finished.
inline void drop_probabilities(const AttentionProblem& problem, const AttentionInputs& inputs, const RowPanel& panel,
                               const ScoreTile& tile) {
  visit_dropout(problem, inputs.dropout_key, panel, tile.key_begin, tile.keys, [&](int key, int n, IVec keep) {
    float* p = tile.scores + key * tile.stride + n * lanes;
    store(p, from_bits(bits_of(load(p)) & keep));
  });
}

// What is left to do to the rows of O, and their lse in log2 units. A row that saw nothing gives 0 and -inf.
struct RowEnds {
  alignas(64) float scale[panel_rows];
  alignas(64) float lse_log2[panel_rows];

  RowEnds(const AttentionProblem& problem, const RowPanel& panel, const SoftmaxState& state) {
    for (int v = 0; v < panel.width(); v += lanes) {
      const Vec l = load(state.l + v);
      const IVec saw_nothing = l == Vec{};
      store(scale + v, select(saw_nothing, Vec{}, problem.dropout_scale / l));
      store(lse_log2 + v, select(saw_nothing, minus_infinity(), load(state.m + v) + log2_of(l)));
    }
  }
};

// A finished row, dims padded to whole vectors, to the caller's arrays.
inline void write_result(const AttentionProblem& problem, const ForwardOutputs& outputs, const RowPanel& panel,
                         const Unit& unit, int lane, const float* row, float lse_log2) {
  const Tensor& out = outputs.out;
  write_result_row(out, panel.offset(unit, out.strides, lane), problem.head_dim_v, row);
  outputs.lse[panel.offset(unit, outputs.lse_strides, lane)] = lse_log2 * ln_2;
}

inline std::int64_t partial_row_size(const AttentionProblem& problem) { return round_up(problem.head_dim_v, lanes); }

// Where a product leaves the finished rows of a panel, and what it multiplies them by.
struct ResultRows {
  char* row[panel_rows];
  RowEnds ends;
  DType dtype;
  bool are_streamed;  // see Tensor::streamed

  // Results of whole vectors whose dims lie side by side. Others take finish_panel.
  static bool suit(const AttentionProblem& problem, const Tensor& out, const Partial& partial) {
    return problem.head_dim_v % lanes == 0 && (partial.o || out.strides.dim == 1);
  }

  // And writes lse. `first_row` of its unit is the panel's first row. The lanes after the last row repeat it here too.
  ResultRows(const AttentionProblem& problem, const ForwardOutputs& outputs, const Unit& unit, const RowPanel& panel,
             const SoftmaxState& state, int first_row, const Partial& partial)
      : ends(problem, panel, state), dtype(partial.o ? DType::float32 : outputs.out.dtype), are_streamed(!partial.o) {
    const std::int64_t size = partial_row_size(problem);
    for (int lane = 0; lane < panel.width(); ++lane) {
      if (partial.o) {
        const int unit_row = first_row + min_of(lane, panel.rows - 1);
        row[lane] = reinterpret_cast<char*>(partial.o + unit_row * size);
        partial.lse_log2[unit_row] = ends.lse_log2[lane];
      } else {
        row[lane] = element(outputs.out.data, dtype, panel.offset(unit, outputs.out.strides, lane));
        outputs.lse[panel.offset(unit, outputs.lse_strides, lane)] = ends.lse_log2[lane] * ln_2;
        are_streamed &= streams_row(outputs.out, row[lane], problem.head_dim_v);
      }
    }
  }

  // A row's dims of one panel of them. Who wrote many rows ends with streams_end.
  template <int vectors>
  FA_INLINE void write(int lane, int panel, const Vec (&o)[vectors]) const {
    const Vec scale = splat(ends.scale[lane]);
    char* p = row[lane] + panel * dim_panel * size_of(dtype);
    if (dtype != DType::float32) {
      alignas(64) float values[vectors * lanes];
      for (int n = 0; n < vectors; ++n) store(values + n * lanes, o[n] * scale);
      return write_half(p, vectors * lanes, values);
    }
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n, p += lanes * sizeof(float)) {
      if (are_streamed) {
        stream(p, o[n] * scale);
      } else {
        store(reinterpret_cast<float*>(p), o[n] * scale);
      }
    }
  }

 private:
  // Out of line: a tile's rows are unrolled where they are written.
  __attribute__((noinline)) void write_half(char* p, int count, const float* values) const {
    if (are_streamed) {
      stream_row(dtype, p, count, values);
    } else {
      write_row(dtype, p, 1, count, values);
    }
  }
};

// O / l and lse of a panel, the first row of which is `row` of its unit: to the caller, or to a partial result.
// visit_rows(visit) calls visit(lane, row of O) for each.
template <class VisitRows>
inline void finish_panel(const AttentionProblem& problem, const ForwardOutputs& outputs, const Unit& unit,
                         const RowPanel& panel, const SoftmaxState& state, int row, const Partial& partial,
                         const VisitRows& visit_rows) {
  const std::int64_t size = partial_row_size(problem);
  const RowEnds ends(problem, panel, state);
  visit_rows([&](int lane, float* o) {
    scale_row(o, ends.scale[lane], static_cast<int>(size));
    if (partial.o) {
      std::memcpy(partial.o + (row + lane) * size, o, static_cast<std::size_t>(size) * sizeof(float));
      partial.lse_log2[row + lane] = ends.lse_log2[lane];
    } else {
      write_result(problem, outputs, panel, unit, lane, o, ends.lse_log2[lane]);
    }
  });
  streams_end();
}

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
