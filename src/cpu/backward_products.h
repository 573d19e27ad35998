// Backward's five products, by vectors or by matrix tiles, and the forms of K, P, dS and dQ that they take.
//
//                 by vectors                              by matrix tiles
//   S^T, dP^T     [keys][rows] of a pair of blocks        [keys][rows] of some keys and a panel, then P and dS in words
//   dV += P^T dO  P^T [keys][row words]                   the same
//   dK += dS^T Q  dS^T [keys][row words]                  the same
//   dQ += dS K    dS [key words][rows], K [panels]        dQ^T += K^T dS^T, K^T [dims][key words], dS^T [key words][rows]
#pragma once

#include "cpu/key_block.h"
#include "cpu/matrix_tiles.h"
#include "cpu/staircase.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

struct GradientTile {
  ScoreTile scores;           // S, then dropout(P)
  float* gradients;           // dP, then dS; same shape
  float* softcap_derivative;  // null: no softcap
};

// The same of keys and rows, as products of pairs take them: words of neighbouring rows or of neighbouring keys.
struct GradientWords {
  float* p_rows;   // [keys][stride]
  float* ds_rows;  // [keys][stride]
  float* ds_keys;  // [key words][stride]
  std::int64_t stride;
};

FA_INLINE void store_half(float* to, Vec x) {
  const Half bits = half_of(x);
  __builtin_memcpy(to, &bits, sizeof(bits));
}

// A block of rows against the keys of a block that it sees.
template <class Operand>
struct BlockPair {
  RowBlock<Operand> rows;
  int row_count;
  KeyBlock keys;
  KeyRange seen;        // whole tiles, counted from the block's first key
  Staircase staircase;  // counted from the first key seen

  int keys_seen() const { return seen.end - seen.begin; }
};

template <class Operand>
class BackwardProducts {
 public:
  struct Unit {};  // what a thread holds while it multiplies
  static constexpr bool leaves_scale = false;
  static constexpr bool gradients_in_registers = true;  // see gradient_product
  static constexpr int keys_at_once = 1 << 16;          // of a tile of S and dP, at most

  static std::int64_t size(const AttentionProblem& problem, std::int32_t key_block) {
    return key_block * (round_up(problem.head_dim, dim_panel) + std::int64_t{3} * row_block<Operand>);
  }

  BackwardProducts(const AttentionProblem& problem, std::int32_t key_block, float* memory)
      : head_dim_(problem.head_dim), head_dim_v_(problem.head_dim_v) {
    const std::int64_t tile = std::int64_t{key_block} * row_block<Operand>;
    scores_ = memory;
    gradients_ = scores_ + tile;
    derivative_ = gradients_ + tile;
    k_panels_ = derivative_ + tile;
  }

  // K as dQ reads it. A row that sees a NaN in K has NaN in dS; a row that does not must not meet it as 0 * NaN. Dims past the
  // head's are whatever follows the row; nobody reads what becomes of them.
  void pack_keys(KeyBlock keys, int head_dim, const float* k_rows) const {
    const std::int64_t panel_stride = std::int64_t{words<Operand>(keys.size)} * dim_panel;
    const int row_words = words<Operand>(head_dim);
    float* panels = k_panels_;
    for (int key = 0; key < keys.size; key += Operand::per_word, panels += dim_panel) {
      const float* rows[Operand::per_word];
      for (int i = 0; i < Operand::per_word; ++i) rows[i] = k_rows + std::int64_t{key + i} * row_words;
      for (int d = 0; d < round_up(head_dim, dim_panel); d += lanes) {
        store(panels + d / dim_panel * panel_stride + d % dim_panel, Operand::finite(word_of_rows<Operand>(rows, d)));
      }
    }
  }

  // The seen keys against which a panel has P and dS.
  KeyRange keys_of_panel(const BlockPair<Operand>& pair, int, int) const { return pair.seen; }

