// Forward's two products, S^T = K Q^T and O += P V, by vectors or by matrix tiles.
#pragma once

#include "cpu/matrix_tiles.h"
#include "cpu/online_softmax.h"
#include "cpu/pack_ahead.h"
#include "cpu/staircase.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

// A panel's rows of O while a block of keys is added to them.
struct RowsOfO {
  float* sums;                // [rows][dims]; matrix tiles: O^T [dims][rows]
  bool are_empty;             // no block came before: sums are not read
  const ResultRows* results;  // where the rows go after the last block; null: they stay in sums
};

// value_product for panels [begin, end), W of whose vectors count. Out of line, so that each width has all registers.
template <class Operand, int N, int W>
__attribute__((noinline)) void add_panels_of_values(int begin, int end, const float* p, const float* v,
                                                    std::int64_t v_panel_stride, int row_size, const Staircase& steps,
                                                    const RowsOfO& o, PackAhead<Operand>& ahead) {
  constexpr int M = value_rows<N>;
  static_assert(N * lanes % M == 0, "a tile would reach past the panel");
  for (int panel = begin; panel < end; ++panel) {
    for (int row = 0; row < N * lanes; row += M) {
      const KeyRange keys = steps.keys_of_rows(row, M);
      const int first = keys.begin / Operand::per_word;
      float* sums = o.sums + std::int64_t{row} * row_size + panel * dim_panel;
      Vec acc[M][W] = {};
      matmul_tile<Operand, M, W>(acc, p + first * N * lanes + row, 1, N * lanes, v + panel * v_panel_stride + first * dim_panel,
                                 dim_panel, words<Operand>(keys.end) - first, ahead);
      // Only now: the product does not wait for what comes from L2.
      if (!o.are_empty) {
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
          for (int n = 0; n < W; ++n) acc[m][n] += load(sums + m * row_size + n * lanes);
        }
      }
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        if (o.results) {
          o.results->write(row + m, panel, acc[m]);
        } else {
#pragma GCC unroll 4
          for (int n = 0; n < W; ++n) store(sums + m * row_size + n * lanes, acc[m][n]);
        }
      }
    }
  }
}

// O [rows][dims] += P^T [key words][rows] V [dim panels][key words][dim_panel].
template <class Operand, int N>
inline void value_product(const float* p, const float* v, std::int64_t v_panel_stride, int head_dim, const Staircase& steps,
                          const RowsOfO& o, PackAhead<Operand>& ahead) {
  for_each_width_of_panels(head_dim, [&](int begin, int end, auto width) {
    add_panels_of_values<Operand, N, width>(begin, end, p, v, v_panel_stride, round_up(head_dim, dim_panel), steps, o, ahead);
  });
}

template <class Operand>
struct ForwardProducts {
  struct Unit {};  // what a thread holds while it multiplies
  static constexpr bool leaves_scale = false;
  static constexpr bool leaves_results = true;                      // in their place, see RowsOfO
  static constexpr bool softmax_beside = FA_LEVEL::softmax_beside;  // see forward_scores.h

  // S^T [keys][stride] = scale K [keys][dim words] Q^T [dim words][N vectors], of a range of keys. Scores of the last tile may
  // be of keys past the end.
  template <int N>
  static FA_INLINE void scores(const float* k, int dim_words, const float* q_transposed, KeyRange keys, float scale,
                               const Staircase& steps, float* scores, std::int64_t stride, PackAhead<Operand>& ahead) {
    staircase_scores<Operand, N>(k, dim_words, q_transposed, keys, scale, steps, scores, stride, 0, ahead);
  }

  // O [rows][dims] += P V, P [keys][N vectors], V [dim panels][key words][dim_panel], of a range of its keys; P is lost.
  template <int N>
  static FA_INLINE void values(const ScoreTile& p, KeyRange keys, const float* v, int key_words, int head_dim,
                               const Staircase& steps, const RowsOfO& o, PackAhead<Operand>& ahead) {
    const float* words_of_p = pack_along_keys<Operand>(p.scores, N * lanes, p.keys, p.scores);
    value_product<Operand, N>(words_of_p, v + std::int64_t{keys.begin / Operand::per_word} * dim_panel,
                              std::int64_t{key_words} * dim_panel, head_dim, steps, o, ahead);
  }

  // visit(lane, row of O) of a panel.
  template <class Visit>
  static void visit_rows(float* o, int dims, const RowPanel& panel, const Visit& visit) {
    for (int lane = 0; lane < panel.rows; ++lane) visit(lane, o + std::int64_t{lane} * dims);
  }
};

#if FA_MATRIX_TILES

// P of a panel of rows and a block of keys in words of neighbouring keys, [terms][key words][N vectors].
template <class Operand, int N>
struct WordsOfP {
  float* first;
  int key_words;

  float* at(int word) const { return first + word * N * lanes; }
  std::int64_t term() const { return std::int64_t{key_words} * N * lanes; }

