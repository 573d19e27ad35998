// What happens to a tile of scores between Q K^T and the softmax: a list of steps, chosen once a call. A step that a call does
// not use costs it nothing; one that it uses passes once over a tile in L1. A new feature is a new step; if it depends on where
// a key stands among those that a row sees, PageOrder must know.
#pragma once

#include "cpu/key_slot.h"
#include "cpu/row_panel.h"
#include "cpu/vector_math.h"
#include "semantics/dropout.h"

namespace flash_attn::cpu::FA_LEVEL {
namespace {

// S [keys][stride], log2 units; the panel's rows in the lanes.
struct ScoreTile {
  float* scores;
  std::int64_t stride;
  int keys;
  std::int32_t key_begin;  // position of the first key in its sequence
};

struct ScoreContext {
  const AttentionProblem* problem;
  const AttentionInputs* inputs;
  const Unit* unit;
  ScoreScale scale;
  float* mask_rows;  // [lanes][key block], where attn_mask's rows become columns
  int mask_row_stride;
  // Backward only: d(capped score) / d(score) of the tile, same shape as the scores.
  float* softcap_derivatives;
};

template <class Step>
FA_INLINE void for_each_score(const RowPanel& panel, const ScoreTile& tile, Step step) {
  for (int key = 0; key < tile.keys; ++key) {
    float* row = tile.scores + key * tile.stride;
    for (int v = 0; v < panel.vectors; ++v) store(row + v * lanes, step(load(row + v * lanes), tile.key_begin + key, v));
  }
}

inline Vec minus_infinity() { return from_bits(splat(static_cast<std::int32_t>(0xff800000))); }

// The score comes as tanh's argument.
inline void softcap_step(const ScoreContext& context, const RowPanel& panel, const ScoreTile& tile) {
  const Vec softcap = splat(context.scale.softcap);
  const Vec one = splat(1.0f);
  if (!context.softcap_derivatives) {
    for_each_score(panel, tile, [&](Vec s, int, int) { return softcap * softcap_tanh<Vec, VectorWords>(s, one); });
    return;
  }
  for_each_score(panel, tile, [&](Vec s, int key, int v) {
    const Vec t = softcap_tanh<Vec, VectorWords>(s, one);
    store(context.softcap_derivatives + (key - tile.key_begin) * tile.stride + v * lanes, softcap_derivative(t));
    return softcap * t;
  });
}

inline void alibi_step(const ScoreContext&, const RowPanel& panel, const ScoreTile& tile) {
  for_each_score(panel, tile, [&](Vec s, int key, int v) {
    const Vec distance = load(panel.diagonal + v * lanes) - splat(static_cast<float>(key));
    return s + alibi_bias<Vec, VectorWords>(load(panel.slope_log2 + v * lanes), distance);
  });
}

// `keys` of a row of attn_mask as something to add, -inf where hidden, then zeros up to `columns`: the row itself where it is
// that already, else in `buffer`.
inline const float* view_mask_row(const MaskTensor& mask, std::int64_t offset, int keys, int columns, float* buffer) {
  const char* row = element(mask.data, mask.dtype, offset);
  if (mask.dtype == DType::float32 && mask.key == 1 && keys == columns && columns % lanes == 0) {
    return reinterpret_cast<const float*>(row);
  }
  if (mask.dtype == DType::boolean) {
    for (int key = 0; key < keys; ++key) buffer[key] = row[key * mask.key] ? 0.0f : -__builtin_inff();
  } else {
    read_row(mask.dtype, row, mask.key, keys, buffer);
  }
  for (int key = keys; key < columns; ++key) buffer[key] = 0.0f;
  return buffer;
}

// -inf hides the key; anything finite leaves it visible, even where base 2 overflows (the lowest float is a common mask value).
inline Vec add_mask(Vec score, Vec mask) {
  const Vec sum = larger_of(splat(lowest_score), score + mask * log2_e);
  return select(mask == minus_infinity(), minus_infinity(), sum);
}

inline void attn_mask_step(const ScoreContext& context, const RowPanel& panel, const ScoreTile& tile) {
  const MaskTensor& mask = context.inputs->attn_mask;
  for (int v = 0; v < panel.vectors; ++v) {
    const std::int64_t* offsets = panel.mask_offset + v * lanes;
    const std::int64_t first_key = tile.key_begin * mask.key;
    bool same_row = true;
    for (int lane = 1; lane < lanes; ++lane) same_row &= offsets[lane] == offsets[0];
    const float* rows[lanes];
    for (int lane = 0; lane < (same_row ? 1 : lanes); ++lane) {
      // A tile of backward is rounded up: past the last key that a row sees, the mask may have ended.
      const int count = clamp_to(max_of(panel.some.end, 0) - tile.key_begin, 0, tile.keys);
      rows[lane] =
          view_mask_row(mask, offsets[lane] + first_key, count, tile.keys, context.mask_rows + lane * context.mask_row_stride);
    }
    const auto add = [&](int key, Vec bias) {
      float* scores = tile.scores + key * tile.stride + v * lanes;
      store(scores, add_mask(load(scores), bias));
    };
    if (same_row) {
      for (int key = 0; key < tile.keys; ++key) add(key, splat(rows[0][key]));
    } else {
      visit_columns(rows, tile.keys, add);
    }
  }
}

inline bool pages_exist(const ScoreContext& context, KeyRange keys) {
  bool exist = true;
  for_each_stretch(*context.problem, *context.inputs, context.unit->sequence, context.unit->batch, keys,
                   [&](std::int32_t, std::int32_t, KeySlot slot) { exist &= slot.exists(); });
  return exist;
}

// Keys whose page does not exist.
inline void missing_page_step(const ScoreContext& context, const RowPanel& panel, const ScoreTile& tile) {
  const KeyRange keys = {max_of(panel.some.begin, tile.key_begin), min_of(panel.some.end, tile.key_begin + tile.keys)};
  for_each_stretch(*context.problem, *context.inputs, context.unit->sequence, context.unit->batch, keys,
                   [&](std::int32_t first, std::int32_t count, KeySlot slot) {
                     if (slot.exists()) return;
                     const ScoreTile page = {tile.scores + (first - tile.key_begin) * tile.stride, tile.stride, count, first};
                     for_each_score(panel, page, [](Vec, int, int) { return minus_infinity(); });
                   });
}

// Causal, window, chunk and length at once. Needed only where the tile is not wholly visible.
inline void visibility_step(const ScoreContext&, const RowPanel& panel, const ScoreTile& tile) {
  for_each_score(panel, tile, [&](Vec s, int key, int v) {
    IVec begin;
    IVec end;
    __builtin_memcpy(&begin, panel.key_begin + v * lanes, sizeof(begin));
    __builtin_memcpy(&end, panel.key_end + v * lanes, sizeof(end));
    const IVec position = splat(static_cast<std::int32_t>(key));
    return select((position >= begin) & (position < end), s, minus_infinity());
  });
}

class ScoreSteps {
 public:
  ScoreSteps(const AttentionProblem& problem, const AttentionInputs& inputs) {
    if (problem.softcap > 0) add(softcap_step);
    const int before = count_;
    if (inputs.alibi_slopes) add(alibi_step);
    if (inputs.attn_mask.data) add(attn_mask_step);
    suit_few_keys_ = count_ == before;
    has_pages_ = problem.page_size > 0;
  }