  // Where S and dP of the panel at `column` of the rows go, against `count` keys of the block from `key` on.
  template <int N>
  GradientTile tile(const BlockPair<Operand>& pair, int key, int count, int column) const {
    const std::int64_t first = std::int64_t{key} * row_block<Operand> + column;
    return {{scores_ + first, row_block<Operand>, count, pair.keys.begin + key}, gradients_ + first, derivative_ + first};
  }

  // What keep_all() would make of the panel at `column` and the keys from `key` on. Words of rows take the place of P and dS of
  // these and of earlier rows.
  GradientWords words_from(const BlockPair<Operand>& pair, int key, int column) const {
    const std::int64_t row = std::int64_t{key} * row_block<Operand> + column / 2;
    const std::int64_t key_word = (key - pair.seen.begin) / 2;
    return {scores_ + row, gradients_ + row, derivative_ + key_word * row_block<Operand> + column, row_block<Operand>};
  }

  // [keys][stride] = scale rows_of_keys [keys][dim words] transposed [dim words][N vectors].
  template <int N>
  static FA_INLINE void scores(const BlockPair<Operand>& pair, int column, const float* rows_of_keys, int dim_words,
                               const float* transposed, int keys, float scale, float* scores, std::int64_t stride) {
    staircase_scores<Operand, N>(rows_of_keys, dim_words, transposed, {0, keys}, scale, pair.staircase, scores, stride, column);
  }

  // P and dS of a tile as the products below take them.
  template <int N>
  void keep(const GradientTile&, int, int) const {}
  void keep_all(const BlockPair<Operand>& pair) const {
    pack_along_keys<Operand>(ds_of(pair), row_block<Operand>, pair.keys_seen(), derivative_);
    pack_along_rows(p_of(pair), pair.keys_seen(), pair.row_count);
    pack_along_rows(ds_of(pair), pair.keys_seen(), pair.row_count);
  }

  // dV [dim panels][key block][dim_panel] += P^T dO
  void add_dv(const BlockPair<Operand>& pair, float* dv) const {
    add_over_rows(pair, p_of(pair), pair.rows.dout_panels, head_dim_v_, dv);
  }
  // dK, of the same form, += dS^T Q
  void add_dk(const BlockPair<Operand>& pair, float* dk) const {
    add_over_rows(pair, ds_of(pair), pair.rows.q_panels, head_dim_, dk);
  }
  // dQ [dim panels][row block][dim_panel] += dS K
  void add_dq(const BlockPair<Operand>& pair, float* dq) const {
    const float* ds = Operand::per_word == 1 ? ds_of(pair) : derivative_;
    panel_product<Operand, M>(ds, 1, row_block<Operand>,
                              k_panels_ + std::int64_t{pair.seen.begin / Operand::per_word} * dim_panel,
                              std::int64_t{words<Operand>(pair.keys.size)} * dim_panel, round_up(pair.row_count, M), head_dim_,
                              dq, row_block<Operand> * dim_panel, [&](int row) -> KeyRange {
                                const KeyRange seen = pair.staircase.keys_of_rows(row, M);
                                return {seen.begin / Operand::per_word, words<Operand>(seen.end)};
                              });
  }

  // visit(lane, row) for the rows of dQ in the vector from `row` on.
  template <class Visit>
  static void visit_dq(const float* dq, int row, int head_dim, Visit visit) {
    float values[padded_head_dim];
    for (int lane = 0; lane < lanes; ++lane) {
      for (int p = 0; p < panels_of(head_dim); ++p) {
        const float* source = dq + (std::int64_t{p} * row_block<Operand> + row + lane) * dim_panel;
        for (int n = 0; n < dim_vectors; ++n) store(values + p * dim_panel + n * lanes, load(source + n * lanes));
      }
      visit(lane, values);
    }
  }

 private:
  static constexpr int M = value_rows<3>;

