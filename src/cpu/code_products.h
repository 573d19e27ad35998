// S = K Q^T and O += P V of a few query rows and a cache of MLX's codes, in integers.
//
// K: a step has as many keys as a vector has lanes. Their rows are transposed, a word of codes of each key a lane, and meet
// words of q: so sums are complete where they are added up, with a scale and a bias for every lane. V: words of four keys at
// the same dim meet words of their weights.
#pragma once

#include "cpu/byte_rows.h"
#include "cpu/code_rows.h"
#include "cpu/row_values.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

// A byte of two codes takes twice as long to multiply.
template <DType dtype>
constexpr int bytes_ahead_of_codes = 8192 / codes_of_byte<dtype>;
// K's keys of a step are as many neighbours as lanes; of V more gain, since sums are read and written once a step.
template <bool into_l1, DType dtype>
using KeyCodesLater = RowsLater<1, into_l1, lanes, bytes_ahead_of_codes<dtype>>;
template <bool into_l1, DType dtype>
using ValueCodesLater = RowsLater<1, into_l1, 2 * lanes, bytes_ahead_of_codes<dtype>>;

// ---- S

// Rows of q, and the numbers of one head's keys in a step.
struct CodeQueries {
  const std::int32_t* words;  // [word][stride], of each row the high and the low one
  std::int64_t stride;
  const float* sums;     // [row][groups]
  const float* factors;  // [row]: what 1 of the words stands for
};
struct KeyNumbers {
  const float* scales;  // [group][stride]: lanes
  const float* biases;
  std::int64_t stride;
};

// A row's bytes [byte, byte + code_chunk), or those that are left, and zeros.
FA_INLINE Vec load_chunk(const char* row, int byte, int bytes) {
  if (bytes - byte >= code_chunk) return load(reinterpret_cast<const float*>(row + byte));
  return load(reinterpret_cast<const float*>(RowTail(row + byte, bytes - byte, 1).bytes));
}

// scores[key][row] from vectors of keys, or added to what is there.
template <int M>
FA_INLINE void store_key_lanes(const Vec (&of_row)[M], bool add, float* scores, std::int64_t stride) {
  if constexpr (M == tile_rows) {
    Vec of_key[4] = {of_row[0], of_row[1], of_row[2], of_row[3]};
    transpose_in_parts(of_key);
    unroll<lanes / 4>([&](auto part) FA_INLINE_IF_FAST {
      for (int i = 0; i < 4; ++i) {
        float* to = scores + (4 * part + i) * stride;
        Part four = part_of<part>(of_key[i]);
        if (add) four += load_part(to);
        std::memcpy(to, &four, sizeof(four));
      }
    });
  } else {
    for (int m = 0; m < M; ++m) {
      float of_key[lanes];
      store(of_key, of_row[m]);
      for (int i = 0; i < lanes; ++i) {
        float& score = scores[i * stride + m];
        score = of_key[i] + (add ? score : 0.0f);
      }
    }
  }
}

// Out of line, so that its loop has all registers.
template <DType dtype, int M, class Later>
__attribute__((noinline)) void code_dots(const ByteRows<Later>& keys, Later later, const CodeQueries& q, int dim,
                                         const KeyNumbers& numbers, float scale, bool add, float* scores, std::int64_t stride) {
  static_assert(Later::rows == lanes && Later::depth == lanes);
  constexpr int words_of_group = group_bytes<dtype> / 4;
  constexpr int groups_of_chunk = lanes / words_of_group;
  const int groups = dim / quantization_group;
  const int bytes = groups * group_bytes<dtype>;
  const std::int32_t* query = q.words;
  Vec sums[M] = {};
  int group = 0;
  for (int byte = 0; byte < bytes; byte += code_chunk) {
    Vec words[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) words[i] = load_chunk(keys.at(i), byte, bytes);
    later.template ask<lanes>(byte);
    transpose(words);
    unroll<groups_of_chunk>([&](auto i) FA_INLINE_IF_FAST {
      if (group == groups) return;
      IVec high[M] = {};
      IVec low[M] = {};
      unroll<words_of_group>([&](auto word) FA_INLINE_IF_FAST {
        unroll<codes_of_byte<dtype>>([&](auto which) FA_INLINE_IF_FAST {
          const IVec codes = CodeOperand::codes_of_words<dtype>(bits_of(words[i * words_of_group + word]), which);
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) {
            high[m] = CodeOperand::multiply_add(high[m], codes, splat(query[2 * m]));
            low[m] = CodeOperand::multiply_add(low[m], codes, splat(query[2 * m + 1]));
          }
          query += q.stride;
        });
      });
      const Vec scales = load(numbers.scales + group * numbers.stride);
      const Vec biases = load(numbers.biases + group * numbers.stride);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const Vec sum = to_float((high[m] << 8) + low[m]) * q.factors[m];
        sums[m] += sum * scales + biases * splat(q.sums[m * groups + group]);
      }
      ++group;
    });
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m) sums[m] *= scale;
  store_key_lanes(sums, add, scores, stride);
}

// ---- O

constexpr int value_code_rows = 2;  // of a tile: with two sums for each vector of a group they leave registers for the codes

// sums[row][d] += sum over keys of weight[key][row] * code[key][d], for a group of dims and M rows. Out of line, so that its
// loop has all registers.
template <DType dtype, int M, class Later>
__attribute__((noinline)) void add_code_values(const ByteRows<Later>& values, Later later, bool asks,
                                               const CodeWeights& weights, int words, int row, int group,
                                               const BlockSums& block) {
  static_assert(Later::depth == Later::rows);
  IVec high[M][group_vectors] = {};
  IVec low[M][group_vectors] = {};
#pragma GCC unroll 1
  for (int word = 0; word < words; ++word) {
    const char* const keys[4] = {values.at(4 * word), values.at(4 * word + 2), values.at(4 * word + 1),
                                 values.at(4 * word + 3)};
    IVec codes[group_vectors];
    CodeOperand::words_of_keys<dtype>(keys, group, codes);
    if (asks) later.from(4 * word).template ask<4>(group * group_bytes<dtype>);
    const std::int64_t at = word * weights.stride + row;
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const IVec of_high = splat(weights.high[at + m]);
      const IVec of_low = splat(weights.low[at + m]);
#pragma GCC unroll 4
      for (int i = 0; i < group_vectors; ++i) {
        high[m][i] = CodeOperand::multiply_add(high[m][i], codes[i], of_high);
        low[m][i] = CodeOperand::multiply_add(low[m][i], codes[i], of_low);
      }
    }
  }
  unroll<M>([&](auto m) FA_INLINE_IF_FAST {
    unroll<group_vectors>([&](auto i) FA_INLINE_IF_FAST {
      const std::int64_t at = (row + m) * block.stride + group * quantization_group + i * lanes;
      IVec sum = (high[m][i] << 8) + low[m][i];
      if (!block.is_first) sum += load_words(block.sums + at);
      if (!block.is_last) return store_words(block.sums + at, sum);
      store(block.o + at,
            load(block.o + at) * block.rescale[row + m] + (to_float(sum) * block.row_units[row + m] + weights.biases[row + m]));
    });
  });
}

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