  // Two keys of the vector whose words begin at `word`.
  FA_INLINE void put(float* word, Vec p, Vec of_next_key) const {
    Vec words[Operand::terms];
    Operand::split_words(p, of_next_key, words);
    for (int i = 0; i < Operand::terms; ++i) store(word + i * term(), words[i]);
  }

  // The words before `end`, by a factor a row.
  void scale(int end, const float* factors) const {
    for (int vector = 0; vector < end * N; ++vector) {
      float* word = first + vector * lanes;
      Vec words[Operand::terms];
      for (int i = 0; i < Operand::terms; ++i) words[i] = load(word + i * term());
      Vec p[2];
      Operand::join_words(words, p);
      const Vec factor = load(factors + vector % N * lanes);
      put(word, p[0] * factor, p[1] * factor);
    }
  }

  void drop(const AttentionProblem& problem, const AttentionInputs& inputs, const RowPanel& panel,
            const ScoreTile& tile) const {
    visit_dropout(problem, inputs.dropout_key, panel, tile.key_begin, tile.keys, [&](int key, int n, IVec keep) {
      const IVec halves = key % 2 == 0 ? keep | ~0xffff : keep | 0xffff;
      for (int i = 0; i < Operand::terms; ++i) {
        float* word = at(key / 2) + i * term() + n * lanes;
        store(word, from_bits(bits_of(load(word)) & halves));
      }
    });
  }

  void clear_from(int word) const {
    for (int i = 0; i < Operand::terms; ++i) {
      for (int vector = word * N; vector < key_words * N; ++vector) store(first + i * term() + vector * lanes, Vec{});
    }
  }
};

// O is gathered as O^T += V^T P^T, whose right operand is S^T as it lies, in words of neighbouring keys.
template <int terms>
struct ForwardProducts<MatrixOperand<terms>> {
  using Operand = MatrixOperand<terms>;
  using Unit = MatrixUnit;
  static constexpr bool leaves_results = true;
  static constexpr bool leaves_scale = true;  // tiles are stored as they are: who reads scores next scales them
  static constexpr int M = tiles_of_left<terms>;
  static constexpr int keys_of_tile = M * matrix_tile;
  static_assert(lanes == matrix_tile && dim_panel == 2 * matrix_tile);

  // How often score_tile calls beside.step().
  static int steps_of_tile(int dim_words) { return M * (dim_words / terms / matrix_tile) * pairs_of_terms<terms>; }
  // S^T [keys of a tile][N vectors] = K [keys][terms][dim words] Q^T [terms][dim words][N vectors].
  template <int N, class Beside>
  static FA_INLINE void score_tile(const float* k, int dim_words, const float* q_transposed, float* scores, Beside& beside) {
    const int words_of_term = dim_words / terms;
    multiply_tiles<terms, M, N>(false, scores, N * lanes, {k, dim_words, words_of_term},
                                {q_transposed, N * lanes, std::int64_t{words_of_term} * N * lanes}, words_of_term / matrix_tile,
                                beside);
  }

  // O^T [dims][N vectors] += V^T P^T
  template <int N>
  static inline void values(const WordsOfP<Operand, N>& p, KeyRange keys, const float* v, int key_words, int head_dim,
                            const Staircase&, const RowsOfO& rows, PackAhead<Operand>&) {
    float* o = rows.sums;
    const int dims = round_up(head_dim, dim_panel);
    for (int d = 0; d < dims; d += M * matrix_tile) {
      multiply_tiles<terms, M, N>(!rows.are_empty, o + d * N * lanes, N * lanes,
                                  {v + std::int64_t{d} * key_words + keys.begin / 2, key_words, std::int64_t{dims} * key_words},
                                  {p.first, N * lanes, p.term()}, p.key_words / matrix_tile);
    }
    if (rows.results) leave_results<N>(o, head_dim, *rows.results);
  }

  template <int N>
  static inline void leave_results(const float* o, int head_dim, const ResultRows& results) {
    for (int n = 0; n < N; ++n) {
      for_each_width_of_panels(head_dim, [&](int begin, int end, auto width) {
        for (int panel = begin; panel < end; ++panel) {
          Vec block[width][lanes];
          for (int part = 0; part < width; ++part) {
            const float* dims = o + std::int64_t{panel * dim_panel + part * lanes} * N * lanes + n * lanes;
            for (int i = 0; i < lanes; ++i) block[part][i] = load(dims + i * N * lanes);
            transpose(block[part]);
          }
          for (int i = 0; i < lanes; ++i) {
            Vec row[width];
            for (int part = 0; part < width; ++part) row[part] = block[part][i];
            results.write(n * lanes + i, panel, row);
          }
        }
      });
    }
  }

  template <class Visit>
  static void visit_rows(const float* o, int dims, const RowPanel& panel, const Visit& visit) {
    float rows[lanes][padded_head_dim];
    for (int v = 0; v < panel.vectors; ++v) {
      read_transposed(o + v * lanes, panel.width(), dims, rows);
      for (int i = 0; i < lanes && v * lanes + i < panel.rows; ++i) visit(v * lanes + i, rows[i]);
    }
  }
};

#endif

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