  float* p_of(const BlockPair<Operand>& pair) const { return scores_ + std::int64_t{pair.seen.begin} * row_block<Operand>; }
  float* ds_of(const BlockPair<Operand>& pair) const { return gradients_ + std::int64_t{pair.seen.begin} * row_block<Operand>; }

  // A tile [keys][row_block] as a left operand: words of neighbouring rows, in place.
  static void pack_along_rows(float* tile, int keys, int rows) {
    if constexpr (Operand::per_word > 1) {
      for (int key = 0; key < keys; ++key, tile += row_block<Operand>) {
        for (int row = 0; row < rows; row += lanes) store_half(tile + row / 2, load(tile + row));
      }
    }
  }

  void add_over_rows(const BlockPair<Operand>& pair, const float* tile, const float* panels, int dims, float* sum) const {
    const int row_words = words<Operand>(pair.row_count);
    panel_product<Operand, M>(tile, row_block<Operand>, 1, panels, std::int64_t{words<Operand>(row_block<Operand>)} * dim_panel,
                              pair.keys_seen(), dims, sum + std::int64_t{pair.seen.begin} * dim_panel,
                              std::int64_t{pair.keys.size} * dim_panel, [&](int key) -> KeyRange {
                                const RowSpan span = pair.staircase.rows_of_keys(key, M);
                                return {span.begin / Operand::per_word, min_of(span.end / Operand::per_word, row_words)};
                              });
  }

  int head_dim_;
  int head_dim_v_;
  float* scores_;      // [key_block][row_block]  S, P
  float* gradients_;   // [key_block][row_block]  dP, dS
  float* derivative_;  // [key_block][row_block]  softcap's; then dS in words of keys
  float* k_panels_;    // [dim panels][key words][dim_panel]
};

#if FA_MATRIX_TILES

template <int terms>
class BackwardProducts<MatrixOperand<terms>> {
  using Operand = MatrixOperand<terms>;
  static constexpr int pair_of_tiles = 2 * matrix_tile;  // rows or keys of the smallest step
  static constexpr int rows_in_block = row_block<Operand>;
  static constexpr int row_words = rows_in_block / 2;
  static_assert(lanes == matrix_tile && dim_panel == pair_of_tiles && rows_in_block % pair_of_tiles == 0);

 public:
  using Unit = MatrixUnit;
  static constexpr bool leaves_scale = true;  // tiles are stored as they are
  static constexpr bool gradients_in_registers = false;
  static constexpr int keys_at_once = 2 * pair_of_tiles;

  static std::int64_t size(const AttentionProblem& problem, std::int32_t key_block) {
    return 3 * tile_size + terms * key_block * (std::int64_t{3} * row_words + round_up(problem.head_dim, dim_panel) / 2);
  }

  BackwardProducts(const AttentionProblem& problem, std::int32_t key_block, float* memory)
      : k_panels_(panels_of(problem.head_dim)), v_panels_(panels_of(problem.head_dim_v)), key_words_(key_block / 2) {
    const auto take = [&memory](std::int64_t size) { return (memory += size) - size; };
    scores_ = take(tile_size);
    gradients_ = take(tile_size);
    derivative_ = take(tile_size);
    p_rows_ = take(terms * words_of_pair());
    ds_rows_ = take(terms * words_of_pair());
    ds_keys_ = take(terms * words_of_pair());
    k_dims_ = take(terms * std::int64_t{key_words_} * k_panels_ * dim_panel);
  }

  void pack_keys(KeyBlock, int head_dim, const float* k_rows) const {
    const int row = row_words_of(head_dim);
    for (int first = 0; first < key_words_; first += lanes) {
      pack_dims<Operand>(
          head_dim, {first, first + lanes}, key_words_, k_dims_, [&](int pair, int d, Vec(&words)[terms]) FA_INLINE_IF_FAST {
            const float* neighbours[2] = {k_rows + std::int64_t{2 * pair} * row, k_rows + std::int64_t{2 * pair + 1} * row};
            for (Vec& word : words) {
              word = Operand::finite(word_of_rows<Operand>(neighbours, d));
              for (const float*& words_of_key : neighbours) words_of_key += row / terms;
            }
          });
    }
  }