  // Steps that need the scores themselves, and not some multiple of them.
  bool change_scores() const { return count_ > 0; }

  // Whether a few keys at a time cost no more than many: rows of a mask are turned many at once, ALiBi raises scores from key
  // to key, so that few would often be far above those before them.
  bool suit_few_keys() const { return suit_few_keys_; }

  // Whether none of the keys is hidden by its page.
  bool show_all(const ScoreContext& context, KeyRange keys) const { return !has_pages_ || pages_exist(context, keys); }

  // Without hiding any key.
  void change(const ScoreContext& context, const RowPanel& panel, const ScoreTile& tile) const {
    for (int i = 0; i < count_; ++i) steps_[i](context, panel, tile);
  }

  void apply(const ScoreContext& context, const RowPanel& panel, const ScoreTile& tile) const {
    change(context, panel, tile);
    if (has_pages_) missing_page_step(context, panel, tile);
    // Only the two ends of a tile can hold keys that some row does not see.
    const std::int32_t tile_end = tile.key_begin + tile.keys;
    hide(context, panel, tile, tile.key_begin, min_of(panel.all.begin, tile_end));
    hide(context, panel, tile, max_of(panel.all.end, tile.key_begin), tile_end);
  }

 private:
  using Step = void (*)(const ScoreContext&, const RowPanel&, const ScoreTile&);
  void add(Step step) { steps_[count_++] = step; }

