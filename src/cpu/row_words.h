// The caller's rows as words of an operand. Levels that multiply bfloat16 pairs find the words of a bfloat16 row where the row
// lies: nothing becomes float32 on its way to a product.
#pragma once

#include "cpu/pack.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

// Words of a row, zeros up to a whole panel.
template <class Operand>
constexpr int panel_words(int dim) {
  return round_up(dim, dim_panel) / Operand::per_word;
}

inline const float* words_of_zeros() { return reinterpret_cast<const float*>(zero_row); }

// The row itself where it is that already, else in `buffer`.
template <class Operand>
inline const float* view_words(const ConstTensor& tensor, std::int64_t offset, int dim, float* buffer) {
  if constexpr (Operand::per_word == 1) {
    return view_row(tensor, offset, dim, buffer);
  } else {
    if (Operand::terms == 1 && tensor.dtype == DType::bfloat16 && tensor.strides.dim == 1 && dim % dim_panel == 0) {
      return reinterpret_cast<const float*>(element(tensor.data, tensor.dtype, offset));
    }
    float values[padded_head_dim];
    pack_row<Operand>(view_row(tensor, offset, dim, values), round_up(dim, dim_panel), buffer);
    return buffer;
  }
}

// The whole row that meets a key's.
template <class Operand>
inline const float* view_query_words(const AttentionInputs& inputs, const AttentionProblem& problem, const Unit& unit,
                                     const RowPanel& panel, int lane, float* buffer) {
  if (!problem.has_qv) {
    return view_words<Operand>(inputs.q, panel.offset(unit, inputs.q.strides, lane), problem.head_dim, buffer);
  }
  if constexpr (Operand::per_word == 1) {
    return view_query(inputs, problem, unit, panel, lane, buffer);
  } else {
    float values[padded_head_dim];
    pack_row<Operand>(view_query(inputs, problem, unit, panel, lane, values), problem.scored_dims(), buffer);
    return buffer;
  }
}

// A key's row of k or of v, not of codes where words hold pairs; zeros where KeyReader sees none.
template <class Operand>
inline const float* view_words(const KeyReader& reader, const KeyTensor& source, const Unit& unit, std::int32_t key,
                               float* buffer) {
  if constexpr (Operand::per_word == 1) {
    return reader.view(source, key, buffer);
  } else {
    const KeySlot slot = reader.slot_of(key);
    if (!slot.exists()) return words_of_zeros();
    return view_words<Operand>(*source.tensor, slot.offset(source.tensor->strides, unit.kv_head), source.dim, buffer);
  }
}

// Words of dims [dim, dim + lanes) of rows of words: of one row, or of two whose pairs it makes.
template <class Operand>
FA_INLINE Vec word_of_rows(const float* const (&rows)[Operand::per_word], int dim) {
  if constexpr (Operand::per_word == 1) {
    return load(rows[0] + dim);
  } else {
    Half low;
    Half high;
    __builtin_memcpy(&low, reinterpret_cast<const char*>(rows[0]) + 2 * dim, sizeof(low));
    __builtin_memcpy(&high, reinterpret_cast<const char*>(rows[1]) + 2 * dim, sizeof(high));
    return reinterpret_cast<Vec>(__builtin_convertvector(low, UVec) | (__builtin_convertvector(high, UVec) << 16));
  }
}

// [dim panels][key words][dim_panel] of v.
template <class Operand>
inline void pack_value_panels(const KeyReader& reader, const KeyTensor& values, const Unit& unit, KeyBlock keys,
                              float* panels) {
  const std::int64_t panel_stride = std::int64_t{words<Operand>(keys.size)} * dim_panel;
  float buffers[Operand::per_word][padded_row];
  for (int key = 0; key < keys.size; key += Operand::per_word, panels += dim_panel) {
    const float* rows[Operand::per_word];
    for (int i = 0; i < Operand::per_word; ++i) {
      reader.fetch_ahead(values, keys.begin + key + i);
      rows[i] = view_words<Operand>(reader, values, unit, keys.begin + key + i, buffers[i]);
    }
    for (int d = 0; d < round_up(values.dim, dim_panel); d += lanes) {
      store(panels + d / dim_panel * panel_stride + d % dim_panel, word_of_rows<Operand>(rows, d));
    }
  }
}

// [terms][dims][key words]: what a matrix unit takes on its left. words_at(pair of keys, dim, words) gives the words of two
// keys for a vector of dims.
template <class Operand, class WordsAt>
inline void pack_dims(int dim, KeyRange pairs, int key_words, float* packed, const WordsAt& words_at) {
  const int dims = round_up(dim, dim_panel);
  for (int d = 0; d < dims; d += lanes) {
    Vec block[Operand::terms][lanes];
    for (int i = 0; i < lanes; ++i) {
      Vec words[Operand::terms];
      words_at(pairs.begin + i, d, words);
      for (int term = 0; term < Operand::terms; ++term) block[term][i] = words[term];
    }
    for (int term = 0; term < Operand::terms; ++term) {
      transpose(block[term]);
      float* of_term = packed + (std::int64_t{term} * dims + d) * key_words + pairs.begin;
      for (int i = 0; i < lanes; ++i) store(of_term + i * key_words, block[term][i]);
    }
  }
}

// The same of v.
template <class Operand>
inline void pack_value_dims(const KeyReader& reader, const KeyTensor& values, const Unit& unit, KeyBlock keys, float* packed) {
  float buffers[2 * lanes][padded_head_dim];
  const float* rows[2 * lanes];
  for (int first = 0; first < keys.size; first += 2 * lanes) {
    for (int i = 0; i < 2 * lanes; ++i) {
      reader.fetch_ahead(values, keys.begin + first + i);
      if constexpr (Operand::terms == 1) {
        rows[i] = view_words<Operand>(reader, values, unit, keys.begin + first + i, buffers[i]);
      } else {
        rows[i] = reader.view(values, keys.begin + first + i, buffers[i]);
      }
    }
    pack_dims<Operand>(values.dim, {first / 2, first / 2 + lanes}, keys.size / 2, packed,
                       [&](int pair, int d, Vec(&words)[Operand::terms]) FA_INLINE_IF_FAST {
                         const int i = 2 * pair - first;
                         if constexpr (Operand::terms == 1) {
                           words[0] = word_of_rows<Operand>({rows[i], rows[i + 1]}, d);
                         } else {
                           Operand::words_of_neighbours(load(rows[i] + d), load(rows[i + 1] + d), words);
                         }
                       });
  }
}

// sum(a * b) of two rows of words.
template <class Operand>
inline float dot_of_words(const float* a, const float* b, int words) {
  Vec sum = {};
  visit_terms<Operand::terms>([&](int i, int j, auto, auto) {
    for (int word = 0; word < words; word += lanes) {
      sum = Operand::multiply_add(sum, load(a + i * words + word), load(b + j * words + word));
    }
  });
  float total = 0.0f;
  for (int lane = 0; lane < lanes; ++lane) total += sum[lane];
  return total;
}

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