  // Where no row of the panel looks, P and dS are 0 for the rows of its neighbours that do.
  KeyRange keys_of_panel(const BlockPair<Operand>& pair, int column, int vectors) const {
    KeyRange keys = pair.staircase.keys_of_rows(column, vectors * lanes);
    keys = {pair.seen.begin + keys.begin / pair_of_tiles * pair_of_tiles, pair.seen.begin + round_up(keys.end, pair_of_tiles)};
    clear({pair.seen.begin, keys.begin}, column, vectors);
    clear({keys.end, pair.seen.end}, column, vectors);
    return keys;
  }

  template <int N>
  GradientTile tile(const BlockPair<Operand>& pair, int key, int count, int) const {
    return {{scores_, N * lanes, count, pair.keys.begin + key}, gradients_, derivative_};
  }

  template <int N>
  static FA_INLINE void scores(const BlockPair<Operand>&, int, const float* rows_of_keys, int dim_words,
                               const float* transposed, int keys, float, float* scores, std::int64_t stride) {
    constexpr int M = tiles_of_left<terms>;
    const int words_of_term = dim_words / terms;
    for (int key = 0; key < keys; key += M * matrix_tile) {
      multiply_tiles<terms, M, N>(
          false, scores + key * stride, stride, {rows_of_keys + std::int64_t{key} * dim_words, dim_words, words_of_term},
          {transposed, N * lanes, std::int64_t{words_of_term} * N * lanes}, words_of_term / matrix_tile);
    }
  }

  template <int N>
  void keep(const GradientTile& tile, int key, int column) const {
    for (int i = 0; i < tile.scores.keys; i += 2) {
      const std::int64_t row = std::int64_t{key + i} * row_words + column / 2;
      float* ds_keys = ds_keys_ + std::int64_t{(key + i) / 2} * rows_in_block + column;
#pragma GCC unroll 3
      for (int n = 0; n < N; ++n) {
        const std::int64_t from = i * tile.scores.stride + n * lanes;
        const std::int64_t next = from + tile.scores.stride;
        store_halves(p_rows_ + row + n * lanes / 2, load(tile.scores.scores + from));
        store_halves(p_rows_ + row + row_words + n * lanes / 2, load(tile.scores.scores + next));
        const Vec ds[2] = {load(tile.gradients + from), load(tile.gradients + next)};
        store_halves(ds_rows_ + row + n * lanes / 2, ds[0]);
        store_halves(ds_rows_ + row + row_words + n * lanes / 2, ds[1]);
        Vec words[terms];
        Operand::split_words(ds[0], ds[1], words);
        for (int term = 0; term < terms; ++term) store(ds_keys + term * words_of_pair() + n * lanes, words[term]);
      }
    }
  }
  void keep_all(const BlockPair<Operand>& pair) const {
    const int vectors = pair.staircase.granules * row_granule / lanes;
    if (vectors % 2 == 1) clear(pair.seen, vectors * lanes, 1);
  }

  void add_dv(const BlockPair<Operand>& pair, float* dv) const {
    add_over_rows(pair, p_rows_, pair.rows.dout_panels, v_panels_, dv);
  }
  void add_dk(const BlockPair<Operand>& pair, float* dk) const {
    add_over_rows(pair, ds_rows_, pair.rows.q_panels, k_panels_, dk);
  }
  // dQ^T [dims][row block]
  void add_dq(const BlockPair<Operand>& pair, float* dq) const {
    for (int row = 0; row < pair.row_count; row += pair_of_tiles) {
      const KeyRange seen = pair.staircase.keys_of_rows(row, pair_of_tiles);
      const int first = (pair.seen.begin + seen.begin) / pair_of_tiles;
      const int depth = (pair.seen.begin + seen.end + pair_of_tiles - 1) / pair_of_tiles - first;
      if (seen.begin >= seen.end) continue;
      for (int panel = 0; panel < k_panels_; ++panel) {
        multiply_tiles<terms, 2, 2>(
            true, dq + std::int64_t{panel} * dim_panel * rows_in_block + row, rows_in_block,
            {k_dims_ + std::int64_t{panel} * dim_panel * key_words_ + first * matrix_tile, key_words_,
             std::int64_t{k_panels_} * dim_panel * key_words_},
            {ds_keys_ + std::int64_t{first} * matrix_tile * rows_in_block + row, rows_in_block, words_of_pair()}, depth);
      }
    }
  }