  static void hide(const ScoreContext& context, const RowPanel& panel, const ScoreTile& tile, std::int32_t begin,
                   std::int32_t end) {
    if (begin >= end) return;
    visibility_step(context, panel, {tile.scores + (begin - tile.key_begin) * tile.stride, tile.stride, end - begin, begin});
  }

  Step steps_[3] = {};
  int count_ = 0;
  bool has_pages_ = false;
  bool suit_few_keys_ = true;
};

// Calls visit(key, v, keep) for every vector of the tile; `keep` is a lane mask. Not a step on scores: dropout acts on
// probabilities.
template <class Visit>
FA_INLINE void visit_dropout(const AttentionProblem& problem, const std::uint32_t* dropout_key, const RowPanel& panel,
                             std::int32_t key_begin, int keys, Visit visit) {
  const UVec key_x = splat(dropout_key[0]);
  const UVec key_y = splat(dropout_key[1]);
  const UVec keep_24 = splat(problem.dropout_keep_24);
  for (int v = 0; v < panel.vectors; ++v) {
    UVec row;
    UVec head;
    __builtin_memcpy(&row, panel.query + v * lanes, sizeof(row));
    __builtin_memcpy(&head, panel.dropout_head + v * lanes, sizeof(head));
    const UVec row_tile = row >> 4;
    for (std::int32_t column_tile = key_begin / 32; column_tile * 32 < key_begin + keys; ++column_tile) {
      const UVec tile = splat(static_cast<std::uint32_t>(column_tile));
      for (std::uint32_t pair = 0; pair < 4; ++pair) {
        const UVec counter = dropout_counter(head, row, splat(2 * pair));
        const PhiloxWords<UVec> words = philox4x32_7<UVec, VectorWords>({counter, UVec{}, row_tile, tile}, key_x, key_y);
        const UVec by_column[4] = {words.x, words.y, words.z, words.w};
        const UVec threshold = dropout_threshold(keep_24, counter, row_tile, tile, key_x, key_y);
        for (std::uint32_t low = 0; low < 2; ++low) {
          const UVec shift = dropout_byte_shift(row, splat(2 * pair + low));
          for (std::uint32_t word = 0; word < 4; ++word) {
            const std::int32_t key = column_tile * 32 + static_cast<std::int32_t>(2 * pair + low + 8 * word) - key_begin;
            if (key < 0 || key >= keys) continue;
            const UVec byte = (by_column[word] >> shift) & 255u;
            visit(key, v, reinterpret_cast<IVec>(byte) < reinterpret_cast<IVec>(threshold));
          }
        }
      }
    }
  }
}

// What is left to multiply scores by. A product that stores its tiles as they are leaves `scale` to the softmax, unless a step
// changes scores or scaling would turn their order round.
template <class Products>
inline float leave_scale(const ScoreSteps& steps, const RowPanel& panel, const ScoreTile& tile, float scale) {
  if constexpr (Products::leaves_scale) {
    if (!steps.change_scores() && scale > 0.0f) return scale;
    for_each_score(panel, tile, [&](Vec s, int, int) { return s * scale; });
  }
  return 1.0f;
}

}  // namespace
}  // namespace flash_attn::cpu::FA_LEVEL