  template <class Visit>
  static void visit_dq(const float* dq, int row, int head_dim, Visit visit) {
    float values[lanes][padded_head_dim];
    read_transposed(dq + row, rows_in_block, head_dim, values);
    for (int lane = 0; lane < lanes; ++lane) visit(lane, values[lane]);
  }

 private:
  static constexpr std::int64_t tile_size = std::int64_t{keys_at_once} * panel_rows;
  static constexpr int row_words_of(int dim) { return FA_LEVEL::row_words<Operand>(dim); }

  // Of a term of P or dS.
  std::int64_t words_of_pair() const { return std::int64_t{key_words_} * rows_in_block; }

  void clear(KeyRange keys, int column, int vectors) const {
    for (int key = keys.begin; key < keys.end; ++key) {
      const std::size_t bytes = sizeof(float) * static_cast<std::size_t>(vectors * lanes);
      for (int term = 0; term < terms; ++term) {
        const std::int64_t words = term * words_of_pair() + std::int64_t{key} * row_words + column / 2;
        std::memset(p_rows_ + words, 0, bytes / 2);
        std::memset(ds_rows_ + words, 0, bytes / 2);
        float* of_keys = ds_keys_ + term * words_of_pair() + std::int64_t{key / 2} * rows_in_block + column;
        if (key % 2 == 0) std::memset(of_keys, 0, bytes);
      }
    }
  }

  void store_halves(float* words, Vec x) const {
    Half halves[terms];
    Operand::split_halves(x, halves);
    for (int term = 0; term < terms; ++term) __builtin_memcpy(words + term * words_of_pair(), &halves[term], sizeof(Half));
  }

  void add_over_rows(const BlockPair<Operand>& pair, const float* left, const float* right, int panels, float* sum) const {
    for (int key = pair.seen.begin; key < pair.seen.end; key += pair_of_tiles) {
      const RowSpan rows = pair.staircase.rows_of_keys(key - pair.seen.begin, pair_of_tiles);
      const int first = rows.begin / pair_of_tiles;
      const int depth = (rows.end + pair_of_tiles - 1) / pair_of_tiles - first;
      if (rows.begin >= rows.end) continue;
      for (int panel = 0; panel < panels; ++panel) {
        multiply_tiles<terms, 2, 2>(true, sum + (std::int64_t{panel} * pair.keys.size + key) * dim_panel, dim_panel,
                                    {left + std::int64_t{key} * row_words + first * matrix_tile, row_words, words_of_pair()},
                                    {right + (std::int64_t{panel} * row_words + first * matrix_tile) * dim_panel, dim_panel,
                                     std::int64_t{panels} * row_words * dim_panel},
                                    depth);
      }
    }
  }

  int k_panels_;
  int v_panels_;
  int key_words_;
  float* scores_;      // [keys_at_once][panel]  S, P
  float* gradients_;   // [keys_at_once][panel]  dP, dS
  float* derivative_;  // [keys_at_once][panel]  softcap's
  float* p_rows_;      // [terms][key_block][row words]
  float* ds_rows_;     // [terms][key_block][row words]
  float* ds_keys_;     // [terms][key words][row_block]
  float* k_dims_;      // [terms][dims][key words]
};

#endif

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
